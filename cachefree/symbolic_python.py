"""Python's own functions on sizes, while a model is captured: they keep symbolic sizes symbolic."""

from __future__ import annotations

import ast
import builtins
import contextlib
import functools
import linecache
import math
import operator
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch

from cachefree.errors import CaptureError, Refusal, SourceLine
from cachefree.idle_draws import drawing_functions
from cachefree.isolation import is_plain_object
from cachefree.loops import heard_loops
from cachefree.sizes import TORCH, is_standard, is_users
from cachefree.token_ranges import numbered, token_range
from cachefree.token_slots import multiplied
from cachefree.value_questions import ANSWERS

__all__ = ["sizes_in_builtins", "sizes_in_imported", "sizes_in_int"]

# Python's own min, max and len ask for truth values and for a machine integer; torch has symbolic
# ones.
_lock = threading.Lock()
_capturing = threading.local()
_users = 0
_originals: list[tuple[Any, str, Any]] = []


def _has_size(values: Any) -> bool:
    return any(isinstance(value, torch.SymInt) for value in values)


def _symbolic(name: str, symbolic: Any) -> Any:
    original = getattr(builtins, name)

    @functools.wraps(original)
    def extremum(*args: Any, **kwargs: Any) -> Any:
        if getattr(_capturing, "active", False) and not kwargs and args:
            if len(args) == 1:
                args = (list(args[0]),)
                if len(args[0]) > 1 and _has_size(args[0]):
                    return functools.reduce(symbolic, args[0])
            elif _has_size(args):
                return functools.reduce(symbolic, args)
        return original(*args, **kwargs)

    return extremum


_BUILT_IN = (tuple, list, dict, str, set)


def _symbolic_len() -> Any:
    original = builtins.len

    @functools.wraps(original)
    def length(value: Any, /) -> Any:
        kind = type(value)
        if kind in _BUILT_IN and kind is not list:
            return original(value)
        if getattr(_capturing, "active", False):
            loops = heard_loops()
            if loops is not None and isinstance(value, list):
                loops.heard_length(value)
            if kind is list:
                return original(value)
            if isinstance(value, torch.Tensor) and value.dim():
                return value.shape[0]
            if is_plain_object(value) or _has_slots(value):
                own = getattr(type(value), "__len__", None)
                size = None if own is None else own(value)
                if isinstance(size, torch.SymInt):
                    return size
        return original(value)

    return length


def _has_slots(value: Any) -> bool:
    """Whether an object of the user's keeps its state in slots."""
    return hasattr(type(value), "__slots__") and is_users(
        getattr(sys.modules.get(type(value).__module__), "__file__", None) or TORCH
    )


class _RangeType(type):
    """``range`` for ``isinstance`` and ``issubclass``."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, _RANGE)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, _RANGE)


_RANGE = range


class _Range(metaclass=_RangeType):
    """``range`` whose rounds are heard where a size says how many there are."""

    def __new__(cls, *args: Any) -> Any:
        heard = token_range(args)
        return _RANGE(*args) if heard is None else heard


class _EnumerateType(type):
    """``enumerate`` for ``isinstance`` and ``issubclass``."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, _ENUMERATE)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, _ENUMERATE)


_ENUMERATE = enumerate


class _Enumerate(metaclass=_EnumerateType):
    """``enumerate`` that numbers tokens by their places."""

    def __new__(cls, iterable: Any, start: Any = 0) -> Any:
        if heard_loops() is None or not is_users(sys._getframe(1).f_code.co_filename):
            return _ENUMERATE(iterable, start)
        return numbered(iterable, start)


def _numbers_of(original: Any) -> Any:
    """A function that tells objects apart, for which a size becomes a number: that is heard."""

    @functools.wraps(original)
    def identity(*args: Any) -> Any:
        if getattr(_capturing, "active", False) and _has_size(args):
            args = tuple(int(arg) if isinstance(arg, torch.SymInt) else arg for arg in args)
        return original(*args)

    return identity


def _refused(original: Any) -> Any:
    """A clock, or the system's own randomness: no graph can read it."""

    @functools.wraps(original)
    def reading(*args: Any, **kwargs: Any) -> Any:
        if getattr(_capturing, "active", False):
            frame = sys._getframe(1)
            while is_standard(frame.f_code.co_filename) and frame.f_back is not None:
                frame = frame.f_back
            code = frame.f_code
            if is_users(code.co_filename):
                raise CaptureError(
                    Refusal(
                        f"The model reads {original.__name__}() while it runs.",
                        why="A clock and the system's randomness differ from call to call, and a "
                        "graph would keep what was read while it was captured.",
                        remedy="Read it outside of forward.",
                        where=SourceLine(code.co_filename, frame.f_lineno, code.co_name),
                    )
                )
        return original(*args, **kwargs)

    return reading


_CLOCKS = ("time", "perf_counter", "monotonic", "process_time", "thread_time")
_READ_ONLY_ONCE = (
    *((time, name + unit) for name in _CLOCKS for unit in ("", "_ns")),
    (os, "urandom"),
    (random, "_urandom"),
)


def _symbolic_root() -> Any:
    original = math.sqrt

    @functools.wraps(original)
    def root(value: Any, /) -> Any:
        if getattr(_capturing, "active", False) and isinstance(
            value, (torch.SymInt, torch.SymFloat)
        ):
            return torch.sym_sqrt(value)
        return original(value)

    return root


