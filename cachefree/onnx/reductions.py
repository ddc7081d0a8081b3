"""Axes of reductions, counted from the front.

ONNX Runtime's kernels count an axis from the front before they ask whether the input has elements:
of an input without any they return its own shape where the axis is negative.
"""

from __future__ import annotations

from typing import Any

__all__ = ["axes_from_front"]

_ALONG_ONE = ("ArgMax", "ArgMin")


def axes_from_front(model: Any) -> None:
    """Writes every reduction's constant axes as numbers from 0, where the rank is known.

    Args:
        model: An ``onnx_ir.Model``, changed in place.
    """
    import onnx_ir

    for node in list(onnx_ir.traversal.RecursiveGraphIterator(model.graph)):
        is_reduction = node.op_type.startswith("Reduce") or node.op_type in _ALONG_ONE
        source, graph = (node.inputs[0] if node.inputs else None), node.graph
        if node.domain or not is_reduction or source is None or source.shape is None:
            continue
        assert graph is not None, "it was found in one"
        rank = len(source.shape)
        for name in {"axis", "axes"} & set(node.attributes):
            value = node.attributes[name].value
            front = value % rank if isinstance(value, int) else [axis % rank for axis in value]
            node.attributes[name] = onnx_ir.convenience.convert_attribute(name, front)
        axes = node.inputs[1] if len(node.inputs) > 1 else None
        known = None if axes is None else onnx_ir.convenience.get_const_tensor(axes)
        if known is None or not (known.numpy() < 0).any():
            continue
        tensor = onnx_ir.tensor(known.numpy() % rank)
        constant = onnx_ir.node("Constant", [], attributes={"value": tensor})
        constant.outputs[0].name = f"{node.outputs[0].name}_axes"
        graph.insert_before(node, constant)
        node.replace_input_with(1, constant.outputs[0])
