"""Puts weights beside an ONNX file without holding them: pointed at where they are, or streamed.

A weight that lies in a safetensors file as the graph wants it is not copied: the ONNX file points
into that file, or into a hard link to it where it is in another folder, since an ONNX file reads
from no folder but its own. The others are written one after the other, a piece at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from cachefree.errors import CacheFreeError, Refusal
from cachefree.onnx.checkpoints import Stored
from cachefree.onnx.weights import Matched
from cachefree.progress import amount

__all__ = ["outside_optimizer", "place"]

log = logging.getLogger(__name__)
_ALIGNMENT = 64
_SMALLEST = 256  # bytes; smaller tensors stand in the ONNX file
_PIECE = 1 << 24  # elements that are converted at once


@contextlib.contextmanager
def outside_optimizer(model: Any, matched: Matched) -> Iterator[None]:
    """Hides weights while a graph is optimized: nothing that is computed of them is computed."""
    hidden = [
        (value, value.const_value)
        for name, value in model.graph.initializers.items()
        if name in matched.stored
    ]
    for value, _ in hidden:
        value.const_value = None
    yield
    for value, tensor in hidden:
        value.const_value = tensor


@dataclass(frozen=True)
class _Streamed:
    """A tensor that is written into the data file.

    Attributes:
        value: The initializer.
        dtype: What it is written as.
        offset: Where, in bytes from the file's beginning.
        length: Its size in bytes.
        source: Where its values are: stored, or in the model.
    """

    value: Any
    dtype: torch.dtype
    offset: int
    length: int
    source: Stored | torch.Tensor

    def load(self) -> torch.Tensor:
        return self.source.load() if isinstance(self.source, Stored) else self.source

    def identity(self) -> list[Any]:
        """What tells this tensor from another one, without its name."""
        if isinstance(self.source, Stored) and self.source.file is not None:
            state = self.source.file.stat()
            file = [os.fspath(self.source.file.resolve()), state.st_size, state.st_mtime_ns]
            return [*file, self.source.offset]
        digest = hashlib.sha256()
        for piece in _pieces(self.load(), self.dtype):
            digest.update(piece)
        return [digest.hexdigest()]


@dataclass
class _Plan:
    """Where each initializer of a model goes."""

    pointed: list[tuple[Any, Stored]] = field(default_factory=list)
    streamed: list[_Streamed] = field(default_factory=list)

    def stream(self, value: Any, source: Stored | torch.Tensor, dtype: torch.dtype) -> None:
        """Appends a tensor to the data file."""
        end = self.streamed[-1].offset + self.streamed[-1].length if self.streamed else 0
        offset = -(-end // _ALIGNMENT) * _ALIGNMENT
        self.streamed.append(
            _Streamed(value, dtype, offset, math.prod(source.shape) * dtype.itemsize, source)
        )

    def digest(self) -> str:
        """A name for what the data file will hold."""
        parts = [
            [one.value.name, str(one.dtype), one.offset, one.length, *one.identity()]
            for one in self.streamed
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def place(
    model: Any, matched: Matched, path: Path, home: Path, name: str, *, is_resumed: bool
) -> None:
    """Gives every initializer of a model its values.

    Args:
        model: An ``onnx_ir.Model``. Afterwards its large tensors are external.
        matched: The stored weights by the names of initializers.
        path: Where the ONNX file will be written; the data file and links are put beside it.
        home: The folder that all of them are moved to in the end.
        name: The data file's name.
        is_resumed: Whether an interrupted data file in ``home`` is gone on with, and kept if this
            is interrupted as well.
    """
    plan = _Plan()
    for weight, value in list(model.graph.initializers.items()):
        stored = matched.stored.get(weight)
        if stored is None:
            _keep(plan, value)
            continue
        dtype = _torch_dtype(value)
        if stored.dtype != dtype and matched.cast == "graph":
            value, dtype = _cast_in_graph(model, value, stored), stored.dtype
        if stored.length < _SMALLEST:
            value.const_value = _tensor(stored.load().to(dtype), value.name)
        elif stored.file is not None and stored.dtype == dtype:
            plan.pointed.append((value, stored))
        else:
            plan.stream(value, stored, dtype)
    links = _Links(path.parent, home, path.stem)
    for value, stored in plan.pointed:
        location = links.location(stored)
        if location is None:
            plan.stream(value, stored, stored.dtype)
        else:
            value.const_value = _external(
                value, stored.dtype, location, stored.offset, stored.length
            )
    if plan.streamed:
        _stream(plan, path.with_name(name), home, is_resumed=is_resumed)
    for one in plan.streamed:
        one.value.const_value = _external(one.value, one.dtype, name, one.offset, one.length)


def _keep(plan: _Plan, value: Any) -> None:
    """Plans a tensor that has its values in the model."""
    tensor = value.const_value
    if tensor is not None and tensor.nbytes >= _SMALLEST:
        held = torch.frombuffer(bytearray(tensor.tobytes()), dtype=torch.uint8)
        dtype = _torch_dtype(value)
        plan.stream(value, held.view(dtype).reshape(tuple(tensor.shape)), dtype)


def _cast_in_graph(model: Any, value: Any, stored: Stored) -> Any:
    """A new initializer in the stored dtype, from which the graph casts to the model's."""
    import onnx_ir
    from onnx_ir.tensor_adapters import from_torch_dtype

    kept = onnx_ir.Value(
        name=f"{value.name}.stored",
        shape=onnx_ir.Shape(stored.shape),
        type=onnx_ir.TensorType(from_torch_dtype(stored.dtype)),
    )
    node = onnx_ir.node("Cast", [kept], {"to": value.dtype}, name=f"{value.name}.cast")
    (cast,) = node.outputs
    cast.shape, cast.type = value.shape, value.type
    del model.graph.initializers[value.name]
    cast.name, value.name = value.name, None
    value.replace_all_uses_with(cast)
    model.graph.insert_before(model.graph[0], node)
    model.graph.initializers[kept.name] = kept
    return kept


