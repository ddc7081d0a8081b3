"""Tensors of fixed size that calls write to at any position: a state that starts as zeros."""

from __future__ import annotations

from torch import nn

from cachefree.errors import CaptureError, Refusal
from cachefree.lifting.contents import lookup
from cachefree.lifting.finding import Lifting
from cachefree.lifting.plan import Slot
from cachefree.lifting.roots import roots_of

__all__ = ["refuse_unknown_start"]


def refuse_unknown_start(lifting: Lifting) -> None:
    """Refuses tensors that are written in place and start otherwise, or at a number in Python.

    Raises:
        CaptureError: there are such.
    """
    slots = [slot for slot in lifting.model.plan.slots if slot.kind == "whole"]
    if slots and lifting.counts:
        raise CaptureError(
            Refusal(
                f"The argument {lifting.counts[0]!r} counts in Python, and no tensor's size tells "
                "it.",
                why="A graph takes tensors; a number that changes from call to call would be "
                "frozen.",
                remedy="Pass the positions as a tensor; or write the buffer by slices, "
                "buffer[:batch, start : start + n].",
            )
        )
    roots = roots_of(lifting.model.model)
    for slot in slots:
        _refuse_used(slot, roots)


def _refuse_used(slot: Slot, roots: dict[str, nn.Module]) -> None:
    tensor = lookup(roots[slot.place.root], slot.place.steps)
    if not tensor.is_meta and bool(tensor.any()):
        raise CaptureError(
            Refusal(
                f"The tensor {slot.label!r}, which calls write to, does not start as zeros.",
                why="The first call starts from it; it may hold what an earlier call wrote.",
                remedy="Reset the model before it is rewritten.",
            )
        )
