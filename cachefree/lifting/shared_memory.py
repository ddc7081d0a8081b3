"""Tensors of a model's state that share elements with others, so that a write to one is in both.

What is lifted stands in its place as a tensor of its own. Whatever else has a part of the memory
that was there sees no write to it: two such tensors of the state are refused, and so is a call that
uses another one.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from cachefree.errors import CaptureError, Refusal, SourceLine
from cachefree.lifting.buffers import DESCRIBES
from cachefree.sizes import user_line

__all__ = ["Apart", "overlap", "refuse_overlaps"]


def overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have an element of memory in common."""
    if _memory(one) != _memory(other) or not (one.numel() and other.numel()):
        return False
    if one.dtype != other.dtype:
        return True  # their elements begin at other places; nobody lays out a state like that
    (start, end), (first, last) = map(_extent, (one, other))
    if end <= first or last <= start:
        return False
    with _disable_current_modes():
        marks = torch.zeros(max(end, last), dtype=torch.bool, device="cpu")
        marks.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
        return bool(marks.as_strided(other.shape, other.stride(), other.storage_offset()).any())


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    start = int(tensor.storage_offset())
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return start, start + sum(int((size - 1) * step) for size, step in steps) + 1


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def refuse_overlaps(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuses tensors of the state that have elements in common.

    Args:
        tensors: By their names.

    Raises:
        CaptureError: two of them have.
    """
    for (name, one), (other_name, other) in itertools.combinations(tensors.items(), 2):
        if overlap(one, other):
            raise CaptureError(_shared(name, f"with {other_name!r}", None))


class Apart(TorchFunctionMode):
    """Refuses the use of a tensor that has elements in common with a part of the state.

    Args:
        state: What the model holds where the state is lifted from, by its names.
    """

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.state: dict[int, list[tuple[str, torch.Tensor]]] = {}
        for name, tensor in state.items():
            self.state.setdefault(_memory(tensor), []).append((name, tensor))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in DESCRIBES:
            for tensor in _tensors((args, kwargs)):
                for name, own in self.state.get(_memory(tensor), ()):
                    if overlap(tensor, own):
                        where = user_line(sys._getframe(1))
                        raise CaptureError(_shared(name, "with another one that it uses", where))
        return func(*args, **kwargs)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.layout is torch.strided:
            yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def _shared(name: str, other: str, where: SourceLine | None) -> Refusal:
    return Refusal(
        f"The model keeps state in {name!r}, which shares memory {other}.",
        why="A write to one of the two changes the other; in a graph each is a tensor of its own.",
        remedy="Keep them in tensors that share no elements, and read each by the name that it is "
        "written by.",
        where=where,
    )
