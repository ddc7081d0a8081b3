"""Running a model without leaving a trace on it, on torch or on the process.

A forward pass may write to its module: caches, counters, buffers. While a model is captured those
writes would put fake tensors there. `untouched` remembers every attribute of every module, and what
plain containers in them hold, puts all of it back, and tells what had changed.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import functools
import linecache
import math
import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch

from cachefree.surroundings import Outside, surroundings

__all__ = [
    "StateChange",
    "one_at_a_time",
    "sizes_in_builtins",
    "sizes_in_imported",
    "sizes_in_int",
    "untouched",
]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_one_thread = threading.RLock()
_CONTAINERS = (list, dict, set, deque)
_ABSENT = object()


def one_at_a_time(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Lets one thread into ``function``: torch traces, warns and draws for the whole process."""

    @functools.wraps(function)
    def alone(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with _one_thread:
            return function(*args, **kwargs)

    return alone


@dataclass(frozen=True)
class StateChange:
    """An attribute that a forward pass set.

    Attributes:
        module: The qualified name of the module, ``""`` for the model itself.
        attribute: The attribute's name.
        before: What it held.
        after: What the forward pass left there.
    """

    module: str
    attribute: str
    before: Any
    after: Any

    @property
    def path(self) -> str:
        """``module.attribute``."""
        return f"{self.module}.{self.attribute}" if self.module else self.attribute


@dataclass
class Trace:
    """What `untouched` found when the block was left."""

    changes: list[StateChange] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    drew_random: bool = False


@contextlib.contextmanager
def untouched(model: torch.nn.Module) -> Iterator[Trace]:
    """Puts the model's attributes and all random states back, whatever the block does.

    Yields:
        A `Trace` whose ``changes`` are filled in when the block ends.
    """
    trace = Trace()
    before = {name: _remember(module) for name, module in model.named_modules()}
    modules = dict(model.named_modules())
    random_states = (random.getstate(), torch.random.get_rng_state())
    tracked = [(tensor, tensor.requires_grad) for tensor in (*model.parameters(), *model.buffers())]
    outside = Outside()
    try:
        with surroundings(model) as outside:
            yield trace
    finally:
        trace.outside = outside.changes
        for tensor, requires_grad in tracked:
            if tensor.requires_grad != requires_grad:  # it was written to, as autograd sees it
                tensor.detach_().requires_grad_(requires_grad)
        trace.drew_random = outside.drew_random or random.getstate() != random_states[0]
        random.setstate(random_states[0])
        torch.random.set_rng_state(random_states[1])
        for name, module in modules.items():
            trace.changes += _put_back(name, module, before[name])
        trace.changes = [change for change in trace.changes if not _is_memo(modules, change)]


def _is_memo(modules: dict[str, torch.nn.Module], change: StateChange) -> bool:
    """Whether a change is what a ``functools.cached_property`` remembers."""
    kind = type(modules[change.module])
    return isinstance(getattr(kind, change.attribute, None), functools.cached_property)


def _remember(module: torch.nn.Module) -> dict[str, tuple[Any, Any]]:
    return {name: (value, _contents(value)) for name, value in vars(module).items()}


def _contents(value: Any, above: tuple[int, ...] = ()) -> Any:
    """A copy of the containers and plain objects in ``value``; the rest by reference."""
    if id(value) in above:
        return None
    above = (*above, id(value))
    if _is_plain_object(value):
        return {key: (part, _contents(part, above)) for key, part in vars(value).items()}
    if isinstance(value, dict):
        return {key: (part, _contents(part, above)) for key, part in value.items()}
    if isinstance(value, (list, deque)):
        return [(part, _contents(part, above)) for part in value]
    if isinstance(value, set):
        return set(value)
    return None


def _is_plain_object(value: Any) -> bool:
    """Whether a value is an object of the user's that holds its state in attributes."""
    if isinstance(value, (torch.nn.Module, torch.Tensor, type)) or callable(value):
        return False
    home = type(value).__module__.split(".")[0]
    return home not in ("builtins", "torch", "collections", "types", "threading") and hasattr(
        value, "__dict__"
    )


def _put_back(
    name: str, module: torch.nn.Module, before: dict[str, tuple[Any, Any]]
) -> list[StateChange]:
    state = vars(module)
    added = [attribute for attribute in state if attribute not in before]
    changes = [StateChange(name, attribute, _ABSENT, state.pop(attribute)) for attribute in added]
    for attribute, (value, contents) in before.items():
        now = state.get(attribute, _ABSENT)
        if now is not value:
            changes.append(StateChange(name, attribute, value, now))
            state[attribute] = value
        elif not _holds(value, contents):
            changes.append(StateChange(name, attribute, _shallow(contents), _copied(value)))
        _restore(value, contents)
    return changes


def _holds(value: Any, contents: Any) -> bool:
    if contents is None:
        return True
    if _is_plain_object(value):
        value = vars(value)
    if isinstance(value, dict):
        return value.keys() == contents.keys() and all(
            value[key] is part and _holds(part, below) for key, (part, below) in contents.items()
        )
    if isinstance(value, (list, deque)):
        return len(value) == len(contents) and all(
            now is part and _holds(part, below)
            for now, (part, below) in zip(value, contents, strict=True)
        )
    if isinstance(value, set):
        return bool(value == contents)
    return True


def _restore(value: Any, contents: Any) -> None:
    if contents is None:
        return
    if _is_plain_object(value):
        value = vars(value)
    if isinstance(value, dict):
        if not _holds(value, contents):
            for part, below in contents.values():
                _restore(part, below)
            value.clear()
            value.update({key: part for key, (part, _) in contents.items()})
    elif isinstance(value, (list, deque)):
        if not _holds(value, contents):
            for part, below in contents:
                _restore(part, below)
            value.clear()
            value.extend(part for part, _ in contents)
    elif isinstance(value, set) and value != contents:
        value.clear()
        value.update(contents)


def _shallow(contents: Any) -> Any:
    if isinstance(contents, dict):
        return {key: part for key, (part, _) in contents.items()}
    if isinstance(contents, list):
        return [part for part, _ in contents]
    return contents


def _copied(value: Any) -> Any:
    if _is_plain_object(value):
        return dict(vars(value))
    return value.copy() if isinstance(value, _CONTAINERS) else value


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


def _symbolic_len() -> Any:
    original = builtins.len

    @functools.wraps(original)
    def length(value: Any, /) -> Any:
        if getattr(_capturing, "active", False):
            if isinstance(value, torch.Tensor) and value.dim():
                return value.shape[0]
            if _is_plain_object(value) and hasattr(type(value), "__len__"):
                size = type(value).__len__(value)
                if isinstance(size, torch.SymInt):
                    return size
        return original(value)

    return length


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
        (math, "sqrt", _symbolic_root()),
        # its argument parser takes no symbolic truth value: is_causal=length > 1
        (
            functional,
            "scaled_dot_product_attention",
            _plain_truths(functional.scaled_dot_product_attention),
        ),
    ]


class _IntegerType(type):
    """``int`` for ``isinstance`` and ``issubclass``."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, int)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, int)


class _Integer(int, metaclass=_IntegerType):
    """``int`` that leaves a symbolic size as it is."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], torch.SymInt):
            return args[0]
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
    wrappers = (math.sqrt, torch.nn.functional.scaled_dot_product_attention)
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
