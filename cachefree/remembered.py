"""What objects hold, however deep, as something that can be compared later.

Containers in containers, counters of the standard library, arrays, attributes of functions: a
forward pass may remember something in any of them. They are not put back, as the plain containers
are that code names; that they changed is told.
"""

from __future__ import annotations

import contextvars
import functools
import gc
import logging
import types
import weakref
from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch

from cachefree.errors import CaptureError, Refusal

__all__ = ["is_array", "memory_of"]

_MOST_PARTS = 100_000
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_ARRAYS = 1 << 20
_WEAK = (weakref.ref, weakref.ProxyType, weakref.CallableProxyType)


def memory_of(
    values: Iterable[Any], most: int | None = None, skipped: Iterable[Any] = ()
) -> list[tuple[Any, ...]]:
    """What the values hold, one entry a value; equal entries where nothing changed.

    Args:
        values: Anything.
        most: How many parts are looked at; what is beyond is not. None: all of them.
        skipped: Parts that are not looked at.

    Raises:
        CaptureError: they hold more than can be looked at.
    """
    walk = _Walk(most)
    walk.seen.update((id(part), -1) for part in skipped)
    return [walk.told(value) for value in values]


class _Walk:
    def __init__(self, most: int | None) -> None:
        self.most = most
        self.seen: dict[int, int] = {}
        self.kept: list[Any] = []  # so that no id is given again

    def told(self, value: Any) -> tuple[Any, ...]:
        if type(value) in _WEAK:
            return self._weak(value)
        if isinstance(value, _PLAIN):
            return (type(value).__name__, repr(value))
        if id(value) in self.seen:
            return ("seen", self.seen[id(value)])
        if self.most is not None and len(self.seen) >= self.most:
            return ()
        if len(self.seen) >= _MOST_PARTS:
            raise _too_much(value)
        self.seen[id(value)] = len(self.seen)
        self.kept.append(value)
        return (id(value), *self._inside(value))

    def _inside(self, value: Any) -> tuple[Any, ...]:
        if isinstance(value, torch.Tensor):
            return () if value.is_inference() else (value._version,)
        if isinstance(value, (type, types.ModuleType, logging.Logger, logging.Handler)):
            return ()
        if isinstance(value, types.MethodType):
            return (self.told(value.__self__), self.told(value.__func__))
        if isinstance(value, functools.partial):
            return tuple(map(self.told, (value.func, value.args, value.keywords)))
        if isinstance(value, types.FunctionType):
            return tuple((name, self.told(part)) for name, part in vars(value).items())
        if isinstance(value, contextvars.ContextVar):
            return self.told(value.get(None))
        if isinstance(value, (types.BuiltinFunctionType, types.MethodWrapperType)):
            return self.told(value.__self__)
        if hasattr(type(value), "__next__"):
            return self._iterator(value)
        return (*self._parts(value), *self._attributes(value))

    def _weak(self, value: Any) -> tuple[Any, ...]:
        """What a weak reference leads to, which must not be kept alive."""
        if isinstance(value, weakref.ref):
            found = value()
            is_left = found is None or isinstance(found, torch.nn.Module)
            return (id(value), found is None, *(() if is_left else self.told(found)))
        try:
            return (id(value), *self._attributes(value))
        except ReferenceError:
            return (id(value), None)

    def _parts(self, value: Any) -> tuple[Any, ...]:
        if isinstance(value, (bytearray, memoryview)) or is_array(value):
            return (hash(value.tobytes() if hasattr(value, "tobytes") else bytes(value)),)
        if isinstance(value, Mapping) and not _is_odd(value):
            # what a dict of the user's says of its entries may load them
            pairs = dict.items(value) if isinstance(value, dict) else value.items()
            return tuple((self.told(key), self.told(part)) for key, part in list(pairs))
        if isinstance(value, (list, tuple, Set)) or type(value).__name__ == "deque":
            return (len(value), *(self.told(part) for part in list(value)))
        return ()

    def _iterator(self, value: Any) -> tuple[Any, ...]:
        """How far an iterator has come, as far as it tells."""
        frame = getattr(value, "gi_frame", None)
        if frame is not None:
            held = dict(frame.f_locals)
            return (frame.f_lasti, *((name, self.told(part)) for name, part in held.items()))
        try:
            reduced = _places(value.__reduce_ex__(2)[1:])
        except Exception:  # noqa: BLE001 - whatever its class says to that
            reduced = repr(value)
        parts = gc.get_referents(value)
        return (reduced, *self._attributes(value), *map(self.told, parts))

    def _attributes(self, value: Any) -> tuple[Any, ...]:
        names = [name for kind in type(value).__mro__ for name in _slots(kind)]
        held = {name: getattr(value, name) for name in names if hasattr(value, name)}
        held |= getattr(value, "__dict__", {})
        return tuple((name, self.told(part)) for name, part in held.items())


def _places(reduced: Any) -> Any:
    """The numbers by which an iterator tells where it is; objects by what they are."""
    if isinstance(reduced, tuple):
        return tuple(map(_places, reduced))
    return repr(reduced) if isinstance(reduced, _PLAIN) else id(reduced)


def _is_odd(value: Mapping[Any, Any]) -> bool:
    """Whether a mapping gives its entries by code of its own: its attributes tell as much."""
    return not isinstance(value, dict) and hasattr(value, "__dict__")


def is_array(value: Any) -> bool:
    """Whether a value is an array of numbers, whose bytes are compared."""
    return (
        hasattr(type(value), "tobytes")
        and hasattr(type(value), "itemsize")
        and getattr(value, "nbytes", 0) <= _ARRAYS
    )


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if not name.startswith("__"))


def _too_much(value: Any) -> CaptureError:
    return CaptureError(
        Refusal(
            f"The model's code reaches more than {_MOST_PARTS} objects outside of tensors.",
            why=f"What calls change in them has to be seen; the last one looked at is of the class "
            f"{type(value).__name__}.",
            remedy="Keep large tables of objects out of the attributes and globals that forward "
            "uses, or make tensors, texts or numbers of what is in them.",
        )
    )
