"""Operators in the forms that attention is looked for in; what they compute stays the same."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx

from cachefree.onnx.attention.values import Shapes, SizeNodes

__all__ = ["CASTS", "DROPOUT", "RESHAPES", "SOFTMAX", "follows_softmax", "prepare"]

aten = torch.ops.aten
_CONSTANTS: dict[Any, Any] = {
    aten.new_ones.default: aten.ones.default, aten.new_zeros.default: aten.zeros.default,
    aten.ones_like.default: aten.ones.default, aten.zeros_like.default: aten.zeros.default,
    aten.new_full.default: aten.full.default, aten.full_like.default: aten.full.default,
}  # fmt: skip

RESHAPES = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.contiguous.default, aten.clone.default, aten.alias.default,
    aten.detach.default, aten.flatten.using_ints, aten.unflatten.int,
}  # fmt: skip
CASTS = {
    aten.to.dtype, aten._to_copy.default, aten.type_as.default, aten.to.device, aten.to.other,
    aten.to.dtype_layout,
}  # fmt: skip
SOFTMAX = {aten.softmax.int, aten._softmax.default}
DROPOUT = {aten.dropout.default}


def follows_softmax(node: Any) -> bool:
    """Whether a tensor is the weights of an attention."""
    while isinstance(node, fx.Node) and node.target in RESHAPES | CASTS | DROPOUT:
        node = node.args[0]
    return isinstance(node, fx.Node) and node.target in SOFTMAX


def prepare(graph: fx.Graph, shapes: Shapes, sizes: SizeNodes) -> None:
    """Writes constants without the tensor whose shape or type they have, and sums as products."""
    for node in list(graph.nodes):
        with graph.inserting_before(node):
            new = _constant(node, shapes, sizes) or _cast(node, shapes) or _product(node)
        if new is not None:
            node.replace_all_uses_with(new)
            graph.erase_node(node)


def _constant(node: fx.Node, shapes: Shapes, sizes: SizeNodes) -> fx.Node | None:
    """A constant in the shape of a tensor, from the sizes themselves: nothing is read then."""
    made = _CONSTANTS.get(node.target)
    if made is None:
        return None
    try:
        shape = [sizes.node(size) for size in shapes.of(node)]
    except ValueError:
        return None
    fill = (node.args[-1],) if made is aten.full.default else ()
    options = {"dtype": shapes.dtype(node), "device": shapes.value(node).device}
    return node.graph.call_function(made, (shape, *fill), options)


def _cast(node: fx.Node, shapes: Shapes) -> fx.Node | None:
    """A cast to the type of a tensor, without the tensor."""
    if node.target is not aten.type_as.default:
        return None
    return node.graph.call_function(aten.to.dtype, (node.args[0], shapes.dtype(node)))


def _product(node: fx.Node) -> fx.Node | None:
    """``einsum`` of two operands over one axis as ``matmul`` of permuted ones.

    The axes are ``lead, row, summed`` and ``lead, summed, column``; a leading axis that an operand
    does not have is one of size 1 there.
    """
    if node.target is not aten.einsum.default or len(node.args[1]) != 2:  # type: ignore[arg-type]
        return None
    equation = str(node.args[0]).replace(" ", "")
    if "->" not in equation or "." in equation:
        return None
    left, result = equation.split("->")
    one, other = left.split(",")
    if any(max(Counter(labels).values(), default=1) > 1 for labels in (one, other, result)):
        return None
    summed = [label for label in one if label in other and label not in result]
    rows = [label for label in one if label not in other and label in result]
    columns = [label for label in other if label not in one and label in result]
    if len(summed) != 1 or not rows or not columns or set(one + other) - set(result) != {*summed}:
        return None
    given: Any = node.args[1]
    are_weights = follows_softmax(given[0])
    row = result[-2] if result[-2] in rows and not are_weights else rows[-1]
    column = result[-1] if result[-1] in columns else columns[-1]
    order = one + other if are_weights else result  # weights stay as they are
    lead = "".join(dict.fromkeys(label for label in order if label not in (row, column, summed[0])))
    first = _turned(node.graph, given[0], one, lead + row + summed[0])
    second = _turned(node.graph, given[1], other, lead + summed[0] + column)
    product = node.graph.call_function(aten.matmul.default, (first, second))
    return _turned(node.graph, product, lead + row + column, result)


def _turned(graph: fx.Graph, node: fx.Node, have: str, want: str) -> fx.Node:
    """A tensor with its axes in another order, and axes of size 1 where it has none."""
    order = [have.index(label) for label in want if label in have]
    if order != list(range(len(order))):
        node = graph.call_function(aten.permute.default, (node, order))
    for place, label in enumerate(want):
        if label not in have:
            node = graph.call_function(aten.unsqueeze.default, (node, place))
    return node
