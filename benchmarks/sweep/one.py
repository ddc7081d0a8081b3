"""One architecture: rewritten, and compared with the model's own cache in eager mode and on ORT."""

from __future__ import annotations

import copy
import resource
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.sweep.configs import tiny_model

MEMORY_LIMIT = 9 << 30  # of addresses; what is in use is less
TOLERANCE = 1e-3
PASTS, CHUNKS, SINGLE = (0, 1, 7), (5, 1, 3, 1), (5, 1, 1, 1, 1, 1)
BATCH = 2
SOURCE = 6  # tokens of the encoder's text
CACHES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")


class Caller:
    """Calls a model, or what stands for it, on chunks of one text.

    Args:
        function: What is called.
        parameters: The arguments that it takes besides tokens and cache.
        source: What the encoder takes, from `encoder_inputs`; None where there is no encoder.
        masks_new: Whether the mask has a column for each new token alone, none for the past.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        parameters: tuple[str, ...],
        source: dict[str, torch.Tensor] | None = None,
        *,
        masks_new: bool = False,
    ) -> None:
        self.function = function
        self.masks_new = masks_new
        self.parameters = parameters
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, 59, (BATCH, 16), generator=generator)
        self.source = source

    def run(self, chunks: tuple[int, ...]) -> list[Any]:
        """The results of calls on chunks that follow one another, each with the cache so far."""
        results, done = [], 0
        cache: dict[str, Any] = {}
        for size in chunks:
            if size:
                result = self.call(done, size, cache)
                results.append(snapshot(result))
                cache, done = {name: result[name] for name in held(result)}, done + size
        return results

    def call(self, done: int, size: int, cache: dict[str, Any]) -> Any:
        ids = self.ids[:, done : done + size]
        given: dict[str, Any] = {}
        if "use_cache" in self.parameters:
            given["use_cache"] = True
        if self.source is not None:
            return self.function(**self.source, decoder_input_ids=ids, **cache, **given)
        if "attention_mask" in self.parameters:
            columns = size if self.masks_new else done + size
            given["attention_mask"] = torch.ones(BATCH, columns, dtype=torch.long)
        if "position_ids" in self.parameters:
            given["position_ids"] = torch.arange(done, done + size).expand(BATCH, -1)
        return self.function(input_ids=ids, **cache, **given)


def held(result: Any) -> list[str]:
    """The names of what a result hands to the next call."""
    found = [name for name in CACHES if result.get(name) is not None]
    if not found:
        raise ValueError(f"no cache among {', '.join(result)}")
    return found


def encoder_inputs(model: Any) -> dict[str, torch.Tensor] | None:
    """What the encoder takes, in the shapes that the rewrite finds; a padded text has a mask."""
    from cachefree import CacheFreeError
    from cachefree.inputs import find_first_call

    if not model.config.is_encoder_decoder:
        return None
    generator = torch.Generator().manual_seed(2)
    found: dict[str, torch.Tensor] = {}
    ids = torch.zeros((1, 1), dtype=torch.long)
    try:
        shapes = find_first_call(model).kwargs
    except CacheFreeError:  # the rewrite will say why; the model's own calls are made all the same
        shapes = {"input_ids": ids, "attention_mask": ids}
    for name, like in shapes.items():
        if name.startswith("decoder_"):
            continue
        if like.dtype.is_floating_point:
            found[name] = torch.randn((BATCH, *like.shape[1:]), generator=generator)
        elif "mask" in name:
            found[name] = torch.ones((BATCH, SOURCE), dtype=like.dtype)
            found[name][0, -2:] = 0
        else:
            found[name] = torch.randint(3, 59, (BATCH, SOURCE), generator=generator)
    return found


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of a cache, whatever holds them, but for those that hold one number."""
    if isinstance(value, torch.Tensor):
        if value.dim():
            yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_of(part)
    elif isinstance(value, dict):
        for name in sorted(value, key=str):
            yield from tensors_of(value[name])
    elif hasattr(value, "__dict__"):
        yield from tensors_of(vars(value))


def snapshot(result: Any) -> list[torch.Tensor]:
    """Logits and cache, copied: a cache may be written to by the next call."""
    cache = [result[name] for name in held(result)]
    return [t.detach().clone() for t in (result["logits"], *tensors_of(cache))]


def difference(one: list[Any], other: list[Any]) -> float:
    """The largest difference, relative to the largest value; infinite where sizes differ."""
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        if len(a) != len(b):
            return float("inf")
        for x, y in zip(a, b, strict=True):
            if x.shape != y.shape:
                return float("inf")
            if x.numel():
                gap = (x.double() - y.double()).abs().max() / y.double().abs().max().clamp(min=1)
                worst = max(worst, float(gap) if not gap.isnan() else float("inf"))
    return worst


def eager_gap(caller: Caller, chunks: tuple[int, ...] = CHUNKS) -> float:
    """How far the model's own calls in chunks are from one call over all tokens."""
    total = sum(chunks)
    (whole,) = caller.run((total,))
    logits = torch.cat([result[0] for result in caller.run(chunks)], 1)
    return difference([[logits]], [[whole[0]]])


