"""What objects hold, however deep, as something that can be compared later.

Containers in containers, counters of the standard library, arrays, attributes of functions: a
forward pass may remember something in any of them. They are not put back, as the plain containers
are that code names; that they changed is told.
"""

from __future__ import annotations

import contextvars
import logging
import types
import weakref
from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch

__all__ = ["memory_of"]

_MOST_PARTS = 4000
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_ARRAYS = 1 << 20


def memory_of(
    values: Iterable[Any], most: int = _MOST_PARTS, skipped: Iterable[Any] = ()
) -> list[tuple[Any, ...]]:
    """What the values hold, one entry a value; equal entries where nothing changed.

    Args:
        values: Anything.
        most: How many parts are looked at, at most.
        skipped: Parts that are not looked at.
    """
    walk = _Walk(most)
    walk.seen.update((id(part), -1) for part in skipped)
    return [walk.told(value) for value in values]


class _Walk:
    def __init__(self, most: int) -> None:
        self.most = most
        self.seen: dict[int, int] = {}
        self.kept: list[Any] = []  # so that no id is given again

    def told(self, value: Any) -> tuple[Any, ...]:
        if isinstance(value, _PLAIN):
            return (type(value).__name__, repr(value))
        if id(value) in self.seen:
            return ("seen", self.seen[id(value)])
        if len(self.seen) >= self.most:
            return ()
        self.seen[id(value)] = len(self.seen)
        self.kept.append(value)
        return (id(value), *self._inside(value))

    def _inside(self, value: Any) -> tuple[Any, ...]:
        if isinstance(value, torch.Tensor):
            return () if value.is_inference() else (value._version,)
        if isinstance(value, (type, types.ModuleType, logging.Logger, logging.Handler)):
            return ()
        if isinstance(value, (types.FunctionType, types.MethodType)):
            return tuple((name, self.told(part)) for name, part in vars(value).items())
        if isinstance(value, contextvars.ContextVar):
            return self.told(value.get(None))
        if isinstance(value, weakref.ref):
            return ()
        return (*self._parts(value), *self._attributes(value))

    def _parts(self, value: Any) -> tuple[Any, ...]:
        if isinstance(value, (bytearray, memoryview)) or _is_array(value):
            return (hash(value.tobytes() if hasattr(value, "tobytes") else bytes(value)),)
        if isinstance(value, Mapping) and not _is_odd(value):
            return tuple((self.told(key), self.told(part)) for key, part in list(value.items()))
        if isinstance(value, (list, tuple, Set)) or type(value).__name__ == "deque":
            return (len(value), *(self.told(part) for part in list(value)))
        return ()

    def _attributes(self, value: Any) -> tuple[Any, ...]:
        names = [name for kind in type(value).__mro__ for name in _slots(kind)]
        held = {name: getattr(value, name) for name in names if hasattr(value, name)}
        held |= getattr(value, "__dict__", {})
        return tuple((name, self.told(part)) for name, part in held.items())


def _is_odd(value: Mapping[Any, Any]) -> bool:
    """Whether a mapping gives its entries by code of its own: its attributes tell as much."""
    return not isinstance(value, dict) and hasattr(value, "__dict__")


def _is_array(value: Any) -> bool:
    return (
        hasattr(type(value), "tobytes")
        and hasattr(type(value), "itemsize")
        and getattr(value, "nbytes", 0) <= _ARRAYS
    )


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if not name.startswith("__"))
