"""Containers that a model's code only writes to: what a hook keeps, for somebody else to look at.

Such a container is no state, whatever a call leaves in it. Code may know one container by several
names, so all the names are found that lead to it, and no code may read it by any of them. One that
lies inside another container has no name of its own.
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
from typing import Any

import torch

from cachefree.held_code import file_of, is_installed
from cachefree.looked_up import once
from cachefree.reach import CONTAINERS, Place, Reached, get, reached_by

__all__ = ["only_written"]

_UNNAMED = ""
_DEPTH = 8
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


@once
def only_written(model: torch.nn.Module) -> dict[int, Any]:
    """The containers that no code reads, by their identity.

    Args:
        model: Any module.
    """
    found = reached_by(model)
    if _has_readers_by_other_names(found):
        return {}
    names = _Names(found)
    for place in found.places:
        names.add(_name(place), get(place), _DEPTH)
    for _, value in found.others:
        names.add(_UNNAMED, value, _DEPTH, is_named_elsewhere=True)
    for module in model.modules():
        for name, value in vars(module).items():
            names.add(name, value, _DEPTH)
    candidates = {id(value): value for value in map(get, found.places) if type(value) in CONTAINERS}
    return {
        identity: value
        for identity, value in candidates.items()
        if _are_only_written(found, frozenset(names.found[identity]))
    }


def _has_readers_by_other_names(found: Reached) -> bool:
    """Whether a file of the user's calls ``getattr`` and the like by names of its own."""
    files = [vars(sys.modules[cls.__module__]) for cls in found.classes]
    files += [space for space, *_ in (*found.places, *found.named) if isinstance(space, dict)]
    ids = set(map(id, _READERS))
    return any(
        id(value) in ids and name not in _BY_ANY_NAME
        for file in files
        if not is_installed(str(file.get("__file__")))
        for name, value in list(file.items())
    )


class _Names:
    """The names that lead to containers."""

    def __init__(self, reached: Reached) -> None:
        self.known = frozenset(reached.classes)
        self.found: dict[int, set[str]] = {}
        self._seen: set[int] = set()

    def add(self, name: str, value: Any, depth: int, *, is_named_elsewhere: bool = False) -> None:
        """Notes what a name leads to, and what is inside of it."""
        if type(value) in CONTAINERS and not is_named_elsewhere:
            self.found.setdefault(id(value), set()).add(name)
        if not depth or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, (*CONTAINERS, tuple, frozenset)):
            for part in list(value.values() if isinstance(value, dict) else value):
                self.add(_UNNAMED, part, depth - 1)
        elif not isinstance(value, (type, types.ModuleType, types.FunctionType, torch.nn.Module)):
            is_known = type(value) in self.known or not is_installed(file_of(type(value)))
            for key, part in dict(getattr(value, "__dict__", {})).items():
                self.add(key if is_known else _UNNAMED, part, depth - 1)


def _name(place: Place) -> str:
    return place[2].split("'")[1] if isinstance(place[0], types.CellType) else place[1]


def _are_only_written(found: Reached, names: frozenset[str]) -> bool:
    if _UNNAMED in names:
        return False
    return all(_only_writes(code, name) for name in names for code in found.codes)


@functools.lru_cache(maxsize=4096)
def _only_writes(code: types.CodeType, name: str) -> bool:
    if _BY_ANY_NAME.intersection(code.co_names) and not is_installed(code.co_filename):
        return False
    if name in code.co_consts:
        return False  # the text may be the name that is asked for
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    if not any(name in part for part in names):
        return True
    steps = [step for step in dis.get_instructions(code) if step.opname not in _NO_STEPS]
    if any(isinstance(step.argval, tuple) and name in step.argval for step in steps):
        return False  # one instruction may load two names
    return all(
        _is_written(steps[place + 1 : place + 3])
        for place, step in enumerate(steps)
        if step.argval == name and step.opname.startswith("LOAD_") and step.opname != "LOAD_CLOSURE"
    )


def _is_written(after: list[dis.Instruction]) -> bool:
    """Whether ``x.append`` or ``x[key] =`` goes on so after its ``x``."""
    names = [step.opname for step in after]
    if names[:1] and names[0].startswith(("LOAD_ATTR", "LOAD_METHOD")):
        return after[0].argval in _APPENDS
    return names[:1] != [] and names[0] in _KEYS and names[1:] == ["STORE_SUBSCR"]