def gap_of(own: Caller, row: dict[str, Any]) -> float:
    """`eager_gap`; where chunks of several tokens do not go on, that of one token at a time."""
    row["by_one_token"] = False
    try:
        gap = eager_gap(own)
    except Exception:  # noqa: BLE001 - a model may refuse a chunk as it likes
        gap = float("inf")
    if gap > TOLERANCE:
        single = eager_gap(own, SINGLE)
        row["by_one_token"] = single <= TOLERANCE
        gap = min(gap, single)
    return gap


def compare(eager: Caller, other: Caller, row: dict[str, Any], prefix: str) -> None:
    """Writes how far another caller is from the model's own calls."""
    is_single = row["by_one_token"]
    for past in PASTS:
        row[f"{prefix}{past}"] = max(
            difference(other.run((past, new)), eager.run((past, new)))
            for new in (1, 2)
            if new == 1 or not (past and is_single)
        )
    chunks = SINGLE if is_single else CHUNKS
    row[f"{prefix}chunks"] = difference(other.run(chunks), eager.run(chunks))


def greedy(caller: Caller, *, prompt: int = 4, new: int = 8) -> torch.Tensor:
    """Tokens of a greedy loop, one a call after the first, as `generate` makes them."""
    own = copy.copy(caller)
    own.ids = caller.ids[:, :prompt]
    cache: dict[str, Any] = {}
    done = 0
    while own.ids.shape[1] < prompt + new:
        result = own.call(done, own.ids.shape[1] - done, cache)
        cache, done = {name: result[name] for name in held(result)}, own.ids.shape[1]
        own.ids = torch.cat([own.ids, result["logits"][:, -1:].argmax(-1)], 1)
    return own.ids


def sweep(
    kind: str, name: str, *, layers: int = 2, with_onnx: bool = True
) -> Iterator[dict[str, Any]]:
    """A growing row: yielded whenever there is more of it, so that a limit leaves what is known."""
    import cachefree

    row: dict[str, Any] = {"architecture": name, "kind": kind, "stage": "model"}
    model = tiny_model(kind, name, layers=layers)
    row["layers"] = layers
    row["class"] = type(model).__name__
    row["stage"] = "eager"
    yield row
    source = encoder_inputs(model)
    own = Caller(model, ("use_cache",), source)
    row["eager_gap"] = gap_of(own, row)
    row["stage"] = "rewrite"
    yield row
    started = time.perf_counter()
    try:
        rewritten = cachefree.rewrite(copy.deepcopy(model), progress=False)
    except cachefree.CacheFreeError as error:
        row |= refusal(error)
        yield row | {"seconds": round(time.perf_counter() - started, 1)}
        return
    row["seconds"] = round(time.perf_counter() - started, 1)
    row["verdict"] = rewritten.report.verdict.name
    row["domain"] = "; ".join(map(str, rewritten.report.domain.regions))
    row["inputs"] = list(rewritten.calling.parameters)
    row["stage"] = "rewritten"
    yield row
    parameters = rewritten.calling.parameters
    masks_new = has_mask_of_new(rewritten)
    eager = Caller(model, (*parameters, "use_cache"), source, masks_new=masks_new)
    mine = Caller(rewritten, parameters, source, masks_new=masks_new)
    compare(eager, mine, row, "torch_")
    row["greedy"] = torch.equal(greedy(mine), greedy(eager))
    row["stage"] = "export"
    yield row
    if not with_onnx:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        cachefree.to_onnx(rewritten, path, progress=False)
        row["stage"] = "onnxruntime"
        yield row
        session = cachefree.load_onnx(path, like=rewritten)
        compare(eager, Caller(session, parameters, source, masks_new=masks_new), row, "ort_")
    row["stage"] = "done"
    yield row


def has_mask_of_new(rewritten: Any) -> bool:
    """Whether the graph takes a mask with a column for each new token alone."""
    mask = [spec.shape for spec in rewritten.interface.inputs if spec.path == "attention_mask"]
    return bool(mask) and str(mask[0][-1]) == "query"


def refusal(error: Any) -> dict[str, Any]:
    """Why an architecture was refused, with the line."""
    first = error.refusals[0]
    where = f"{Path(first.where.file).name}:{first.where.line}" if first.where else ""
    return {
        "refused": type(error).__name__,
        "reason": str(first.what),
        "where": where,
        "why": portable(str(first.why))[:600],
    }


def portable(text: str) -> str:
    """A text without the folder that packages are installed in."""
    return text.replace(f"{sysconfig.get_path('purelib')}/", "")


def run(kind: str, name: str, layers: int, with_onnx: bool, rows: Connection) -> None:
    """What a process of its own does: sends a growing row."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    row: dict[str, Any] = {"architecture": name, "kind": kind, "stage": "model"}
    try:
        for row in sweep(kind, name, layers=layers, with_onnx=with_onnx):
            rows.send(row)
    except Exception as error:  # noqa: BLE001 - whatever a model raises is the row's
        text = portable(" ".join(str(error).split()))
        row["error"] = f"{type(error).__name__}: {text[:300]}"
        rows.send(row)
