"""Containers that a call fills and hands back: the caller may go on with the one that was given.

A graph takes tensors and gives tensors, so what a call returns is a new container. Where the model
returns the very object that it was given (a cache with an ``update``, a list that it appends to),
code that ignores what is returned goes on with the object. There the border puts the new tensors
into it, and returns it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from cachefree.capture import Call, SizeSpec, TensorSpec, run_on_fakes
from cachefree.places import Carried, Link, Place, select
from cachefree.structure import flatten

__all__ = ["HandedBack", "handed_back"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HandedBack:
    """A part of the cache that the model returns as the object that it was given.

    Attributes:
        place: Its place among the places of the cache.
        steps: The way to it in the result.
        is_filled: Whether a first call fills an empty one that it is given.
    """

    place: int
    steps: tuple[Any, ...]
    is_filled: bool

    def put(self, given: Any, result: Any, *, is_first: bool) -> Any:
        """The result with the object that was given, which now holds what is new."""
        if given is None or (is_first and not self.is_filled):
            return result
        new = select(result, self.steps)
        if type(new) is not type(given):
            return result
        _refill(given, new)
        return _with(result, self.steps, given)


def handed_back(
    model: nn.Module,
    first: Call,
    later: Call,
    links: Sequence[Link],
    sizes: Mapping[str, int],
) -> tuple[HandedBack, ...]:
    """The parts of the cache that come back as the object that was given.

    Args:
        model: Any module.
        first: How it is called first.
        later: How it is called later.
        links: The places of the cache.
        sizes: The size of each symbol.
    """
    found = []
    for number, link in enumerate(links):
        if any(isinstance(step, (Carried, tuple)) for step in link.selector):
            continue
        same, given = _comes_back(model, later, link, sizes)
        if same and not isinstance(given, tuple):
            empty = _emptied(given)
            filled = (
                empty is not None
                and _comes_back(model, _with_given(first, link.place, empty), link, sizes)[0]
            )
            found.append(HandedBack(number, link.selector, filled))
    return tuple(found)


def _comes_back(
    model: nn.Module, call: Call, link: Link, sizes: Mapping[str, int]
) -> tuple[bool, Any]:
    """Whether a call returns the very object that it is given, and that object."""
    seen: list[Any] = []

    def look(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        given = _given(link.place, args, kwargs)
        seen[:] = [select(result, link.selector) is given and given is not None, given]

    try:
        run_on_fakes(model, call, sizes, look=look)
    except Exception as error:  # noqa: BLE001 - the model may raise anything
        log.debug("not run to see whether it hands %s back: %s", link.place.path, error)
        return False, None
    return seen[0], seen[1]


def _given(place: Place, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    is_positional = place.position is not None and place.position < len(args)
    value: Any = args[place.position or 0] if is_positional else kwargs.get(place.parameter)
    for step in place.steps:
        value = value[step]
    return value


def _with_given(call: Call, place: Place, value: Any) -> Call:
    args, kwargs = call.structure.rebuild(list(call.leaves))
    leaves, structure = flatten(place.put(args, kwargs, value), _is_spec)
    return Call(structure, tuple(leaves), call.fixed)


def _is_spec(value: Any) -> bool:
    return isinstance(value, (TensorSpec, SizeSpec))


def _emptied(given: Any) -> Any:
    """An empty container of the same class; None where it cannot be made."""
    make: Callable[[], Any] = type(given)
    try:
        return make()
    except Exception as error:  # noqa: BLE001 - a user's class may raise anything
        log.debug("no empty %s: %s", type(given).__name__, error)
        return None


def _refill(given: Any, new: Any) -> None:
    if isinstance(given, list):
        given[:] = new
    elif isinstance(given, dict):
        given.clear()
        given.update(new)
    else:
        _, structure = flatten(new)
        for name in structure.keys:
            object.__setattr__(given, name, getattr(new, name))


def _with(result: Any, steps: tuple[Any, ...], value: Any) -> Any:
    """The result with another object at the end of some steps."""
    if not steps:
        return value
    step, *rest = steps
    if isinstance(result, (Mapping, list)) or type(result) is tuple:
        part = _with(result[step], tuple(rest), value)
        if isinstance(result, tuple):
            return (*result[:step], part, *result[step + 1 :])
        result[step] = part  # type: ignore[index]
        return result
    part = _with(getattr(result, str(step)), tuple(rest), value)
    if isinstance(result, tuple):
        return result._replace(**{str(step): part})  # type: ignore[attr-defined]
    object.__setattr__(result, str(step), part)
    return result
