"""What is done to the scores as one tensor that is added to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

from cachefree.onnx.attention.chain import MaskStep, NoSiteError
from cachefree.onnx.attention.site import Site
from cachefree.onnx.attention.values import Shapes, SizeNodes
from cachefree.onnx.simpler import LEAST

__all__ = [
    "check_fills",
    "lowest_kept",
    "mask_of",
    "with_blank_rows",
    "without_blank_rows",
]

aten = torch.ops.aten
_HIDES = -1e9


def check_fills(site: Site, dtype: torch.dtype) -> None:
    """Refuses numbers among the scores that may not hide a key, or that hide it only just.

    ``where(hidden, c, x)`` is written as ``x + where(hidden, c, 0)``. The two are one where c is
    negative infinity or so low that x is lost in it. A number that hides a key, but in which x is
    not lost, is written as `LEAST` where nothing is done to it afterwards: alone in a row, it
    weighs all keys alike, and so does `LEAST`.

    Raises:
        NoSiteError: a number is neither.
    """
    for place, step in enumerate(site.steps):
        if step.kind not in ("fill", "keep", "floor") or step.number == -math.inf:
            continue
        later = site.steps[place + 1 :]
        factor = math.prod(other.number for other in later if other.kind == "scale")
        is_lost = step.number * min(factor, 1.0) <= LEAST
        is_last = step.kind != "floor" and all(o.kind in ("fill", "keep") for o in later)
        hides = is_lost or (step.number <= _HIDES and is_last)
        if not hides or dtype != torch.float32:
            raise NoSiteError(f"it puts {step.number} among scores of {dtype}")


def mask_of(
    site: Site, graph: fx.Graph, sizes: SizeNodes, shapes: Shapes, dtype: torch.dtype
) -> fx.Node | None:
    """Writes the mask, which broadcasts to (B, H, S, T); None where nothing is done to the scores.

    The nodes are written at the graph's current point of insertion.
    """
    mask: fx.Node | None = None

    def number(value: float) -> fx.Node:
        return graph.call_function(aten.scalar_tensor.default, (value,), {"dtype": dtype})

    for step in site.steps:
        if step.kind == "triangle":
            mask = _triangle(site, graph, sizes, shapes, dtype)
        elif step.kind == "floor":
            mask = (
                mask
                if mask is None
                else graph.call_function(aten.clamp_min.default, (mask, step.number))
            )
        elif step.kind == "scale":
            mask = graph.call_function(aten.mul.Tensor, (mask, step.number))
        else:
            operand = _in_four(step, graph, sizes, shapes, site.heads)
            if step.kind in ("fill", "keep"):
                kept = mask if mask is not None else number(0.0)
                is_between = step.number > LEAST
                pair = (number(LEAST if is_between else step.number), kept)
                pair = pair if step.kind == "fill" else pair[::-1]
                mask = graph.call_function(aten.where.self, (operand, *pair))
            elif mask is None:
                is_added = step.kind == "add"
                mask = operand if is_added else graph.call_function(aten.neg.default, (operand,))
            else:
                target = aten.add.Tensor if step.kind == "add" else aten.sub.Tensor
                mask = graph.call_function(target, (mask, operand))
    return mask


def lowest_kept(graph: fx.Graph, mask: fx.Node) -> fx.Node:
    """The mask with nothing lower than `LEAST` but negative infinity."""
    is_none = graph.call_function(aten.eq.Scalar, (mask, -math.inf))
    raised = graph.call_function(aten.clamp_min.default, (mask, LEAST))
    return graph.call_function(aten.where.self, (is_none, mask, raised))


def without_blank_rows(
    graph: fx.Graph, mask: fx.Node, dtype: torch.dtype
) -> tuple[fx.Node, fx.Node]:
    """A mask in which a row that hides all keys hides none, and which rows these are.

    What a kernel makes of such a row depends on the kernel; `with_blank_rows` puts there what is
    due.
    """
    best = graph.call_function(aten.amax.default, (mask, [-1], True))
    is_blank = graph.call_function(aten.eq.Scalar, (best, -math.inf))
    nothing = graph.call_function(aten.scalar_tensor.default, (0.0,), {"dtype": dtype})
    return graph.call_function(aten.where.self, (is_blank, nothing, mask)), is_blank


def with_blank_rows(
    graph: fx.Graph, is_blank: fx.Node, result: fx.Node, dtype: torch.dtype, *, is_safe: bool
) -> fx.Node:
    """The result with what is due in rows that see nothing.

    Torch's own attention gives zeros there, and a softmax NaN.
    """
    due = 0.0 if is_safe else math.nan
    nothing = graph.call_function(aten.scalar_tensor.default, (due,), {"dtype": dtype})
    return graph.call_function(aten.where.self, (is_blank, nothing, result))


def _triangle(
    site: Site, graph: fx.Graph, sizes: SizeNodes, shapes: Shapes, dtype: torch.dtype
) -> fx.Node:
    """Row i sees keys up to i, whatever is past: so torch means ``is_causal``."""
    call = graph.call_function
    rows = sizes.node(shapes.of(site.query)[-2])
    keys = sizes.node(site.keys.slot.present.shape[site.keys.slot.growing_axes[0]])
    row = call(aten.unsqueeze.default, (call(aten.arange.default, (rows,)), 1))
    key = call(aten.unsqueeze.default, (call(aten.arange.default, (keys,)), 0))
    scalars = [
        call(aten.scalar_tensor.default, (value,), {"dtype": dtype}) for value in (0.0, -math.inf)
    ]
    return call(aten.where.self, (call(aten.ge.Tensor, (row, key)), *scalars))


def _in_four(
    step: MaskStep, graph: fx.Graph, sizes: SizeNodes, shapes: Shapes, heads: int
) -> fx.Node:
    """A tensor that broadcasts to the scores, as one that broadcasts to (B, H, S, T)."""
    assert step.node is not None
    shape = shapes.of(step.node)
    own, tail = shape[:-2], shape[-2:]
    if len(step.lead) == 2 or all(size == 1 for size in own):
        return step.node if len(shape) <= 4 else _reshaped(graph, sizes, step.node, (1, 1, *tail))
    if len(step.lead) == 1:
        batch = sympy.cancel(step.lead[0] / heads)
        return _reshaped(graph, sizes, step.node, (batch, heads, *tail))
    padded = (*[sympy.Integer(1)] * (len(step.lead) - len(own)), *own)
    if all(size == 1 for size in padded[1:]):
        return _reshaped(graph, sizes, step.node, (padded[0], 1, *tail))
    whole = [sizes.node(size) for size in (padded[0], *step.lead[1:], *tail)]
    wide = graph.call_function(aten.expand.default, (step.node, whole))
    return _reshaped(graph, sizes, wide, (padded[0], heads, *tail))


def _reshaped(graph: fx.Graph, sizes: SizeNodes, node: fx.Node, shape: Sequence[Any]) -> fx.Node:
    written = [sizes.node(size) for size in shape]
    return graph.call_function(aten.reshape.default, (node, written))
