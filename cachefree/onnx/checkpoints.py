"""Checkpoints on disk: which weights they hold, and where each one's bytes lie.

A safetensors file is eight bytes of length, a JSON header, and the tensors one after the other,
little-endian and contiguous (https://github.com/huggingface/safetensors#format): the layout that an
ONNX file's external data has, so that one can point into the other.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cachefree.errors import CacheFreeError, Refusal, raise_all

__all__ = ["Stored", "listed", "stored_weights"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES = ("model.safetensors", "pytorch_model.bin")
_LARGEST_HEADER = 100 << 20


@dataclass(frozen=True)
class Stored:
    """A weight where it is stored.

    Attributes:
        name: Its name there.
        shape: Its shape.
        dtype: Its dtype.
        load: Reads it, on the CPU.
        file: The file whose bytes from ``offset`` on are the tensor's, contiguous and
            little-endian; None where there is no such file.
        offset: Where it begins, in bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]
    file: Path | None = None
    offset: int = 0

    @property
    def length(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def stored_weights(source: Any) -> dict[str, Stored]:
    """Finds the weights of a checkpoint without reading them.

    Args:
        source: A safetensors file, a torch checkpoint, an index of shards (``*.index.json``), a
            folder that holds one of these under its usual name, a mapping from names to tensors, or
            several of these in a list.

    Raises:
        CacheFreeError: a file is missing, cut off or of another kind; a name stands in two sources.
    """
    if isinstance(source, Mapping):
        return {str(name): _held(str(name), tensor) for name, tensor in source.items()}
    if isinstance(source, (str, os.PathLike)):
        return {weight.name: weight for weight in _in_file(Path(source))}
    if not isinstance(source, Iterable):
        raise CacheFreeError(
            Refusal(
                f"Weights cannot be read from {type(source).__name__}.",
                remedy="Give a path, a state_dict, or a list of these.",
            )
        )
    found: dict[str, Stored] = {}
    for part in source:
        weights = stored_weights(part)
        both = sorted(found.keys() & weights.keys())
        if both:
            raise CacheFreeError(
                Refusal(
                    f"Two sources of weights hold {listed(both)}.",
                    remedy="Give each weight once.",
                )
            )
        found |= weights
    return found


def _held(name: str, tensor: Any) -> Stored:
    if not isinstance(tensor, torch.Tensor):
        raise CacheFreeError(
            Refusal(
                f"The weight {name} is a {type(tensor).__name__}, not a tensor.",
                remedy="Give a state_dict: names and tensors.",
            )
        )
    return Stored(name, tuple(tensor.shape), tensor.dtype, lambda: tensor.detach())


def _in_file(path: Path) -> Iterator[Stored]:
    if path.is_dir():
        yield from _in_file(_in_folder(path))
    elif not path.is_file():
        raise CacheFreeError(Refusal(f"There is no file {path}.", remedy="Check the path."))
    elif path.suffix == ".json":
        yield from _in_shards(path)
    elif path.suffix == ".safetensors":
        yield from _in_safetensors(path)
    else:
        yield from _in_checkpoint(path)


def _in_folder(path: Path) -> Path:
    for name in (*_INDEXES, *_SINGLES):
        if (path / name).is_file():
            return path / name
    raise CacheFreeError(
        Refusal(
            f"There are no weights in {path}.",
            why=f"It holds none of {', '.join((*_INDEXES, *_SINGLES))}.",
            remedy="Give the path of the file itself.",
        )
    )


def _in_shards(path: Path) -> Iterator[Stored]:
    try:
        files: dict[str, str] = json.loads(path.read_text())["weight_map"]
        shards = {name: path.parent / name for name in sorted(set(files.values()))}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CacheFreeError(
            Refusal(
                f"{path} is no index of shards.",
                why=f"It has no weight_map ({type(error).__name__}).",
            )
        ) from error
    refusals = [
        Refusal(
            f"The shard {name} is missing.",
            why=f"{path} names it for {sum(file == name for file in files.values())} weights.",
            remedy=f"Put it into {path.parent}.",
        )
        for name, shard in shards.items()
        if Path(name).name != name or not shard.is_file()
    ]
    raise_all(CacheFreeError, refusals)
    for name, shard in shards.items():
        weights = {weight.name: weight for weight in _in_file(shard)}
        expected = {weight for weight, file in files.items() if file == name}
        lacking = sorted(expected - weights.keys())
        if lacking:
            raise CacheFreeError(
                Refusal(
                    f"The shard {shard} does not hold {listed(lacking)}.",
                    why=f"{path.name} says that it does.",
                    remedy="Fetch the shard again.",
                )
            )
        yield from (weights[weight] for weight in expected)


def _in_safetensors(path: Path) -> Iterator[Stored]:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
                raise ValueError(f"its header would be {length} bytes long")
            header = json.loads(file.read(length))
        entries = [
            (name, entry["dtype"], entry["shape"], *entry["data_offsets"])
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheFreeError(
            Refusal(
                f"{path} is no safetensors file, or it is cut off.",
                why=f"{type(error).__name__}: {error}",
                remedy="Fetch it again.",
            )
        ) from error
    begin = 8 + length
    for name, dtype, shape, start, end in entries:
        if dtype not in _DTYPES:
            raise CacheFreeError(
                Refusal(f"The weight {name} in {path} has the dtype {dtype}.", why="It is unknown.")
            )
        weight = _pointed(path, name, tuple(shape), _DTYPES[dtype], begin + start)
        if end - start != weight.length or begin + end > size:
            raise CacheFreeError(
                Refusal(
                    f"{path} is cut off.",
                    why=f"{name} needs {weight.length} bytes at {begin + start}; the file has "
                    f"{size} bytes.",
                    remedy="Fetch it again.",
                )
            )
        yield weight


def _pointed(
    path: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype, offset: int
) -> Stored:
    def load() -> torch.Tensor:
        if 0 in shape:
            return torch.empty(shape, dtype=dtype)
        raw = torch.from_file(
            os.fspath(path), shared=False, size=offset + weight.length, dtype=torch.uint8
        )
        part = raw[offset:]
        if offset % dtype.itemsize:
            part = part.clone()  # a view of another dtype begins at a multiple of its size
        return part.view(dtype).reshape(shape)

    weight = Stored(name, shape, dtype, load, path, offset)
    return weight


def _in_checkpoint(path: Path) -> Iterator[Stored]:
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        first = str(error).split("\n")[0]
        raise CacheFreeError(
            Refusal(
                f"{path} is no checkpoint that torch reads.",
                why=f"{type(error).__name__}: {first}",
                remedy="Give a safetensors file, or a file that torch.save wrote of a state_dict.",
            )
        ) from error
    while isinstance(found, Mapping) and not _is_state_dict(found):
        inner = [found[key] for key in ("state_dict", "model", "module") if key in found]
        if len(inner) != 1:
            found = None
            break
        found = inner[0]
    if not isinstance(found, Mapping):
        raise CacheFreeError(
            Refusal(
                f"{path} holds no state_dict.",
                remedy="Load it with torch.load and give the part that is one.",
            )
        )
    for name, tensor in found.items():
        yield _held(str(name), tensor)


def _is_state_dict(value: Mapping[Any, Any]) -> bool:
    return bool(value) and all(isinstance(part, torch.Tensor) for part in value.values())


def listed(names: list[str]) -> str:
    """The first of several names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
