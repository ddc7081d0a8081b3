"""What a model's code holds outside of the model: globals, class attributes, default arguments.

A forward pass may count there, remember there, or draw from a generator that is there. While the
model is captured such writes would put fake tensors where the next call finds them, and what they
change is no part of a graph. `surroundings` puts all of it back, and tells what had changed.
Functions that are memoised by `functools` run as they are, so that they remember nothing.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import sys
import types
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from cachefree.sizes import is_users

__all__ = ["Outside", "forget", "surroundings"]

_Memoised = type(functools.lru_cache(lambda: None))
_CONTAINERS = (dict, list, set, deque)
_PLAIN = (bool, int, float, str, type(None))
_ABSENT = object()
_Place = tuple[Any, str, str]  # a namespace (a dict or a class), a name in it, and how it is called


@dataclass
class Outside:
    """What `surroundings` found when the block was left.

    Attributes:
        changes: The names that hold something else, or other contents.
        drew_random: Whether a generator of random numbers has moved on.
    """

    changes: list[str] = field(default_factory=list)
    drew_random: bool = False


@contextlib.contextmanager
def surroundings(model: torch.nn.Module) -> Iterator[Outside]:
    """Puts what the model's code reaches outside of the model back, whatever the block does."""
    found = Outside()
    classes = tuple(dict.fromkeys(type(module) for module in model.modules()))
    reached = _reached(classes)
    before = [(place, _get(place), _contents(_get(place))) for place in reached.places]
    own = [(cls, set(vars(cls))) for cls in reached.classes]
    generators = [*_generators(model, before), *_numpy()]
    states = [(generator, pickle.dumps(_state(generator))) for generator in generators]
    for place, value, _ in before:
        plain = _unmemoised(value)
        if plain is not value:
            _set(place, plain)
    try:
        yield found
    finally:
        for cls, names in own:
            for name in set(vars(cls)) - names:
                found.changes.append(f"{cls.__name__}.{name}")
                delattr(cls, name)
        for place, value, contents in before:
            if _put_back(place, value, contents):
                found.changes.append(place[2])
        for generator, state in states:
            if pickle.dumps(_state(generator)) != state:
                found.drew_random = True
                _restore_state(generator, pickle.loads(state))


def forget() -> None:
    """Looks again at what code reaches: globals may hold other objects by now."""
    _reached.cache_clear()


def _put_back(place: _Place, value: Any, contents: Any) -> bool:
    """Puts one name back; whether it had changed."""
    now = _get(place)
    if _unmemoised(value) is not value:
        _set(place, value)
        return False
    is_same = now is value or (isinstance(value, _PLAIN) and type(now) is type(value))
    changed = not (is_same and (now is value or now == value))
    if changed:
        _set(place, value)
    if contents is not None and not _holds(value, contents):
        changed = True
        value.clear()
        if isinstance(value, (dict, set)):
            value.update(contents)
        else:
            value.extend(contents)
    return changed


def _unmemoised(value: Any) -> Any:
    if isinstance(value, _Memoised):
        return value.__wrapped__
    if isinstance(value, staticmethod) and isinstance(value.__func__, _Memoised):
        return staticmethod(value.__func__.__wrapped__)
    return value


def _contents(value: Any) -> Any:
    return value.copy() if type(value) in _CONTAINERS else None


def _holds(value: Any, contents: Any) -> bool:
    if len(value) != len(contents):
        return False
    if isinstance(value, dict):
        return all(value.get(key, _ABSENT) is part for key, part in contents.items())
    if isinstance(value, set):
        return bool(value == contents)
    return all(one is other for one, other in zip(value, contents, strict=True))


# What the code of classes reaches, by the names in it.


@dataclass(frozen=True)
class _Reached:
    places: tuple[_Place, ...]
    classes: tuple[type, ...]


@functools.lru_cache(maxsize=16)
def _reached(classes: tuple[type, ...]) -> _Reached:
    walk = _Walk()
    for cls in classes:
        walk.add(cls)
    walk.run()
    return _Reached(tuple(walk.places.values()), tuple(walk.classes))


