"""What a call leaves in the containers of a cache that it is given, beside what it returns.

``cache.update(k, v)`` and ``past[i] = (k, v)`` change what the caller holds. A graph changes
nothing; so the caller's own list, dict or object is filled with what the graph returns, where the
model would have filled it.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cachefree.calls import Call, SizeSpec, TensorSpec
from cachefree.discover import Discovery
from cachefree.fake_runs import run_on_fakes
from cachefree.places import Link, Place, select
from cachefree.signatures import signature_of
from cachefree.structure import flatten, leaf_paths

__all__ = ["Refill", "refills"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refill:
    """One container of a cache that a call fills with what it returns.

    Attributes:
        signature: Of the model's own call.
        link: Where the call takes it, and which part of the result it then holds.
        is_returned: Whether the result holds the very container.
        fills_bare: Whether a first call fills an empty list or dict.
        fills_hollow: Whether a first call fills one of the cache's form that holds no tensors.
    """

    signature: inspect.Signature
    link: Link
    is_returned: bool
    fills_bare: bool
    fills_hollow: bool

    def filled(self, result: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The result, with the caller's container filled, and in the result where it was there."""
        own = _given(self.signature, self.link.place, args, kwargs)
        if own is None or isinstance(own, torch.Tensor):
            return result
        if not flatten(own)[0]:
            is_bare = isinstance(own, (list, dict)) and not own
            if not (self.fills_bare if is_bare else self.fills_hollow):
                return result
        present = _overwritten(own, select(result, self.link.selector))
        return _with(result, self.link.selector, present) if self.is_returned else result


def refills(model: nn.Module, discovery: Discovery) -> tuple[tuple[Refill, ...], tuple[str, ...]]:
    """The containers that later calls fill, and what else calls do to them, in words.

    Args:
        model: What is rewritten.
        discovery: How it is called.
    """
    signature = signature_of(model)
    found: list[Refill] = []
    notes: list[str] = []
    looks = [
        _Look(signature, link)
        for link in discovery.links
        if not any(map(callable, link.selector))  # else the caller makes what a later call is given
    ]
    if not looks:
        return (), ()

    def seen(*call: Any) -> None:
        for look in looks:
            look(*call)

    run_on_fakes(model, discovery.later, {**discovery.hints, **discovery.asked}, seen=seen)
    for look in looks:
        if not look.is_changed(discovery.later):
            continue
        link = look.link
        if look.is_as_returned():
            bare, hollow = _fills_at_first(model, discovery, signature, link)
            found.append(Refill(signature, link, look.own is look.present, bare, hollow))
        else:
            notes.append(
                f"a later call changes what it is given as {link.place.path}, and not to what it "
                "returns; the rewritten module leaves it as it is"
            )
    return tuple(found), tuple(notes)


class _Look:
    """Looks at one container after a call on fake tensors."""

    def __init__(self, signature: inspect.Signature, link: Link) -> None:
        self.signature = signature
        self.link = link
        self.own: Any = None
        self.present: Any = None
        self.inputs: set[int] = set()

    def __call__(self, leaves: Sequence[Any], args: Any, kwargs: Any, result: Any) -> None:
        self.inputs = {id(leaf) for leaf in leaves}
        self.own = _given(self.signature, self.link.place, args, kwargs)
        self.present = select(result, self.link.selector)

    def is_changed(self, call: Call) -> bool:
        """Whether it holds other tensors than it was given with."""
        args, kwargs = call.structure.rebuild(list(call.leaves))
        given = _given(self.signature, self.link.place, args, kwargs)
        count = sum(isinstance(leaf, TensorSpec) for leaf in flatten(given, _is_spec)[0])
        now = flatten(self.own)[0]
        return len(now) != count or any(id(leaf) not in self.inputs for leaf in now)

    def is_as_returned(self) -> bool:
        """Whether it holds what the result does, at the same places."""
        one, structure = flatten(self.own)
        other, returned = flatten(self.present)
        return leaf_paths(structure) == leaf_paths(returned) and all(
            a is b for a, b in zip(one, other, strict=True)
        )


