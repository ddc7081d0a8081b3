"""ONNX's attention operators as nodes of a torch.fx graph."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from cachefree.errors import CacheFreeError, Refusal

__all__ = ["ELEMENT_TYPES", "onnx_node"]

ELEMENT_TYPES = {  # onnx.TensorProto.DataType
    torch.float32: 1, torch.uint8: 2, torch.int8: 3, torch.int16: 5, torch.int32: 6,
    torch.int64: 7, torch.bool: 9, torch.float16: 10, torch.float64: 11, torch.bfloat16: 16,
}  # fmt: skip


def onnx_node(
    graph: fx.Graph,
    name: str,
    inputs: Sequence[fx.Node | None],
    results: Sequence[tuple[torch.dtype, Sequence[Any]]],
    attributes: Mapping[str, float | int],
    domain: str = "",
) -> list[fx.Node]:
    """Writes an operator of ONNX into a graph.

    Args:
        graph: The graph, at its point of insertion.
        name: The operator.
        inputs: Its inputs; None for one that is left out.
        results: The dtype and the sizes (nodes or numbers) of each output.
        attributes: Its attributes.
        domain: Its domain.

    Returns:
        A node an output.

    Raises:
        CacheFreeError: this torch has no operators of ONNX.
    """
    try:
        from torch.onnx.ops._symbolic_impl import EncodedAttrs
    except ImportError as error:
        raise CacheFreeError(
            Refusal(
                "This torch cannot write operators of ONNX by name.",
                why=str(error),
                remedy='Use torch 2.8 or newer, or kv="concat".',
            )
        ) from error
    encoded = EncodedAttrs.from_dict(dict(attributes))
    several = graph.call_function(
        torch.ops.onnx_symbolic._symbolic_multi_out.default,
        (list(inputs), name, [ELEMENT_TYPES[dtype] for dtype, _ in results]),
        {
            "shapes": [list(shape) for _, shape in results],
            "attr_keys": encoded.attr_keys,
            "attr_types": encoded.attr_types,
            "attr_pos": encoded.attr_pos,
            "attr_ints": encoded.attr_ints,
            "attr_floats": encoded.attr_floats,
            "attr_strs": encoded.attr_strs,
            "metadata_props_keys": [],
            "metadata_props_values": [],
            "domain": domain,
            "version": 1 if domain else None,
        },
    )
    return [
        graph.call_function(operator.getitem, (several, place)) for place in range(len(results))
    ]
