"""Containers that a model's code only writes to: what a hook keeps, for somebody else to look at.

Such a container is no state, whatever a call leaves in it. Code may know one container by several
names, so all that code reaches is walked through: where a name leads to the container, no code may
read it by that name; where anything else does (a method of it, a partial call, another container),
it counts as read. An object that holds one is known by names too, and no code may do more with it
than look up an attribute: not even what Python calls by itself, such as `__len__`, may read.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import gc
import inspect
import operator
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch

from cachefree.held_code import file_of, is_installed, is_of_dataclass
from cachefree.looked_up import once
from cachefree.reach import CONTAINERS, Place, Reached, get, reached_by
from cachefree.sizes import is_users

__all__ = ["only_written"]

_UNNAMED = ""
_MOST = 20_000
_NO_STEPS = ("PRECALL", "CACHE", "PUSH_NULL", "RESUME", "NOP", "EXTENDED_ARG")
_APPENDS = ("append", "appendleft", "extend", "add")
_KEYS = ("LOAD_FAST", "LOAD_DEREF", "LOAD_CONST", "LOAD_GLOBAL")
_READERS = (
    *(vars, getattr, globals, locals, eval, exec, operator.attrgetter, operator.methodcaller),
    *(dataclasses.asdict, dataclasses.astuple, inspect.getmembers, inspect.getattr_static),
    *(gc.get_objects, gc.get_referents, gc.get_referrers),
)
_READING = ("__dict__", "__getattribute__", "__closure__", "cell_contents", "f_locals", "f_globals")
_BY_ANY_NAME = frozenset((*_READING, *(reader.__name__ for reader in _READERS)))
_STOPS = (type, types.ModuleType, types.CodeType, torch.Tensor, str, bytes, int, float, complex)
_BARE = (object, types.SimpleNamespace)


@once
def only_written(model: torch.nn.Module) -> dict[int, Any]:
    """The containers that no code reads, by their identity.

    Args:
        model: Any module.
    """
    found = reached_by(model)
    candidates = {id(value): value for value in map(get, found.places) if type(value) in CONTAINERS}
    if not candidates or any(map(_asks_for_any_name, found.codes)):
        return {}
    if _has_readers_by_other_names(found):
        return {}
    names = _Names(found)
    for place in found.places:
        names.add(_name(place), get(place))
    for name, value in found.loaded:
        names.add(name, value)
    for _, value in found.others:
        names.look_into(value)
    for module in model.modules():
        names.look_into(module)
    if not names.follow():
        return {}
    return {
        identity: value for identity, value in candidates.items() if names.are_only_written(value)
    }


def _has_readers_by_other_names(found: Reached) -> bool:
    """Whether a file of the user's calls ``getattr`` and the like by names of its own."""
    homes = [sys.modules.get(cls.__module__) for cls in found.classes]
    files = [vars(home) for home in homes if home is not None]
    files += [space for space, *_ in (*found.places, *found.named) if isinstance(space, dict)]
    ids = set(map(id, _READERS))
    return any(
        id(value) in ids and name not in _BY_ANY_NAME
        for file in files
        if not is_installed(str(file.get("__file__")))
        for name, value in list(file.items())
    )


class _Names:
    """The names that lead to containers and objects, and the objects that hold them."""

    def __init__(self, reached: Reached) -> None:
        self.codes = frozenset(reached.codes)
        self.uses: dict[str, set[types.CodeType]] = {}
        for code in reached.codes:
            for name in _mentioned(code) - _of_dataclass(code):
                self.uses.setdefault(name, set()).add(code)
        self.found: dict[int, set[str]] = {}
        self.holders: dict[int, list[Any]] = {}
        self.pending: list[Any] = []
        self._seen: dict[int, Any] = {}

    def add(self, name: str, value: Any, holder: Any = None) -> None:
        """Notes what a name leads to."""
        if _is_stop(value):
            return
        self.found.setdefault(id(value), set()).add(name)
        if holder is not None:
            self.holders.setdefault(id(value), []).append(holder)
        self.look_into(value)

    def look_into(self, value: Any) -> None:
        """Will follow what is inside of a value."""
        if not _is_stop(value) and id(value) not in self._seen:
            self._seen[id(value)] = value
            self.pending.append(value)

    def follow(self) -> bool:
        """Follows everything that was noted; whether that came to an end."""
        while self.pending and len(self._seen) <= _MOST:
            self._inside(self.pending.pop())
        return not self.pending

    def _inside(self, value: Any) -> None:
        if isinstance(value, types.FunctionType) and value.__code__ in self.codes:
            return  # what it reaches has names of its own
        if isinstance(value, types.MethodType) and _is_of_its_class(value):
            self.look_into(value.__self__)  # its code is looked at with its class
            return
        kept_out = {id(value.__globals__)} if _is_others(value) else set()
        held = getattr(value, "__dict__", None)
        named = dict(held) if isinstance(held, dict) else {}
        attributes = {id(held), *map(id, named.values()), *kept_out}
        for part in gc.get_referents(value):
            if id(part) not in attributes:
                self.add(_UNNAMED, part)
        for key, part in named.items():
            self.add(key, part, value)

    def are_only_written(self, value: Any) -> bool:
        """Whether no code reads a container by any of its names."""
        names = self.found[id(value)]
        if _UNNAMED in names:
            return False
        if not all(_only_writes(code, name) for name in names for code in self.uses.get(name, ())):
            return False
        holders = self.holders.get(id(value), [])
        return all(map(self._is_only_looked_at, holders)) and all(
            _only_writes(code, name)
            for kind in set(map(type, holders))
            for code in _codes_of(kind)
            for name in names
        )

    def _is_only_looked_at(self, holder: Any) -> bool:
        """Whether code does no more with an object than look up its attributes."""
        kind, names = type(holder), self.found.get(id(holder), set())
        if isinstance(holder, torch.nn.Module) or type(kind) is not type or _UNNAMED in names:
            return False
        if any(base not in _BARE and is_installed(file_of(base)) for base in kind.__mro__):
            return False
        if None in _functions(kind):
            return False
        own = [(code, name) for code in _codes_of(kind) for name in code.co_varnames[:1]]
        uses = [*own, *((code, name) for name in names for code in self.uses.get(name, ()))]
        return all(_only_looks_up(code, name) for code, name in uses)