def _fills_at_first(
    model: nn.Module, discovery: Discovery, signature: inspect.Signature, link: Link
) -> tuple[bool, bool]:
    """Whether first calls fill an empty container, and one of the cache's form without tensors."""
    path = discovery.first_path
    hollow = select(path.outputs.rebuild([None] * len(path.output_leaves)), link.selector)
    answers = []
    for container in (type(hollow)() if isinstance(hollow, (list, dict)) else None, hollow):
        if container is None:
            answers.append(True)
            continue
        args, kwargs = discovery.first.structure.rebuild(list(discovery.first.leaves))
        leaves, structure = flatten(link.place.put(args, kwargs, container), _is_spec)
        look = _Look(signature, link)
        try:
            run_on_fakes(model, Call(structure, tuple(leaves)), discovery.hints, seen=look)
        except Exception as error:  # noqa: BLE001 - the model does not take it, nor will a caller
            log.debug("a first call does not run with an empty container: %s", error)
            answers.append(True)
            continue
        answers.append(bool(flatten(look.own)[0]))
    bare, filled = answers
    return bare, filled


def _is_spec(value: Any) -> bool:
    return isinstance(value, (TensorSpec, SizeSpec))


def _given(
    signature: inspect.Signature, place: Place, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """What a call gives at a place; None where it gives nothing."""
    try:
        named: dict[str, Any] = dict(signature.bind_partial(*args, **kwargs).arguments)
    except TypeError:  # a decoder's own call, which has other arguments by keyword
        named = dict(kwargs)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(named.pop(name, {}))
    value = named.get(place.parameter)
    for step in place.steps:
        try:
            value = value[step]  # type: ignore[index]
        except (TypeError, LookupError):
            return None
    return value


def _overwritten(own: Any, present: Any) -> Any:
    """What the caller holds, filled in place wherever it can be; else what takes its place."""
    if own is present or isinstance(present, (torch.Tensor, nn.Module)):
        return present
    if isinstance(own, list) and isinstance(present, (list, tuple)):
        own[:] = _pairwise(own, present)
        return own
    if isinstance(own, tuple) and isinstance(present, tuple):
        parts = _pairwise(own, present)
        return type(present)(*parts) if hasattr(present, "_fields") else tuple(parts)
    if type(own) is not type(present):
        return present
    if isinstance(own, Mapping) and hasattr(own, "update"):
        filled = {key: _overwritten(own.get(key), part) for key, part in present.items()}
        for key in [key for key in own if key not in filled]:
            del own[key]  # type: ignore[attr-defined]
        own.update(filled)
        return own
    names = _attribute_names(present)
    if callable(own) or not names:
        return present
    for name in names:
        part = _overwritten(getattr(own, name, None), getattr(present, name))
        object.__setattr__(own, name, part)
    return own


def _pairwise(own: Sequence[Any], present: Sequence[Any]) -> list[Any]:
    return [
        _overwritten(own[place], part) if place < len(own) else part
        for place, part in enumerate(present)
    ]


def _attribute_names(value: Any) -> list[str]:
    names = list(getattr(value, "__dict__", {}))
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        names += [slots] if isinstance(slots, str) else list(slots)
    return [name for name in names if hasattr(value, name) and not name.startswith("__")]


def _with(result: Any, selector: Sequence[Any], present: Any) -> Any:
    """A result that was just made, with another object at one place."""
    if not selector:
        return present
    step, *rest = selector
    if isinstance(step, tuple):
        return result
    if isinstance(result, tuple):
        fields = getattr(result, "_fields", None)
        place = fields.index(step) if fields is not None and isinstance(step, str) else step
        parts = list(result)
        parts[place] = _with(parts[place], rest, present)
        return type(result)(*parts) if fields is not None else tuple(parts)
    if isinstance(result, (Mapping, list)):
        result[step] = _with(result[step], rest, present)  # type: ignore[index]
    else:
        object.__setattr__(result, str(step), _with(getattr(result, str(step)), rest, present))
    return result
