"""Operators that torch.onnx writes with control flow, in simpler ones that it writes without."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

__all__ = ["LEAST", "PREVIOUS", "SIMPLER", "Result", "without_groups"]

aten = torch.ops.aten
_ARANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)
LEAST = -1e30
"""A number that hides a key, and that a kernel does not take for "no key at all" as it does the
lowest number of float32: where a row has no other, it still weighs all keys alike."""
PREVIOUS = object()
"""Stands for the result of the step before."""


@dataclass(frozen=True)
class Result:
    """Stands for the result of a step, by its number from 0."""

    number: int


Steps = list[tuple[Any, tuple[Any, ...]]]


def _stack(rank: int, axis: int) -> Callable[[Any], Steps | None]:
    """``hstack`` and its kin as ``cat``: their ``If`` asks for the rank, which is known."""

    def simpler(args: Any) -> Steps | None:
        tensors = args[0]
        if min(tensor.meta["val"].dim() for tensor in tensors) < rank:
            return None
        return [(aten.cat.default, (tensors, axis))]

    return simpler


def _embedding_bag(args: Any) -> Steps | None:
    """Bags of one size as rows that are looked up and reduced: their ``Loop`` is over bags."""
    weight, indices, offsets = args[:3]
    mode = args[4] if len(args) > 4 else 0
    options = [*args[3:4], *args[5:9]]  # scaled by frequency, sparse, weights, last offset, padding
    size = _step(offsets)
    if size is None or any(option not in (None, False, -1) for option in options):
        return None
    reduce = (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default)[mode]
    return [
        (aten.reshape.default, (indices, [-1, size])),
        (aten.embedding.default, (weight, PREVIOUS)),
        (reduce, (PREVIOUS, [1])),
    ]


def _attention(args: Any) -> Steps | None:
    """Attention as torch.onnx and ONNX Runtime take it; None where it is so already."""
    ranks = [arg.meta["val"].dim() for arg in args[:3]]
    mask = args[3] if len(args) > 3 else None
    steps: Steps = []
    given = list(args)
    if mask is not None and mask.meta["val"].dtype.is_floating_point:
        steps += _kept_from_lowest(mask)
        given[3] = Result(len(steps) - 1)
    if ranks == [3, 3, 3] and (mask is None or mask.meta["val"].dim() <= 3):
        return _one_head(steps, given, mask)
    if ranks == [4, 4, 4]:
        steps += _one_head_for_all(steps, given)
    return [*steps, (aten.scaled_dot_product_attention.default, tuple(given))] if steps else None


def _kept_from_lowest(mask: Any) -> Steps:
    """A mask without the lowest number of its dtype.

    A row of it alone gives the mean of the values, and zeros in ONNX Runtime.
    """
    dtype = mask.meta["val"].dtype
    least = max(LEAST, torch.finfo(dtype).min / 2)
    return [
        (aten.eq.Scalar, (mask, -math.inf)),
        (aten.clamp_min.default, (mask, least)),
        (aten.where.self, (Result(0), mask, Result(1))),
    ]


def _one_head(steps: Steps, given: list[Any], mask: Any) -> Steps:
    """Attention without heads as attention of one head: torch.onnx writes no other."""
    for place, arg in enumerate(given[:3]):
        steps.append((aten.unsqueeze.default, (arg, 1)))
        given[place] = Result(len(steps) - 1)
    if mask is not None and mask.meta["val"].dim() == 3:
        steps.append((aten.unsqueeze.default, (given[3], 1)))
        given[3] = Result(len(steps) - 1)
    steps.append((aten.scaled_dot_product_attention.default, tuple(given)))
    return [*steps, (aten.squeeze.dim, (PREVIOUS, 1))]


def _one_head_for_all(steps: Steps, given: list[Any]) -> Steps:
    """One head of keys that all queries share, once for each: torch.onnx takes equal numbers."""
    heads, *others = (arg.meta["val"].shape[1] for arg in given[:3])
    if any(type(size) is not int for size in (heads, *others)) or others != [1, 1] or heads == 1:
        return []
    expanded: Steps = [(aten.expand.default, (arg, [-1, heads, -1, -1])) for arg in given[1:3]]
    given[1:3] = [Result(len(steps)), Result(len(steps) + 1)]
    return expanded


def without_groups(target: Any, args: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options of an operator, without heads in groups where each query has keys of its own.

    torch.onnx takes ``enable_gqa`` for fewer heads of keys only.

    Args:
        target: The operator.
        args: Its operands.
        options: Its keyword arguments.
    """
    if target is not aten.scaled_dot_product_attention.default or not options.get("enable_gqa"):
        return options
    heads, *others = (arg.meta["val"].shape[-3] for arg in args[:3])
    if any(type(size) is not int or size != heads for size in others):
        return options
    return {name: value for name, value in options.items() if name != "enable_gqa"}


def _step(offsets: Any) -> int | None:
    """The size K of the bags, where their offsets are 0, K, 2K and so on."""
    if not isinstance(offsets, fx.Node) or offsets.target not in _ARANGES:
        return None
    start = offsets.args[0] if len(offsets.args) > 1 else 0
    step = offsets.args[2] if len(offsets.args) > 2 else 1
    return step if start == 0 and isinstance(step, int) and step > 0 else None


def _power(args: Any) -> Steps | None:
    """A size as exponent as a tensor."""
    if not isinstance(args[1], fx.Node):
        return None
    return [(aten.scalar_tensor.default, (args[1],)), (aten.pow.Tensor_Tensor, (args[0], PREVIOUS))]


def _roll(args: Any) -> Steps | None:
    """A roll by a size as a look-up of rows; torch.onnx takes numbers only."""
    tensor, shifts, dims = (*args, [])[:3]
    if len(shifts) != 1 or len(dims) != 1 or not isinstance(shifts[0], fx.Node):
        return None
    length = tensor.meta["val"].shape[dims[0]]
    if not isinstance(length, int):
        return None
    return [
        (operator.sub, (0, shifts[0])),
        (operator.sub, (length, shifts[0])),
        (aten.arange.start, (Result(0), Result(1))),
        (aten.remainder.Scalar, (PREVIOUS, length)),
        (aten.index_select.default, (tensor, dims[0], PREVIOUS)),
    ]


def _triangle(triangle: Any) -> Callable[[Any], Steps | None]:
    """A triangle of small integers as one of 64 bits: ONNX Runtime has no other kernel."""

    def simpler(args: Any) -> Steps | None:
        dtype = args[0].meta["val"].dtype
        if dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32):
            return None
        convert = torch.ops.prims.convert_element_type.default
        return [
            (convert, (args[0], torch.int64)),
            (triangle, (PREVIOUS, *args[1:])),
            (convert, (PREVIOUS, dtype)),
        ]

    return simpler


SIMPLER: dict[Any, Callable[[Any], Steps | None]] = {
    aten.hstack.default: _stack(2, 1),
    aten.vstack.default: _stack(2, 0),
    aten.dstack.default: _stack(3, 2),
    aten.embedding_bag.default: _embedding_bag,
    aten.pow.Tensor_Scalar: _power,
    aten.roll.default: _roll,
    aten.tril.default: _triangle(aten.tril.default),
    aten.triu.default: _triangle(aten.triu.default),
    aten.embedding_bag.padding_idx: _embedding_bag,
    aten.scaled_dot_product_attention.default: _attention,
}
