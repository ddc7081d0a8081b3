"""An operand of an attention traced back, through views, to the join that it reads.

A view moves elements and computes none. So where an operand is a chain of views of a join, which
element stands where depends on sizes alone; it is compared with what attention expects, element by
element, at sizes from 0 and 1 on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from cachefree.onnx.attention.layout import Layout, layouts
from cachefree.onnx.attention.values import evaluate
from cachefree.spec import CacheSlot, Interface

__all__ = ["Join", "Operand", "layout_of", "traced"]

aten = torch.ops.aten
_VIEWS = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int,
    aten.permute.default, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default,
    aten.repeat_interleave.self_int, aten.flatten.using_ints, aten.unflatten.int, aten.t.default,
    aten.mT.default, aten.numpy_T.default, aten.movedim.int, aten.swapaxes.default,
    aten.swapdims.default, aten.view_as.default, aten.repeat.default,
}  # fmt: skip
_SCALINGS = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}
_EXTREMES = ("sym_max", "sym_min", "floordiv", "mod")
_COUNTS = {"batch": (1, 2, 3), "query": (1, 2), "past": (0, 1, 3)}


@dataclass(frozen=True)
class Join:
    """``present = cat([past, new])``, a slot of the cache.

    Attributes:
        slot: The slot.
        node: The join.
        past: The placeholder of what is past.
        new: What is joined to it.
        place: The slot's place among the interface's slots.
    """

    slot: CacheSlot
    node: fx.Node
    past: fx.Node
    new: fx.Node
    place: int


@dataclass(frozen=True)
class Operand:
    """An operand of a product that is a view of a join, perhaps multiplied by a number.

    Attributes:
        join: The join.
        node: The operand.
        factor: The number.
        scalings: The nodes that multiply.
    """

    join: Join
    node: fx.Node
    factor: float
    scalings: tuple[fx.Node, ...]


def traced(node: Any, joins: Mapping[fx.Node, Join]) -> Operand | None:
    """What an operand reads; None where it is no view of a join."""
    operand, factor, scalings = node, 1.0, []
    while isinstance(node, fx.Node) and node not in joins:
        if node.op != "call_function":
            return None
        if node.target in _VIEWS and _is_affine(node):
            node = node.args[0]
        elif node.target in _SCALINGS and isinstance(node.args[1], (int, float)):
            number = float(node.args[1])
            factor *= number if "mul" in str(node.target) else 1 / number
            scalings.append(node)
            node = node.args[0]
        else:
            return None
    if not isinstance(node, fx.Node):
        return None
    return Operand(joins[node], operand, factor, tuple(scalings))


def _is_affine(node: fx.Node) -> bool:
    """Whether the sizes of a view are sums and products of sizes."""
    pending = [*node.args[1:], *node.kwargs.values()]
    while pending:
        arg = pending.pop()
        if isinstance(arg, (tuple, list)):
            pending.extend(arg)
        elif isinstance(arg, fx.Node):
            if any(name in str(arg.target).lower() for name in _EXTREMES):
                return False
            if arg.op == "call_function":
                pending.extend(arg.args)
    return True


def layout_of(
    operand: Operand,
    interface: Interface,
    heads: int,
    *,
    is_transposed: bool,
    lead: tuple[Any, ...] | None = None,
) -> Layout | None:
    """How the join lies where the operand is what attention of ``heads`` heads expects.

    That is the element ``join[b, h // (H / K), t, d]`` for each b, h, t and d.

    Args:
        operand: The keys' or the values' operand.
        interface: The inputs of the graph.
        heads: H, the heads that the operand should have once it is broadcast.
        is_transposed: Whether the operand has the head's size before the rows.
        lead: The leading sizes to broadcast to.

    Returns:
        The layout; None where there is none.
    """
    for layout in layouts(operand.join.slot):
        if heads % layout.heads == 0 and all(
            _fits(operand, layout, interface, sizes, heads, is_transposed, lead)
            for sizes in _sizes(interface)
        ):
            return layout
    return None


def _sizes(interface: Interface) -> Iterator[dict[str, int]]:
    counts = [_COUNTS.get(name, (0, 2) if "past" in name else (3,)) for name in interface.symbols]
    for numbers in itertools.product(*counts):
        yield dict(zip(interface.symbols, numbers, strict=True))


def _fits(
    operand: Operand,
    layout: Layout,
    interface: Interface,
    sizes: Mapping[str, int],
    heads: int,
    is_transposed: bool,
    lead: tuple[Any, ...] | None,
) -> bool:
    shape = [
        int(sympy.sympify(size).subs({s: sizes[str(s)] for s in sympy.sympify(size).free_symbols}))
        for size in operand.join.slot.present.shape
    ]
    numbers = torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape)
    given = {operand.join.node: numbers}
    try:
        # a number that multiplies is left out: what is multiplied stands in its place
        for node in reversed(operand.scalings):
            given[node] = evaluate(node.args[0], interface, sizes, given)  # type: ignore[arg-type]
        found = evaluate(operand.node, interface, sizes, given)
    except (ValueError, RuntimeError, IndexError):
        return False
    if is_transposed:
        found = found.mT
    expected = layout.heads_first(numbers)
    expected = expected.repeat_interleave(heads // layout.heads, 1)
    if lead is not None:
        counts = [int(size.subs({s: sizes[str(s)] for s in size.free_symbols})) for size in lead]
        found = found.expand(*counts, *found.shape[-2:])
    if found.numel() != expected.numel() or found.shape[-2:] != expected.shape[-2:]:
        return False
    return torch.equal(found.reshape(expected.shape), expected)
