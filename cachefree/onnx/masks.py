"""Masks of attention that say the same of every token, or of every key.

torch repeats a mask along axes of size one; ONNX says that ``Attention`` does, and ONNX Runtime's
kernel refuses a mask whose rows are not as many as the queries.
"""

from __future__ import annotations

from typing import Any

__all__ = ["repeat_masks"]

_QUERY, _KEY, _MASK, _PAST_KEY = 0, 1, 3, 4


def repeat_masks(model: Any) -> None:
    """Repeats, in an ``onnx_ir.Model``, each mask for every query and key that it is about."""
    for node in list(model.graph):
        if node.op_type != "Attention" or node.domain not in ("", "ai.onnx"):
            continue
        if _input(node, _MASK) is not None and not _is_whole(node):
            _repeat(model.graph, node)


def _input(node: Any, place: int) -> Any:
    return node.inputs[place] if len(node.inputs) > place else None


def _size(value: Any, axis: int) -> Any:
    shape = value.shape
    return shape[axis] if shape is not None and len(shape) >= -axis else None


def _is_whole(node: Any) -> bool:
    """Whether the mask is known to have a row for each query, and a column for each key."""
    mask = node.inputs[_MASK]
    rows, columns = _size(mask, -2), _size(mask, -1)
    has_rows = rows is not None and rows == _size(node.inputs[_QUERY], -2)
    is_column = columns is None or (columns == 1 and _size(node.inputs[_KEY], -2) != 1)
    return has_rows and (not is_column or _input(node, _PAST_KEY) is not None)


def _repeat(graph: Any, node: Any) -> None:
    import onnx_ir

    rows = _length(node.inputs[_QUERY])
    made = [rows]
    if _input(node, _PAST_KEY) is None:
        columns = _length(node.inputs[_KEY])
    else:  # with a past inside, there are more keys than are given
        columns = onnx_ir.node("Constant", [], {"value_ints": [1]})
    shape = onnx_ir.node("Concat", [rows.outputs[0], columns.outputs[0]], {"axis": 0})
    repeated = onnx_ir.node("Expand", [node.inputs[_MASK], shape.outputs[0]])
    made += [columns, shape, repeated]
    graph.insert_before(node, made)
    node.replace_input_with(_MASK, repeated.outputs[0])


def _length(value: Any) -> Any:
    """The last but one size."""
    import onnx_ir

    return onnx_ir.node("Shape", [value], {"start": -2, "end": -1})
