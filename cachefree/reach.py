"""What the code of classes reaches outside of its objects: globals, defaults, closures, classes."""

from __future__ import annotations

import functools
import sys
import types
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cachefree.held_code import held_code, is_installed, wraps_dataclass
from cachefree.looked_up import once
from cachefree.sizes import is_users

__all__ = [
    "ABSENT",
    "CONTAINERS",
    "PLAIN",
    "Memoised",
    "Place",
    "Reached",
    "get",
    "is_generator",
    "is_iterator",
    "put",
    "reached_by",
]

Memoised = type(functools.lru_cache(lambda: None))
CONTAINERS = (dict, list, set, deque)
PLAIN = (bool, int, float, str, type(None))
ABSENT: Any = object()
Place = tuple[Any, str, str]
"""A namespace (a dict, a class or a closure's cell), a name in it, and how it is called."""


@dataclass(frozen=True)
class Reached:
    """What was found: names, classes, the code that uses them, and what else has a memory."""

    places: tuple[Place, ...]
    classes: tuple[type, ...]
    codes: tuple[types.CodeType, ...]
    others: tuple[tuple[str, Any], ...] = ()
    named: tuple[Place, ...] = ()
    """Functions, classes and objects, by the names that the user's code has for them."""
    loaded: tuple[tuple[str, Any], ...] = ()
    """Everything that code reaches by a name, once for each name."""


@once
def reached_by(model: torch.nn.Module) -> Reached:
    """What a model's methods and the code that it holds reach."""
    code = held_code(model)
    classes = dict.fromkeys(type(module) for module in model.modules())
    return _reached((*classes, *code.classes), tuple(code.functions))


def _reached(classes: tuple[type, ...], functions: tuple[types.FunctionType, ...]) -> Reached:
    walk = _Walk({cls.__module__.partition(".")[0] for cls in classes} - {"torch"})
    for cls in classes:
        walk.add(cls)
    for function in functions:
        walk.add(function)
        walk.others.setdefault(id(function), (function.__qualname__, function))
    walk.run()
    places, others = tuple(walk.places.values()), tuple(walk.others.values())
    named = tuple(walk.named.values())
    loaded = tuple(walk.loaded.values())
    return Reached(places, tuple(walk.classes), tuple(walk.codes), others, named, loaded)


