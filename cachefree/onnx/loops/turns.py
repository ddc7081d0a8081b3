"""The calls of the decoder that a loop makes, and how many of them are inside the domain."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cachefree.errors import DomainError
from cachefree.onnx.domain import check_domain, concrete, read_sizes
from cachefree.onnx.metadata import FileDescription
from cachefree.onnx.roles import is_mask
from cachefree.spec import InputSpec, Interface

__all__ = ["turns_inside"]


def turns_inside(
    description: FileDescription, rows: int, prompt: int, most: int
) -> tuple[int, DomainError | None]:
    """How many of a generation's calls, from the first one on, are inside the domain.

    Args:
        description: What the file says of the decoder.
        rows: R: batch times beams.
        prompt: Tokens of the prompt.
        most: How many calls there may be.

    Returns:
        Their number, and why the next one is outside; None where all are inside.
    """
    interface = description.interface
    if not any(c for region in interface.domain.regions for c in region.conditions if _asks(c)):
        return most, None
    nothing = {**dict.fromkeys(interface.symbols, 0), "batch": rows, "query": prompt}
    cache = {slot.past.name: concrete(slot.past.shape, nothing) for slot in interface.cache}
    for turn in range(most):
        total, new = prompt + turn, 1 if turn else prompt
        tensors = {
            spec.name: _empty(spec, cache.get(spec.name) or _shape(spec, rows, total, new))
            for spec in interface.inputs
        }
        try:
            sizes = _sizes(interface, tensors, is_first=not turn)
        except DomainError as error:
            return turn, error
        cache = {s.past.name: concrete(s.present.shape, sizes) for s in interface.cache}
    return most, None


def _asks(condition: object) -> bool:
    return not getattr(condition, "is_implied", False)


def _sizes(
    interface: Interface, tensors: Mapping[str, torch.Tensor], *, is_first: bool
) -> dict[str, int]:
    sizes = read_sizes(interface, tensors)
    check_domain(interface, sizes, is_first=is_first)
    return sizes


def _shape(spec: InputSpec, rows: int, total: int, new: int) -> tuple[int, ...]:
    return (rows, total if is_mask(spec) else new)


def _empty(spec: InputSpec, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(shape, dtype=spec.dtype, device="meta")
