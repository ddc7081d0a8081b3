"""A model called several times in a row, as one path: what one call leaves, the next one finds."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import nn

from cachefree.calls import Call, SizeSpec, TensorSpec
from cachefree.held_code import has_slots
from cachefree.isolation import StateChange, is_plain_object
from cachefree.regimes import Kind
from cachefree.sizes import size_symbol, substitute
from cachefree.structure import flatten

__all__ = [
    "EARLIER",
    "InARow",
    "earlier_symbols",
    "in_a_row",
    "names_of",
    "places_of",
    "renamed",
    "symbols_of_call",
]

EARLIER = "earlier_"
ABSENT = object()
Place = tuple[str, str, Any]
"""Module, attribute, and the key in it; None for the whole."""


def names_of(changes: Sequence[StateChange]) -> tuple[str, ...]:
    """What calls leave on a model, each by its name: ``layers.0.mask``."""
    places = places_of(changes) or ()
    return tuple(dict.fromkeys(map(_name, places)))


def _name(place: Place) -> str:
    module, attribute, key = place
    parts = (module, "" if attribute == "_buffers" else attribute, key or "")
    return ".".join(part for part in parts if part)


def places_of(changes: Iterable[StateChange]) -> tuple[Place, ...] | None:
    """Module, attribute and key (None for the whole) of what changes; None where it has no name.

    An entry that is the same object, and may hold others, may be the one that has changed inside.
    """
    found: dict[Place, None] = {}
    for change in changes:
        whole = (change.module, change.attribute, None)
        before, after = _entries(change.before), _entries(change.after)
        if before is None or after is None:
            found[whole] = None
            continue
        if not all(isinstance(key, str) for key in {**before, **after}):
            return None
        keys = [
            key
            for key in {**before, **after}
            if before.get(key, ABSENT) is not after.get(key, ABSENT) or not _is_flat(before[key])
        ]
        found |= {(change.module, change.attribute, key): None for key in keys} or {whole: None}
    return tuple(found)


def _is_flat(value: Any) -> bool:
    """Whether nothing can be changed inside of a value, but by writing to a tensor."""
    return type(value) in _PLAIN or isinstance(value, torch.Tensor)


def _entries(value: Any) -> dict[Any, Any] | None:
    if type(value) is dict:
        return value
    return vars(value) if is_plain_object(value) else None


class InARow(nn.Module):
    """A model that is called several times in a row, with what it holds before and after the last.

    Args:
        model: The model.
        places: What of it calls change.
    """

    def __init__(self, model: nn.Module, places: tuple[Place, ...]) -> None:
        super().__init__()
        self.model = model
        self.places = places
        self.training = model.training

    def forward(self, calls: tuple[tuple[Any, Any], ...]) -> Any:
        """The last call's result, and what is held before and after it."""
        for args, kwargs in calls[:-1]:
            self.model(*args, **kwargs)
        before = self._held()
        args, kwargs = calls[-1]
        result = self.model(*args, **kwargs)
        return result, before, self._held()

    def has_left_more(self, changes: Iterable[StateChange]) -> bool:
        """Whether calls in a row left something else than at the known places.

        Args:
            changes: What they left on this module.
        """
        own = [replace(c, module=c.module.removeprefix("model").lstrip(".")) for c in changes]
        found = places_of(own)
        return found is None or not set(found) <= set(self.places)

    @property
    def known_buffers(self) -> set[str]:
        """The names of the buffers among the places."""
        return {_name(place) for place in self.places if place[1] == "_buffers" and place[2]}

    def _held(self) -> tuple[Any, ...]:
        return tuple([self._at(*place) for place in self.places])

    def _at(self, module: str, attribute: str, key: Any) -> Any:
        value = vars(self.model.get_submodule(module)).get(attribute, ABSENT)
        if key is not None:
            value = (_entries(value) or {}).get(key, ABSENT)
        return _copied(value)


_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_SIZES = (torch.SymInt, torch.SymFloat)
_HOLDERS = (list, tuple, dict, OrderedDict, defaultdict, deque)
_DEPTH = 6


class _Absent:
    """What stands where nothing is."""


class _Unknown:
    """Something that equals nothing else."""

    __slots__ = ()


def _copied(value: Any, depth: int = _DEPTH) -> Any:
    """A value as it is now, whatever is written to it later; what is unknown equals nothing.

    Modules, functions and objects with slots are unknown: what they hold is not seen here.
    """
    kind = type(value)
    if value is ABSENT:
        return _Absent
    if kind in _PLAIN or isinstance(value, (type, *_SIZES)):
        return value
    if isinstance(value, torch.Tensor):
        return value.clone()
    if kind in (set, frozenset) and all(type(part) in _PLAIN for part in value):
        return (kind, frozenset(value))
    if depth and kind in (list, tuple, deque):
        return (kind, *[_copied(part, depth - 1) for part in value])
    is_object = is_plain_object(value) and not isinstance(value, _HOLDERS) and not has_slots(kind)
    if depth and (kind in (dict, OrderedDict, defaultdict) or is_object):
        parts = vars(value) if is_object else value
        copied = [(_copied(key, 1), _copied(part, depth - 1)) for key, part in parts.items()]
        return (kind, *copied)
    return _Unknown()


@dataclass(frozen=True)
class _Marker:
    """Where a leaf of a call stands."""

    spec: TensorSpec | SizeSpec


def symbols_of_call(call: Call) -> tuple[sympy.Symbol, ...]:
    """The size symbols of a call."""
    return Kind("", call).symbols


def earlier_symbols(symbols: Iterable[sympy.Symbol]) -> dict[sympy.Symbol, sympy.Symbol]:
    """The symbols of an earlier call for each of a call."""
    return {symbol: size_symbol(f"{EARLIER}{symbol}") for symbol in symbols}


def renamed(call: Call) -> Call:
    """A call with other sizes and other inputs."""
    renaming = earlier_symbols(symbols_of_call(call))
    leaves = tuple(
        replace(
            leaf,
            path=f"{EARLIER}{leaf.path}",
            shape=tuple([substitute(size, renaming) for size in leaf.shape]),
        )
        if isinstance(leaf, TensorSpec)
        else SizeSpec(f"{EARLIER}{leaf.path}", substitute(leaf.expr, renaming))
        for leaf in call.leaves
    )
    return replace(call, leaves=leaves)


def in_a_row(calls: Sequence[Call]) -> Call:
    """One call that makes several."""
    values = tuple(
        call.structure.rebuild([_Marker(leaf) for leaf in call.leaves]) for call in calls
    )
    markers, structure = flatten(((values,), {}), lambda value: isinstance(value, _Marker))
    return Call(structure, tuple(marker.spec for marker in markers))
