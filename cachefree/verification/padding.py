"""Positions that a padding mask drops, for which runtimes differ and which nobody reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cachefree.sizes import size_symbol
from cachefree.spec import Interface
from cachefree.verification.values import kept_positions

__all__ = ["without_dropped"]

_QUERY = size_symbol("query")
Outputs = list[torch.Tensor]


def without_dropped(
    interface: Interface,
    actual: Outputs,
    expected: Outputs,
    tensors: Mapping[str, torch.Tensor],
    new: int,
) -> Outputs:
    """The outputs, with what is expected at positions that a mask drops.

    A dropped token that sees nothing attends to nothing: torch gives zeros there, others a mean or
    ``nan``.

    Args:
        interface: Of the graph.
        actual: What came out.
        expected: What the original gives.
        tensors: The inputs by name.
        new: The new tokens of the call.
    """
    for spec in interface.inputs:
        kept = None if spec.is_cache else kept_positions(spec, tensors[spec.name])
        if kept is None or bool(kept.all()):
            continue
        for index, output in enumerate(interface.outputs):
            aligned = _aligned(kept, spec.shape, output.shape, new)
            if aligned is not None and actual[index].shape == expected[index].shape:
                replaced = torch.where(aligned, actual[index], expected[index])
                actual = [*actual[:index], replaced, *actual[index + 1 :]]
    return actual


def _aligned(
    kept: torch.Tensor, mask_shape: tuple[Any, ...], shape: tuple[Any, ...], new: int
) -> torch.Tensor | None:
    """A (batch, past + query) mask along the same axes of another tensor.

    None where that has no such axes.
    """
    batch, length = mask_shape
    lengths = [axis for axis, size in enumerate(shape) if size in (length, _QUERY)]
    if batch not in shape or len(lengths) != 1:
        return None
    rows, axis = shape.index(batch), lengths[0]
    if shape[axis] == _QUERY:
        kept = kept[:, kept.shape[1] - new :]
    view = [1] * len(shape)
    view[rows], view[axis] = kept.shape[0], kept.shape[1]
    return (kept if rows < axis else kept.T).reshape(view)