class _Walk:
    """The names that code reaches: of its functions, of those it calls, of their classes."""

    def __init__(self) -> None:
        self.places: dict[tuple[int, str], _Place] = {}
        self.classes: dict[type, None] = {}
        self.pending: list[Any] = []
        self.seen: set[int] = set()

    def add(self, value: Any) -> None:
        if id(value) not in self.seen:
            self.seen.add(id(value))
            self.pending.append(value)

    def run(self) -> None:
        while self.pending:
            value = self.pending.pop()
            if isinstance(value, type):
                self._class(value)
            elif isinstance(value, types.FunctionType):
                self._function(value)

    def _class(self, cls: type) -> None:
        for base in cls.__mro__:
            home = sys.modules.get(base.__module__)
            if home is None or not is_users(getattr(home, "__file__", None) or "<"):
                continue
            self.classes[base] = None
            for name, value in vars(base).items():
                if name.startswith("__") and name.endswith("__") and name != "__call__":
                    continue
                self._named(base, name, f"{base.__name__}.{name}", value)

    def _named(self, namespace: Any, name: str, text: str, value: Any) -> None:
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        if isinstance(value, _Memoised):
            self.places[id(namespace), name] = (namespace, name, text)
            self.add(value.__wrapped__)
        elif isinstance(value, (types.FunctionType, type)):
            self.add(value)
        elif type(value) in _CONTAINERS or isinstance(value, _PLAIN) or _is_generator(value):
            self.places[id(namespace), name] = (namespace, name, text)
        elif _is_users_object(value) and id(value) not in self.seen:
            self.seen.add(id(value))
            self.add(type(value))
            for attribute, part in vars(value).items():
                self._named(vars(value), attribute, f"{text}.{attribute}", part)

    def _function(self, function: types.FunctionType) -> None:
        code = function.__code__
        if not is_users(code.co_filename):
            return
        defaults = {**(function.__kwdefaults__ or {})}
        names = code.co_varnames[: code.co_argcount]
        values = function.__defaults__ or ()
        defaults |= dict(zip(names[len(names) - len(values) :], values, strict=True))
        for name, value in defaults.items():
            if not isinstance(value, _PLAIN):
                text = f"the default {name!r} of {function.__qualname__}"
                self._named(defaults, name, text, value)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if name != "__class__" and _is_filled(cell):
                text = f"the variable {name!r} of {function.__qualname__}"
                self._named(cell, "cell_contents", text, cell.cell_contents)
        space = function.__globals__
        for name in _names_in(code):
            if name not in space:
                continue
            value = space[name]
            if isinstance(value, types.ModuleType) and is_users(
                getattr(value, "__file__", None) or "<"
            ):
                for other in _names_in(code):
                    if other in vars(value):
                        self._named(
                            vars(value), other, f"{value.__name__}.{other}", vars(value)[other]
                        )
            else:
                self._named(space, name, f"the global {name}", value)


def _is_users_object(value: Any) -> bool:
    """Whether a value is an object of a class of the user's, with attributes."""
    if isinstance(value, (type, torch.nn.Module, torch.Tensor, types.ModuleType)):
        return False
    home = sys.modules.get(type(value).__module__)
    return hasattr(value, "__dict__") and is_users(getattr(home, "__file__", None) or "<")


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - an empty cell raises
    except ValueError:
        return False
    return True


def _names_in(code: types.CodeType) -> set[str]:
    """The names that code uses, in the functions inside it too."""
    names = set(code.co_names)
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            names |= _names_in(part)
    return names


def _get(place: _Place) -> Any:
    namespace, name, _ = place
    if isinstance(namespace, types.CellType):
        return namespace.cell_contents
    held = namespace if isinstance(namespace, Mapping) else vars(namespace)
    return held.get(name, _ABSENT)


def _set(place: _Place, value: Any) -> None:
    namespace, name, _ = place
    if isinstance(namespace, dict):
        if value is _ABSENT:
            namespace.pop(name, None)
        else:
            namespace[name] = value
    elif value is _ABSENT:
        delattr(namespace, name)
    else:
        setattr(namespace, name, value)


# Generators of random numbers, told by what they can do: no package is imported for them.


def _is_generator(value: Any) -> bool:
    if isinstance(value, (type, torch.nn.Module, torch.Tensor)):
        return False
    return any(
        hasattr(value, name) for name in ("getstate", "get_state", "bit_generator")
    ) and not isinstance(value, types.ModuleType)


def _generators(model: torch.nn.Module, places: list[tuple[_Place, Any, Any]]) -> list[Any]:
    held = [part for module in model.modules() for part in vars(module).values()]
    found = {id(v): v for v in (*(value for _, value, _ in places), *held) if _is_generator(v)}
    return [value for value in found.values() if _state(value) is not None]


def _numpy() -> list[Any]:
    numpy = sys.modules.get("numpy.random")
    shared = getattr(getattr(numpy, "mtrand", None), "_rand", None)
    return [shared] if shared is not None else []


def _state(generator: Any) -> Any:
    try:
        if hasattr(generator, "bit_generator"):
            return generator.bit_generator.state
        if hasattr(generator, "getstate"):
            return generator.getstate()
        return generator.get_state()
    except Exception:  # noqa: BLE001 - an object of the user's that has such a method by chance
        return None


def _restore_state(generator: Any, state: Any) -> None:
    if hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    elif hasattr(generator, "setstate"):
        generator.setstate(state)
    elif hasattr(generator, "set_state"):
        generator.set_state(state)