class _Walk:
    """The names that code reaches: of its functions, of those it calls, of their classes.

    What is installed is looked into only where it is of the packages that define the model.
    """

    def __init__(self, packages: set[str]) -> None:
        self.packages = packages
        self.places: dict[tuple[int, str], Place] = {}
        self.classes: dict[type, None] = {}
        self.codes: list[types.CodeType] = []
        self.others: dict[int, tuple[str, Any]] = {}
        self.named: dict[tuple[int, str], Place] = {}
        self.loaded: dict[tuple[str, int], tuple[str, Any]] = {}
        self.is_installed = False
        self.pending: list[Any] = []
        self.seen: set[int] = set()
        self.within: dict[int, Any] = {}

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
            if not self._is_ours(home):
                continue
            self.classes[base] = None
            self.is_installed = _is_installed(home)
            self._metaclass(base)
            for name, value in vars(base).items():
                if not self._is_pythons_own(base, name):
                    self._named(base, name, f"{base.__name__}.{name}", value)

    def _metaclass(self, cls: type) -> None:
        if type(cls) is not type and not self.is_installed:
            self.add(type(cls))

    def _is_pythons_own(self, cls: type, name: str) -> bool:
        """Whether no call reaches what a class has under a name; ``len(x)`` does reach one."""
        if not (name.startswith("__") and name.endswith("__")) or name == "__call__":
            return False
        is_module = issubclass(cls, torch.nn.Module) and name in ("__init__", "__new__")
        is_code = isinstance(
            vars(cls)[name], (types.FunctionType, staticmethod, classmethod, property)
        )
        return self.is_installed or is_module or not is_code

    def _named(self, namespace: Any, name: str, text: str, value: Any) -> None:
        self._loaded(namespace, name, text, value)
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        elif isinstance(value, property):
            for part in filter(None, (value.fset, value.fdel)):
                self.add(part)
            value = value.fget
        if isinstance(value, Memoised):
            self.places[id(namespace), name] = (namespace, name, text)
            self.add(value.__wrapped__)
        elif isinstance(value, (types.FunctionType, type)):
            self.add(value)
        elif (
            type(value) in CONTAINERS
            or isinstance(value, PLAIN)
            or is_generator(value)
            or is_iterator(value)
        ):
            self.places[id(namespace), name] = (namespace, name, text)
        elif self._is_object(value) and id(value) not in self.seen:
            self.seen.add(id(value))
            self.add(type(value))
            for attribute, part in vars(value).items():
                self._named(vars(value), attribute, f"{text}.{attribute}", part)
        if self.is_installed or isinstance(value, (*PLAIN, types.ModuleType)):
            return
        if not isinstance(value, type):
            self.others.setdefault(id(value), (text, value))
        if isinstance(namespace, dict) and not (is_iterator(value) or type(value) in CONTAINERS):
            self.named[id(namespace), name] = (namespace, name, text)

    def _loaded(self, namespace: Any, name: str, text: str, value: Any) -> None:
        own = text.split("'")[1] if isinstance(namespace, types.CellType) else name
        self.loaded.setdefault((own, id(value)), (own, value))
        if not self.is_installed:
            self._code_in(value, text)

    def _code_in(self, value: Any, text: str) -> None:
        """What is called through a value: functions in a table, a partial call, a bound method."""
        if isinstance(value, (*PLAIN, type, types.FunctionType)) or id(value) in self.within:
            return
        self.within[id(value)] = value
        if isinstance(value, functools.partial):
            parts: Any = (value.func, *value.args, *value.keywords.values())
        elif isinstance(value, types.MethodType):
            parts = (value.__func__, value.__self__)
        elif isinstance(value, (*CONTAINERS, tuple, frozenset)):
            parts = list(dict.values(value) if isinstance(value, dict) else value)
        else:
            return
        for part in parts:
            if isinstance(part, (types.FunctionType, type)):
                self.add(part)
            elif self._is_object(part):
                self._named({text: part}, text, text, part)
            else:
                self._code_in(part, text)

    def _is_ours(self, home: types.ModuleType | None) -> bool:
        """Whether a module is the user's: of a file of theirs, or a notebook's, which has none."""
        if home is None:
            return True  # code that was run under a name of its own
        if home.__name__.partition(".")[0] == "torch":
            return False  # its namespaces of operators have files that are none
        file = getattr(home, "__file__", None)
        if file is None:
            # what is built in has a spec
            return home.__name__ == "__main__" or getattr(home, "__spec__", None) is None
        if is_installed(file):
            return home.__name__.partition(".")[0] in self.packages
        return is_users(file)

    def _is_object(self, value: Any) -> bool:
        """Whether a value is an object of a class of the user's, with attributes."""
        if isinstance(value, (type, torch.nn.Module, torch.Tensor, types.ModuleType)):
            return False
        home = sys.modules.get(type(value).__module__)
        return self._is_ours(home) and hasattr(value, "__dict__")

    def _function(self, function: types.FunctionType) -> None:
        code = function.__code__
        home = sys.modules.get(function.__module__)
        if not self._is_ours(home) or wraps_dataclass(code):
            self._wrapper(function)
            return
        self.is_installed = _is_installed(home)
        self.codes += _codes(code)
        defaults = {**(function.__kwdefaults__ or {})}
        names = code.co_varnames[: code.co_argcount]
        values = function.__defaults__ or ()
        defaults |= dict(zip(names[len(names) - len(values) :], values, strict=True))
        for name, value in defaults.items():
            if not isinstance(value, PLAIN):
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
            if isinstance(value, types.ModuleType) and self._is_ours(value):
                for other in _names_in(code):
                    if other in vars(value):
                        self._named(
                            vars(value), other, f"{value.__name__}.{other}", vars(value)[other]
                        )
            else:
                self._named(space, name, f"the global {name}", value)

    def _wrapper(self, function: types.FunctionType) -> None:
        """The user's functions that another's function calls, such as ``singledispatch`` makes."""
        for cell in function.__closure__ or ():
            if _is_filled(cell):
                part = cell.cell_contents
                if isinstance(part, types.FunctionType):
                    self.add(part)
                else:
                    self._code_in(part, function.__qualname__)


def _is_installed(home: types.ModuleType | None) -> bool:
    return is_installed(getattr(home, "__file__", None) or "")


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - an empty cell raises
    except ValueError:
        return False
    return True


def _codes(code: types.CodeType) -> list[types.CodeType]:
    """Code, and the code of the functions inside it."""
    inner = [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return [code, *(below for part in inner for below in _codes(part))]


def _names_in(code: types.CodeType) -> set[str]:
    """The names that code uses, in the functions inside it too."""
    return {name for part in _codes(code) for name in part.co_names}


def is_generator(value: Any) -> bool:
    """Whether a value is a generator of random numbers, told by what it can do."""
    if isinstance(value, (type, torch.nn.Module, torch.Tensor)):
        return False
    return any(
        hasattr(type(value), name) for name in ("getstate", "get_state", "bit_generator")
    ) and not isinstance(value, types.ModuleType)


def is_iterator(value: Any) -> bool:
    """Whether a value gives another object each time that it is asked: it remembers where it is."""
    return hasattr(type(value), "__next__") and not isinstance(value, torch.nn.Module)


def get(place: Place) -> Any:
    """What is at a place; `ABSENT` where nothing is."""
    namespace, name, _ = place
    if isinstance(namespace, types.CellType):
        return namespace.cell_contents
    held = namespace if isinstance(namespace, Mapping) else vars(namespace)
    return held.get(name, ABSENT)


def put(place: Place, value: Any) -> None:
    """Puts a value at a place."""
    namespace, name, _ = place
    if isinstance(namespace, dict):
        if value is ABSENT:
            namespace.pop(name, None)
        else:
            namespace[name] = value
    elif value is ABSENT:
        delattr(namespace, name)
    else:
        setattr(namespace, name, value)
