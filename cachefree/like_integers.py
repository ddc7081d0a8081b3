"""Symbolic sizes that answer as integers do, where the user's code asks what they are.

A symbolic size is no ``int`` and cannot be hashed, so that ``isinstance(n, int)``, ``n in {1, 2}``
or an ``except`` around such a line send the code another way while it is captured, without a
question that could be heard. Here they are integers; what cannot be answered for every size turns
the size into a number, which is heard and refused.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from cachefree.reach import reached_by
from cachefree.sizes import is_users

__all__ = ["sizes_like_integers"]

_ABSENT: Any = object()
_NUMBERS = ("bit_length", "bit_count", "to_bytes", "as_integer_ratio", "is_integer")


def _hash(original: Callable[[Any], int], thread: int) -> Callable[[Any], int]:
    def hash_of(size: torch.SymInt) -> int:
        file = sys._getframe(1).f_code.co_filename
        if threading.get_ident() == thread and is_users(file):
            return hash(int(size))
        return original(size)

    return hash_of


def _as_number(name: str) -> Callable[..., Any]:
    def method(size: torch.SymInt, *args: Any, **kwargs: Any) -> Any:
        return getattr(int(size), name)(*args, **kwargs)

    return method


def _methods() -> dict[str, Any]:
    """What an ``int`` has and a symbolic size has not."""
    methods: dict[str, Any] = {
        "__divmod__": lambda size, other: (size // other, size % other),
        "__rdivmod__": lambda size, other: (other // size, other % size),
        "__invert__": lambda size: -size - 1,
        "conjugate": lambda size: size,
        "real": property(lambda size: size),
        "numerator": property(lambda size: size),
        "imag": 0,
        "denominator": 1,
        **{name: _as_number(name) for name in _NUMBERS if hasattr(int, name)},
    }
    return {name: value for name, value in methods.items() if not hasattr(torch.SymInt, name)}


def _is_instance(value: Any, kinds: Any, /) -> bool:
    """``isinstance`` that takes a symbolic size for the ``int`` that it stands for."""
    if isinstance(value, torch.SymInt):
        return issubclass(int, kinds)
    if isinstance(value, torch.SymFloat):
        return issubclass(float, kinds)
    if isinstance(value, torch.SymBool):
        return issubclass(bool, kinds)
    return isinstance(value, kinds)


def _homes(model: torch.nn.Module) -> list[dict[str, Any]]:
    """The names of the modules that the model's code is in, where they do not redefine it."""
    found = reached_by(model)
    files = {code.co_filename for code in found.codes}
    named = {cls.__module__ for cls in found.classes}
    homes: list[ModuleType] = [
        home
        for name, home in list(sys.modules.items())
        if home is not None
        and (name in named or getattr(home, "__file__", None) in files)
        and is_users(getattr(home, "__file__", None) or "<")
    ]
    return [vars(home) for home in homes if "isinstance" not in vars(home)]


@contextlib.contextmanager
def sizes_like_integers(model: torch.nn.Module) -> Iterator[None]:
    """Lets sizes answer as integers do, in the model's code."""
    patches = _methods()
    patches["__hash__"] = _hash(torch.SymInt.__hash__, threading.get_ident())
    before = {name: vars(torch.SymInt).get(name, _ABSENT) for name in patches}
    homes = _homes(model)
    for name, value in patches.items():
        setattr(torch.SymInt, name, value)
    for home in homes:
        home["isinstance"] = _is_instance
    try:
        yield
    finally:
        for home in homes:
            if home.get("isinstance") is _is_instance:
                del home["isinstance"]
        for name, value in before.items():
            if value is _ABSENT:
                delattr(torch.SymInt, name)
            else:
                setattr(torch.SymInt, name, value)
