"""A decoder with cross-attention as one graph, and as the pair of graphs that others export."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.serving.limits import preload, resident_bytes
from benchmarks.serving.sizes import Sizes, build

__all__ = ["WAYS", "make", "measure"]

WAYS = ("eager", "pair", "one graph", "hoisted")
_SLOTS = 4


class _First(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, states: torch.Tensor) -> Any:
        logits, present = self.model(ids, states)
        return logits, *(slot for layer in present for slot in layer)


class _Later(_First):
    def forward(self, ids: torch.Tensor, states: torch.Tensor, *past: torch.Tensor) -> Any:  # type: ignore[override]
        layers = [past[place : place + _SLOTS] for place in range(0, len(past), _SLOTS)]
        logits, present = self.model(ids, states, layers)
        return logits, *(slot for layer in present for slot in layer[:2])


def make(sizes: Sizes, folder: Path) -> None:
    """Writes the pair by `torch.onnx.export`, and the one graph in both ways."""
    import cachefree

    model = build("translator", sizes)
    ids, states = torch.ones(2, 3, dtype=torch.int64), torch.randn(2, 5, sizes.width)
    batch, new, rows, past = (torch.export.Dim(name) for name in ("batch", "new", "rows", "past"))
    plain = ({0: batch, 1: new}, {0: batch, 1: rows})
    slots = [slot for layer in model(ids, states)[1] for slot in layer]
    moving = [{0: batch, 2: past if place % _SLOTS < 2 else rows} for place in range(len(slots))]
    torch.onnx.export(
        _First(model).eval(), (ids, states), folder / "first.onnx", dynamo=True, verbose=False,
        dynamic_shapes=plain, opset_version=23,
    )  # fmt: skip
    torch.onnx.export(
        _Later(model).eval(), (ids, states, *slots), folder / "later.onnx", dynamo=True,
        verbose=False, dynamic_shapes=(*plain, tuple(moving)), opset_version=23,
    )  # fmt: skip
    for name, options in (("one graph", {}), ("hoisted", {"cross_attention": "hoist"})):
        rewritten = cachefree.rewrite(model, (ids, states), check="off", **options)  # type: ignore[arg-type]
        cachefree.to_onnx(rewritten, folder / name)


def measure(way: str, sizes: Sizes, rows: int, folder: Path) -> dict[str, float]:
    """A decode step behind so many rows, and the memory that the sessions take."""
    preload()
    states = torch.randn(1, rows, sizes.width)
    before = resident_bytes()
    call = {"eager": _eager, "pair": _pair}.get(way, _one)(way, sizes, folder, states)
    cache, taken = call(torch.ones(1, 2, dtype=torch.int64), None), []
    token = torch.ones(1, 1, dtype=torch.int64)
    gc.collect()
    resident = resident_bytes() - before
    for _ in range(sizes.steps):
        begin = time.process_time()
        cache = call(token, cache)
        taken.append(time.process_time() - begin)
    return {"decode": median(taken[sizes.steps // 5 :]), "resident": resident}


def _options() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return options


def _eager(way: str, sizes: Sizes, folder: Path, states: torch.Tensor) -> Any:
    model = build("translator", sizes)

    def call(ids: torch.Tensor, cache: Any) -> Any:
        with torch.inference_mode():
            return model(ids, states, cache)[1]

    return call


def _pair(way: str, sizes: Sizes, folder: Path, states: torch.Tensor) -> Any:
    import onnxruntime

    value = onnxruntime.OrtValue.ortvalue_from_numpy
    first, later = (
        onnxruntime.InferenceSession(folder / name, _options(), providers=["CPUExecutionProvider"])
        for name in ("first.onnx", "later.onnx")
    )

    def run(session: Any, values: list[Any]) -> list[Any]:
        # an input that a graph does not read is none of its inputs
        taken = [each.name for each in session.get_inputs()]
        given = values if len(taken) == len(values) else [values[0], *values[2:]]
        names = [each.name for each in session.get_outputs()]
        found: list[Any] = session.run_with_ort_values(names, dict(zip(taken, given, strict=True)))
        return found

    def call(ids: torch.Tensor, cache: Any) -> Any:
        given = [value(ids.numpy()), value(states.numpy())]
        if cache is None:
            return run(first, given)[1:]
        grown = run(later, [*given, *cache])[1:]
        kept = [cache[place + 2 : place + _SLOTS] for place in range(0, len(cache), _SLOTS)]
        own = [grown[place : place + 2] for place in range(0, len(grown), 2)]
        return [slot for pair in zip(own, kept, strict=True) for part in pair for slot in part]

    return call


def _one(way: str, sizes: Sizes, folder: Path, states: torch.Tensor) -> Any:
    import cachefree

    decoder = cachefree.load_onnx(
        folder / way, providers=["CPUExecutionProvider"], session_options=_options()
    )
    given: dict[str, Any] = {"states": states}
    if way == "hoisted":
        given = dict(decoder.encoder(states=states))
        takes = {spec.name for spec in decoder.interface.inputs}
        given = {
            name: value
            for output, value in given.items()
            if (name := output.removeprefix("present.")) in takes
            or (name := f"past_key_values.{name}") in takes
        }
    tokens = decoder.interface.inputs[0].name

    def call(ids: torch.Tensor, cache: Any) -> Any:
        return decoder.next_cache(decoder(**{tokens: ids}, **given, **(cache or {})))

    return call
