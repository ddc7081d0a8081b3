"""Models whose whole state is a set of tensors of fixed size: every call takes it as it is.

Such a model has no first path: its first call is a later call from what the tensors hold at first.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from cachefree.capture import TensorSpec
from cachefree.dimensions import find_dimensions, resized
from cachefree.discover import Discovery, named_groups
from cachefree.errors import CaptureError, Refusal
from cachefree.example_sizes import capture_where_it_runs, hints_for
from cachefree.inputs import call_of
from cachefree.lifting.contents import lookup
from cachefree.lifting.finding import Lifting
from cachefree.lifting.plan import Slot
from cachefree.lifting.roots import roots_of
from cachefree.places import Link, Place
from cachefree.search import Found
from cachefree.sizes import size_symbol
from cachefree.structure import flatten

__all__ = ["discover_given", "is_given"]


def is_given(lifting: Lifting) -> bool:
    """Whether the state is tensors that are written in place, from the first call on."""
    return any(slot.kind == "whole" for slot in lifting.model.plan.slots)


def discover_given(lifting: Lifting) -> Discovery:
    """How the model is called: with its state, always.

    Raises:
        CaptureError: a part of the state is no tensor that starts as zeros, or an argument counts
            in Python.
    """
    model, first = lifting.model, lifting.first
    slots = model.plan.slots
    others = [slot for slot in slots if slot.kind != "whole"]
    if others or len(model.methods) > 1:
        raise CaptureError(
            Refusal(
                f"The model keeps tensors of fixed size ({slots[0].label}) and more: "
                f"{', '.join(slot.label for slot in others[:3]) or model.methods}.",
                why="What is written in place at any position has no first path of its own.",
                remedy="Pass the cache in and return it, as an argument of forward.",
            )
        )
    _refuse_counts(lifting)
    roots = roots_of(model.model)
    state = {slot.label: _initial(slot, roots) for slot in slots}
    names = dict(enumerate(inspect.signature(model.forward).parameters))
    kwargs = {**first.kwargs, model.plan.state: state}
    call, groups = find_dimensions(model, call_of(first.args, kwargs, names))
    place = Place(model.plan.state)
    own = {at for at, leaf in enumerate(call.leaves) if leaf.path.startswith(f"{place.parameter}[")}
    groups = [group for group in groups if not any(at in own for at, _ in group)]
    query = min(groups, key=lambda group: min(axis for _, axis in group) == 0, default=[])
    links = (Link(place, (1,)),)
    found = Found(first.args, kwargs, call, groups, query, links, frozenset(), 0, (*first.assumed,))
    symbols = named_groups(found) if groups else {}
    sizes = {dim: size_symbol(name) for name, group in symbols.items() for dim in group}
    symbolic = resized(call, sizes)
    path, hints = capture_where_it_runs(model, symbolic, hints_for(symbols))
    tensors = [at for at, leaf in enumerate(symbolic.leaves) if isinstance(leaf, TensorSpec)]
    outputs = [leaf for leaf in path.output_leaves if isinstance(leaf, TensorSpec)]
    before = len(outputs) - len(own)
    return Discovery(
        symbolic,
        path,
        symbolic,
        links,
        tuple(tensors.index(at) for at in sorted(own)),
        tuple(range(before, len(outputs))),
        hints,
        {},
        found.notes,
    )


def _refuse_counts(lifting: Lifting) -> None:
    if lifting.counts:
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


def _initial(slot: Slot, roots: dict[str, nn.Module]) -> torch.Tensor:
    tensor: Any = lookup(roots[slot.place.root], slot.place.steps)
    if not tensor.is_meta and bool(tensor.any()):
        raise CaptureError(
            Refusal(
                f"The tensor {slot.label!r}, which calls write to, does not start as zeros.",
                why="The first call starts from it; it may hold what an earlier call wrote.",
                remedy="Reset the model before it is rewritten.",
            )
        )
    assert not flatten(tensor)[1].children
    return tensor  # type: ignore[no-any-return]