class _Links:
    """Makes a stored file readable from the ONNX file's folder, without a copy of it.

    Args:
        temporary: Where links are made; its files are moved to ``home`` with the ONNX file.
        home: The ONNX file's folder.
        stem: What a link's name begins with where the file's own name is taken.
    """

    def __init__(self, temporary: Path, home: Path, stem: str) -> None:
        self.temporary = temporary
        self.home = home
        self.stem = stem
        self.names: dict[Path, str | None] = {}

    def location(self, stored: Stored) -> str | None:
        """The name of a weight's file in the ONNX file's folder; None where it cannot be there."""
        assert stored.file is not None
        file = stored.file.resolve()
        if file not in self.names:
            self.names[file] = self._linked(file)
        return self.names[file]

    def _linked(self, file: Path) -> str | None:
        if file.parent == self.home.resolve():
            return file.name
        for name in (file.name, f"{self.stem}.{file.name}"):
            there = self.home / name
            if there.exists() and there.samefile(file):
                return name
        name = file.name if not (self.home / file.name).exists() else f"{self.stem}.{file.name}"
        try:
            os.link(file, self.temporary / name)
        except OSError as error:  # another file system, or one without hard links
            log.info("%s is copied: %s", file, error)
            return None
        return name


def _stream(plan: _Plan, path: Path, home: Path, *, is_resumed: bool) -> None:
    """Writes the data file, each tensor after the other."""
    begun = home / f"{path.name}.partial" if is_resumed else path
    label = home / f"{path.name}.partial.json"
    written = 0
    if is_resumed:
        digest = plan.digest()
        if begun.exists() and label.exists() and label.read_text() == digest:
            written = begun.stat().st_size
        else:
            begun.unlink(missing_ok=True)
            label.write_text(digest)
    total = plan.streamed[-1].offset + plan.streamed[-1].length
    with begun.open("r+b" if written else "wb") as file, amount(total, "saving the weights") as say:
        for one in plan.streamed:
            if one.offset + one.length <= written:
                say(one.length)
                continue
            _write_one(one, file)
            say(one.length)
        file.flush()
        os.fsync(file.fileno())
    if is_resumed:
        os.replace(begun, path)
        label.unlink()


def _write_one(one: _Streamed, file: BinaryIO) -> None:
    file.seek(one.offset)
    file.truncate()
    for piece in _pieces(one.load(), one.dtype):
        file.write(piece)
    if file.tell() != one.offset + one.length:
        raise CacheFreeError(
            Refusal(
                f"The weight {one.value.name} has another size than its file says.",
                why=f"{file.tell() - one.offset} bytes of {one.length} were read.",
                remedy="Fetch the file again.",
            )
        )


def _pieces(tensor: torch.Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """The bytes of a tensor in a dtype, a piece at a time."""
    for part in tensor.detach().reshape(-1).split(_PIECE):
        yield memoryview(part.to("cpu", dtype).contiguous().view(torch.uint8).numpy())


def _external(value: Any, dtype: torch.dtype, name: str, offset: int, length: int) -> Any:
    import onnx_ir
    from onnx_ir.tensor_adapters import from_torch_dtype

    return onnx_ir.ExternalTensor(
        name, offset, length, from_torch_dtype(dtype), shape=value.shape, name=value.name
    )


def _tensor(tensor: torch.Tensor, name: str) -> Any:
    from onnx_ir.tensor_adapters import TorchTensor

    return TorchTensor(tensor, name=name)


def _torch_dtype(value: Any) -> torch.dtype:
    from onnx_ir.tensor_adapters import to_torch_dtype

    return to_torch_dtype(value.dtype)