def _is_stop(value: Any) -> bool:
    """Whether nothing is looked for inside of a value: it holds nothing of the user's."""
    kind = type(value)
    if issubclass(kind, (*_STOPS, type(None))):
        return True
    is_torch = str(kind.__module__).partition(".")[0] == "torch"
    return is_torch and not issubclass(kind, torch.nn.Module)


def _is_others(value: Any) -> bool:
    """Whether a value is a function of a package, whose globals hold nothing of the user's."""
    return isinstance(value, types.FunctionType) and not is_users(value.__code__.co_filename)


def _is_of_its_class(method: types.MethodType) -> bool:
    return method.__func__ in _functions(type(method.__self__))


def _name(place: Place) -> str:
    return place[2].split("'")[1] if isinstance(place[0], types.CellType) else place[1]


def _functions(kind: type) -> list[Any]:
    """The functions of a class; None for anything else in it that may run code."""
    found: list[Any] = []
    for base in kind.__mro__:
        if base in _BARE:
            continue
        for value in vars(base).values():
            if isinstance(value, property):
                found += [part for part in (value.fget, value.fset, value.fdel) if part is not None]
            else:
                found.append(getattr(value, "__func__", value))
    functions = [part for part in found if isinstance(part, types.FunctionType)]
    plain = (types.FunctionType, types.GetSetDescriptorType, types.MemberDescriptorType)
    others = [part for part in found if not isinstance(part, plain)]
    return [*functions, *(None for part in others if hasattr(type(part), "__get__"))]


def _codes_of(kind: type) -> Iterator[types.CodeType]:
    for function in _functions(kind):
        if function is not None:
            yield from _with_inner(function.__code__)


def _with_inner(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield from _with_inner(part)


def _steps(code: types.CodeType) -> list[dis.Instruction]:
    return [step for step in dis.get_instructions(code) if step.opname not in _NO_STEPS]


def _loads(code: types.CodeType, name: str) -> Iterator[list[dis.Instruction]]:
    """What follows each place where code loads what a name leads to."""
    steps = _steps(code)
    for place, step in enumerate(steps):
        is_load = step.opname.startswith("LOAD_") and step.opname != "LOAD_CLOSURE"
        if is_load and step.argval == name:
            yield steps[place + 1 : place + 3]


@functools.lru_cache(maxsize=4096)
def _only_looks_up(code: types.CodeType, name: str) -> bool:
    """Whether code only asks what a name leads to for attributes, none of them Python's own."""
    if _asks_by_text(code, name):
        return False
    looked_up = ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR")
    return all(
        after and after[0].opname in looked_up and not str(after[0].argval).startswith("__")
        for after in _loads(code, name)
    )


@functools.lru_cache(maxsize=4096)
def _only_writes(code: types.CodeType, name: str) -> bool:
    if _asks_by_text(code, name):
        return False
    return all(map(_is_written, _loads(code, name)))


def _asks_for_any_name(code: types.CodeType) -> bool:
    """Whether code of the user's may ask for a name that it does not write."""
    return bool(_BY_ANY_NAME.intersection(code.co_names)) and not is_installed(code.co_filename)


def _mentioned(code: types.CodeType) -> set[str]:
    """The names in code, and its texts, which may be names that are asked for."""
    texts = [const for const in code.co_consts if isinstance(const, str)]
    return {*code.co_names, *code.co_varnames, *code.co_freevars, *code.co_cellvars, *texts}


def _of_dataclass(code: types.CodeType) -> set[str]:
    """What code that a dataclass writes calls itself: the dataclass, and nothing else."""
    return set(code.co_varnames[:1]) if is_of_dataclass(code) else set()


def _asks_by_text(code: types.CodeType, name: str) -> bool:
    """Whether code may reach a name by its text, or by two names at once."""
    if _asks_for_any_name(code) or name in code.co_consts:
        return True
    if name not in _mentioned(code):
        return False
    return any(isinstance(step.argval, tuple) and name in step.argval for step in _steps(code))


def _is_written(after: list[dis.Instruction]) -> bool:
    """Whether ``x.append`` or ``x[key] =`` goes on so after its ``x``."""
    names = [step.opname for step in after]
    if names[:1] and names[0].startswith(("LOAD_ATTR", "LOAD_METHOD")):
        return after[0].argval in _APPENDS
    return names[:1] != [] and names[0] in _KEYS and names[1:] == ["STORE_SUBSCR"]
