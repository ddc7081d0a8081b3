"""Rotations of queries and keys whose angles are the same for every text of a batch.

torch.onnx fuses them into ``RotaryEmbedding``, which takes a batch of angles as large as that of
the texts, and does not repeat one.
"""

from __future__ import annotations

from typing import Any

__all__ = ["repeat_angles"]

_ANGLES = (1, 2)  # the places of the cosines and sines among the inputs


def repeat_angles(model: Any) -> None:
    """Repeats, in an ``onnx_ir.Model``, angles of a batch of one for every text."""
    for node in list(model.graph):
        if node.op_type != "RotaryEmbedding" or node.domain not in ("", "ai.onnx"):
            continue
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            continue  # angles by position, without a batch
        for place in _ANGLES:
            angles = node.inputs[place]
            if angles.shape is not None and _is_alike(angles.shape[0], node.inputs[0].shape):
                continue
            _repeat(model.graph, node, place)


def _is_alike(batch: Any, texts: Any) -> bool:
    return texts is not None and batch == texts[0]


def _repeat(graph: Any, node: Any, place: int) -> None:
    import onnx_ir

    angles = node.inputs[place]
    batch = onnx_ir.node("Shape", [node.inputs[0]], {"start": 0, "end": 1})
    rows = onnx_ir.node("Shape", [angles], {"start": 1})
    shape = onnx_ir.node("Concat", [batch.outputs[0], rows.outputs[0]], {"axis": 0})
    repeated = onnx_ir.node("Expand", [angles, shape.outputs[0]])
    graph.insert_before(node, [batch, rows, shape, repeated])
    node.replace_input_with(place, repeated.outputs[0])
