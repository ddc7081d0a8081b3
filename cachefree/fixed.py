"""Tensors in a result that are constants of the model's code, the same from call to call.

A cache may hold a number of its own configuration as a tensor. It is no state: it is neither an
input nor an output of a graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from cachefree.errors import CaptureError, Refusal
from cachefree.structure import leaf_paths

__all__ = ["constants_of", "without_fixed"]

aten = torch.ops.aten
_HANDS_ON = (
    aten.lift_fresh_copy,
    aten.lift_fresh,
    aten.detach,
    aten.detach_,
    aten.clone,
    aten.alias,
    aten.to,
)


def constants_of(captured: Any) -> dict[str, torch.Tensor]:
    """The path in the result → the tensor, for tensors that the code made from numbers alone.

    Args:
        captured: A captured path.
    """
    found = {}
    for path, node in _output_nodes(captured).items():
        value = _constant(node, captured.attributes)
        if value is not None:
            found[path] = value
    return found


def without_fixed(captured: Any, fixed: frozenset[str]) -> Any:
    """The path with such tensors as constants of its result rather than as outputs.

    Raises:
        CaptureError: one of them is computed here.
    """
    nodes, constants = _output_nodes(captured), constants_of(captured)
    computed = fixed - constants.keys()
    if computed:
        raise CaptureError(
            Refusal(
                f"The result{min(computed)} is a constant of the code on some calls only.",
                why="One graph has one list of outputs.",
                remedy="Compute it on every call, or leave it out of the cache.",
            )
        )
    output = next(node for node in captured.graph.nodes if node.op == "output")
    output.args = (tuple(node for path, node in nodes.items() if path not in fixed),)
    paths = leaf_paths(captured.outputs)
    places = {place: constants[path] for place, path in enumerate(paths) if path in fixed}
    return replace(
        captured,
        call=replace(captured.call, fixed=fixed),
        outputs=captured.outputs.with_constants(places),
        output_leaves=tuple(leaf for leaf in captured.output_leaves if leaf.path not in fixed),
    )


def _output_nodes(captured: Any) -> dict[str, Any]:
    output = next(node for node in captured.graph.nodes if node.op == "output")
    return dict(zip((leaf.path for leaf in captured.tensors), output.args[0], strict=True))


def _constant(node: Any, attributes: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    result = node.meta.get("val") if isinstance(node, fx.Node) else None
    while getattr(node, "op", "") == "call_function" and (
        getattr(node.target, "overloadpacket", None) in _HANDS_ON
    ):
        node = node.args[0]
    if getattr(node, "op", "") != "get_attr" or result is None:
        return None
    found = attributes[str(node.target)]
    is_same = found.dtype == result.dtype and found.device == result.device
    return found if is_same and not isinstance(found, torch.nn.Parameter) else None
