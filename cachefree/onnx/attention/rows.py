"""Whether the rows of a batch have nothing to do with one another.

Where a kernel refuses several rows at once, they can be run one by one only if a row of every
result is made of the same row of every input, and of nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx

from cachefree.onnx.attention.values import Shapes, evaluate
from cachefree.sizes import size_symbol
from cachefree.spec import Interface

__all__ = ["rows_are_apart"]

aten = torch.ops.aten
_BATCH = size_symbol("batch")
_MOVES = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int,
    aten.permute.default, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default,
    aten.repeat_interleave.self_int, aten.slice.Tensor, aten.select.int, aten.split.Tensor,
    aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.flatten.using_ints,
    aten.unflatten.int, aten.narrow.default, aten.cat.default, aten.stack.default, aten.t.default,
    aten.constant_pad_nd.default, aten.pad.default, aten.repeat.default, aten.movedim.int,
    aten.squeeze.default, aten.flip.default, aten.roll.default, aten.mT.default,
}  # fmt: skip
_FILLS = {
    aten.full.default, aten.ones.default, aten.zeros.default, aten.new_ones.default,
    aten.new_zeros.default, aten.new_full.default, aten.ones_like.default, aten.full_like.default,
    aten.zeros_like.default,
}  # fmt: skip
_ALONG = {
    aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten.sum.dim_IntList,
    aten.mean.dim, aten.amax.default, aten.amin.default, aten.cumsum.default, aten.argmax.default,
    aten.any.dim, aten.all.dim, aten.max.dim, aten.min.dim, aten.topk.default, aten.var.correction,
    aten.logsumexp.default, aten.sort.default,
}  # fmt: skip
_POINTWISE = {
    aten.__and__.Tensor, aten.__or__.Tensor, aten.__xor__.Tensor, aten.max.other, aten.min.other,
    aten.__and__.Scalar, aten.__or__.Scalar,
}  # fmt: skip
_SAME = {
    aten.dropout.default, aten.to.dtype, aten._to_copy.default, aten.type_as.default,
    aten.to.device, aten.to.other, aten.to.dtype_layout, aten.glu.default,
}  # fmt: skip


def rows_are_apart(module: fx.GraphModule, interface: Interface, shapes: Shapes) -> bool:
    """Whether row b of each result is a function of row b of each input.

    Operators that are not known to keep rows apart are taken to mix them.
    """
    reader = _Rows(interface, shapes)
    try:
        return all(reader.keeps(node) for node in module.graph.nodes)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False


class _Rows:
    def __init__(self, interface: Interface, shapes: Shapes) -> None:
        self.interface = interface
        self.shapes = shapes

    def keeps(self, node: fx.Node) -> bool:
        """Whether a node keeps rows apart if its operands do."""
        if node.op in ("placeholder", "output", "get_attr"):
            return node.op != "placeholder" or self.axis(node) is not False
        values: Any = self.shapes.value(node)
        if not isinstance(values, (torch.Tensor, tuple, list)):
            return True  # a size; what it is used for is looked at there
        given = [other for other in node.all_input_nodes if self._is_tensor(other)]
        if node.target is aten.type_as.default:
            given = given[:1]  # of the other it takes the type
        if any(self.axis(other) is False for other in given):
            return False
        if node.target in _FILLS:
            return not any(_BATCH in sympy.sympify(self._sized(a)).free_symbols
                           for a in node.args[1:] if isinstance(a, fx.Node))  # fmt: skip
        has_rows = any(self.axis(other) is not None for other in given)
        if not has_rows:
            return not self._counts_rows(node)
        if not isinstance(values, torch.Tensor):
            is_one = isinstance(node.target, torch._ops.OpOverload)  # and no loop over tokens
            return node.target in _MOVES or (is_one and self._along(node))
        axis = self.axis(node)
        return isinstance(axis, int) and not isinstance(axis, bool) and self._known(node, axis)

    def axis(self, node: fx.Node) -> int | bool | None:
        """The axis of the rows; None where there are none, False where there are several axes."""
        value = self.shapes.value(node)
        if not isinstance(value, torch.Tensor):
            return None
        found = [
            place
            for place, size in enumerate(self.shapes.of(node))
            if _BATCH in sympy.sympify(size).free_symbols
        ]
        return None if not found else found[0] if len(found) == 1 else False

    def _is_tensor(self, node: fx.Node) -> bool:
        return isinstance(self.shapes.value(node), (torch.Tensor, tuple, list))

    def _sized(self, node: fx.Node) -> Any:
        value = self.shapes.value(node)
        return value.node.expr if isinstance(value, torch.SymInt) else 0

    def _counts_rows(self, node: fx.Node) -> bool:
        """Whether a tensor without rows knows how many rows there are."""
        return any(
            _BATCH in sympy.sympify(self._sized(other)).free_symbols
            for other in node.all_input_nodes
        )

    def _known(self, node: fx.Node, axis: int) -> bool:
        target: Any = node.target
        if target in _MOVES or str(target).endswith("getitem") or "getitem" in str(target):
            return self._moves(node)
        if self._counts_rows(node):
            return False
        if target in _SAME:
            return True
        if target in _ALONG:
            return self._along(node)
        if target in _POINTWISE or torch.Tag.pointwise in getattr(target, "tags", ()):
            return self._aligned(node, axis)
        return self._layer(node, target, axis)

    def _layer(self, node: fx.Node, target: Any, axis: int) -> bool:
        operands = [arg for arg in node.args if self.shapes.is_tensor(arg)]
        axes = [self.axis(arg) for arg in operands]  # type: ignore[arg-type]
        if target is aten.linear.default:
            return axes[1:].count(None) == len(axes) - 1 and axis < len(self.shapes.of(node)) - 1
        if target is aten.embedding.default:
            return axes[0] is None and axes[1] == axis
        if target in (aten.layer_norm.default, aten.rms_norm.default):
            return axes[1:].count(None) == len(axes) - 1 and (
                axis < len(self.shapes.of(node)) - len(node.args[1])  # type: ignore[arg-type]
            )
        if target is aten.scaled_dot_product_attention.default:
            return all(found in (None, 0) for found in axes) and axes[:3] == [0, 0, 0]
        if target in (aten.addmm.default, aten.baddbmm.default):
            operands = operands[1:]
            if axes[0] is not None and axes[0] != axis:
                return False
        elif target not in (aten.matmul.default, aten.bmm.default, aten.mm.default):
            return False
        return self._product(operands, node, axis)

    def _product(self, operands: list[Any], node: fx.Node, axis: int) -> bool:
        """A product whose summed axis is no axis of rows, and whose rows meet their own."""
        rank = len(self.shapes.of(node))
        for place, operand in enumerate(operands):
            own = self.axis(operand)
            size = len(self.shapes.of(operand))
            if own is None:
                continue
            if own == size - (1 if place == 0 else 2) or rank - size + own != axis:
                return False
            if own >= size - 2 and self.axis(operands[1 - place]) is not None:
                return False
        return True

    def _aligned(self, node: fx.Node, axis: int) -> bool:
        rank = len(self.shapes.of(node))
        return all(
            own is None or rank - len(self.shapes.of(other)) + own == axis
            for other in node.all_input_nodes
            if self.shapes.is_tensor(other)
            for own in [self.axis(other)]
        )

    def _along(self, node: fx.Node) -> bool:
        """An operator along axes other than that of the rows."""
        source: Any = node.args[0]
        own, rank = self.axis(source), len(self.shapes.of(source))
        names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        dims: Any = given.get("dim", given.get("dims", -1 if "dim" in names else None))
        if dims is None:
            return False
        dims = [dims] if isinstance(dims, int) else list(dims)
        return bool(dims) and all(dim % rank != own for dim in dims)

    def _moves(self, node: fx.Node) -> bool:
        """An operator that moves elements: each stays in its row."""
        source = node.args[0] if "getitem" in str(node.target) else node
        assert isinstance(source, fx.Node)
        operands = [other for other in source.all_input_nodes if self.shapes.is_tensor(other)]
        for batch, others in ((2, 2), (3, 1), (2, 3)):
            sizes = dict.fromkeys(self.interface.symbols, others) | {"batch": batch}
            given = {other: self._numbered(other, sizes) for other in operands}
            found = evaluate(node, self.interface, sizes, given)
            axis = self.axis(node)
            if not isinstance(axis, int):
                return False
            count = found.shape[axis]
            each = count // batch
            shape = [1] * found.dim()
            shape[axis] = count
            due = (torch.arange(count) // max(each, 1) + 1).reshape(shape)
            if not bool(((found == due) | (found == 0)).all()):
                return False
        return True

    def _numbered(self, node: fx.Node, sizes: Mapping[str, int]) -> torch.Tensor:
        """A tensor of this shape whose elements are the number of their row, from 1; 0 for none."""
        shape = [
            int(size.subs({symbol: sizes[str(symbol)] for symbol in size.free_symbols}))
            for size in self.shapes.of(node)
        ]
        axis = self.axis(node)
        if axis is None:
            return torch.zeros(shape, dtype=torch.int64)
        count = shape[axis]
        rows = torch.arange(count) // max(count // sizes["batch"], 1) + 1
        view = [1] * len(shape)
        view[axis] = count
        return rows.reshape(view).expand(shape).clone()