def _plain_truths(original: Any) -> Any:
    @functools.wraps(original)
    def attention(*args: Any, **kwargs: Any) -> Any:
        if getattr(_capturing, "active", False):
            args = tuple(bool(arg) if isinstance(arg, torch.SymBool) else arg for arg in args)
            kwargs = {
                name: bool(arg) if isinstance(arg, torch.SymBool) else arg
                for name, arg in kwargs.items()
            }
        return original(*args, **kwargs)

    return attention


def _patches() -> list[tuple[Any, str, Any]]:
    functional = torch.nn.functional
    return [
        (builtins, "min", _symbolic("min", torch.sym_min)),
        (builtins, "max", _symbolic("max", torch.sym_max)),
        (builtins, "len", _symbolic_len()),
        (builtins, "range", _Range),
        (builtins, "enumerate", _Enumerate),
        (math, "sqrt", _symbolic_root()),
        (torch.SymInt, "__mul__", multiplied(torch.SymInt.__mul__)),
        (torch.SymInt, "__rmul__", multiplied(torch.SymInt.__rmul__)),
        *((home, name, _refused(getattr(home, name))) for home, name in _READ_ONLY_ONCE),
        *drawing_functions(),
        (operator, "is_", _numbers_of(operator.is_)),
        (operator, "is_not", _numbers_of(operator.is_not)),
        # its argument parser takes no symbolic truth value: is_causal=length > 1
        (
            functional,
            "scaled_dot_product_attention",
            _plain_truths(functional.scaled_dot_product_attention),
        ),
    ]


class _IntegerType(type):
    """``int`` for ``isinstance``, ``issubclass`` and ``case int()``, of symbolic sizes too."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, (int, torch.SymInt))

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, int)


class _Integer(int, metaclass=_IntegerType):
    """``int`` that leaves a symbolic size as it is."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs:
            value = args[0]
            if isinstance(value, torch.Tensor) and ANSWERS.of_sizes is not None:
                value = value.__int__()
            if isinstance(value, torch.SymInt):
                return value
        return int(*args, **kwargs)


@contextlib.contextmanager
def sizes_in_int(model: torch.nn.Module) -> Iterator[None]:
    """Lets ``int(size)`` stay symbolic in the files that define the model's classes."""
    homes = {type(module).__module__ for module in model.modules()}
    changed = []
    for name in homes:
        home = sys.modules.get(name)
        is_users = home is not None and name.split(".")[0] not in ("torch", "builtins")
        if (
            is_users
            and "int" not in vars(home)
            and _only_converts(getattr(home, "__file__", None) or "")
        ):
            home.int = _Integer  # type: ignore[union-attr]
            changed.append(home)
    try:
        yield
    finally:
        for home in changed:
            vars(home).pop("int", None)


@contextlib.contextmanager
def sizes_in_imported(model: torch.nn.Module) -> Iterator[None]:
    """Lets ``from math import sqrt`` and its like stay symbolic in the packages of the model."""
    wrappers = [getattr(home, name) for home, name, _ in _originals if home is not builtins]
    originals = {id(original): w for w in wrappers if (original := getattr(w, "__wrapped__", None))}
    packages = {type(module).__module__.split(".")[0] for module in model.modules()}
    homes = [
        vars(home)
        for name, home in list(sys.modules.items())
        if home is not None and name.split(".")[0] in packages - {"torch", "builtins"}
    ]
    changed = [
        (names, name, value)
        for names in homes
        for name, value in list(names.items())
        if id(value) in originals
    ]
    try:
        for names, name, value in changed:
            names[name] = originals[id(value)]
        yield
    finally:
        for names, name, value in changed:
            names[name] = value


@functools.lru_cache(maxsize=256)
def _only_converts(file: str) -> bool:
    """Whether a file calls ``int``, checks for it and annotates with it, and nothing else.

    ``dtype=int`` and ``type(n) is int`` mean the class itself.
    """
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return False
    allowed: set[int] = set()
    for node in ast.walk(tree):
        places: list[Any] = []
        if isinstance(node, ast.Call):
            allowed.add(id(node.func))
            if isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "issubclass"):
                places = node.args[1:]
        elif isinstance(node, ast.MatchClass):
            places = [node.cls]
        elif isinstance(node, (ast.arg, ast.AnnAssign)):
            places = [node.annotation]
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            places = [node.returns]
        allowed |= {id(part) for place in places if place is not None for part in ast.walk(place)}
    return all(
        id(node) in allowed
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id == "int"
    )


@contextlib.contextmanager
def sizes_in_builtins() -> Iterator[None]:
    """Lets ``min``, ``max`` and ``len`` of this thread keep symbolic sizes symbolic."""
    global _users
    with _lock:
        if _users == 0:
            for home, name, patched in _patches():
                _originals.append((home, name, getattr(home, name)))
                setattr(home, name, patched)
        _users += 1
    before = getattr(_capturing, "active", False)
    _capturing.active = True
    try:
        yield
    finally:
        _capturing.active = before
        with _lock:
            _users -= 1
            if _users == 0:
                while _originals:
                    home, name, original = _originals.pop()
                    setattr(home, name, original)
