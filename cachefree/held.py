"""What a model's code may read besides parameters and flags, remembered by identity.

An object of settings, a list of numbers, a tensor in an attribute, a function, a method of a class:
each is a constant of the captured path. Another one in its place, or a change inside of it, makes
the capture one of another model.
"""

from __future__ import annotations

import contextvars
import functools
import itertools
import operator
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from cachefree.glances import Readings
from cachefree.held_code import file_of, has_slots, held_code, is_installed
from cachefree.reach import (
    CONTAINERS,
    PLAIN,
    Reached,
    get,
    is_generator,
    is_iterator,
    reached_by,
)
from cachefree.recorders import only_written
from cachefree.remembered import is_array, memory_of
from cachefree.structure import is_same_plain

__all__ = ["Held"]

_DEPTH = 5
_MOST = 256
"""Entries of a container beyond which only their number is looked at: a vocabulary."""
_MOST_HIDDEN = 500
"""Parts of hidden objects that are looked at in every call."""
_OF_TORCH = frozenset(vars(nn.Module()))
_SEQUENCES = (list, tuple, set, frozenset, deque)
_PARTS = "__code__", "__defaults__", "__kwdefaults__"
_STOPS = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)
_LEADING = (
    *(contextvars.ContextVar, types.MappingProxyType, threading.local, functools.partial),
    *(weakref.ref, weakref.ProxyType, weakref.CallableProxyType),
)
_FOREIGN = frozenset(("torch", "threading", "_thread", "logging", "weakref", "functools"))


class Held:
    """What the modules of a model hold, and what their code reaches outside of it.

    Args:
        model: The model.
        without: Paths of attributes that calls change: what is at them is not watched.
        constants: Tensors that a captured path has read, and that are no parameters or buffers.
        holders: Objects that calls change, and that are not looked into.

    Attributes:
        has_parameters: Whether a parameter or buffer is also held in another way.
    """

    def __init__(
        self,
        model: nn.Module,
        without: Collection[str],
        constants: Iterable[torch.Tensor],
        *,
        holders: Iterable[Any] = (),
    ) -> None:
        self._constants = [tensor for tensor in constants if _is_watched_tensor(tensor)]
        self._ids = set(map(id, self._constants))
        self._own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._readings = Readings()
        self._live: list[Iterable[Any]] = []  # views and containers, which show what is in them
        code = reached_by(model)
        self._written = only_written(model)
        self._seen = set(self._written)
        self.has_parameters = False
        for path, module in model.named_modules():
            self._module(path, module, without)
        self._code(code)
        self._hidden = _hidden(model, code, self._written)
        self._holders = list(holders)
        self._memory = self._remembered()
        self._values = self._now()
        self._marks = list(map(_mark, self._constants))

    def have_changed(self) -> bool:
        """Whether any of it is another one now."""
        try:
            now = self._now()
        except (KeyError, ValueError, RuntimeError):  # gone, or changed by another thread meanwhile
            return True
        if len(now) != len(self._values):
            return True
        if not all(map(operator.is_, now, self._values)):
            if not all(map(_is_equal, now, self._values)):
                return True
            self._values = now
        if self._hidden and self._remembered() != self._memory:
            return True
        return list(map(_mark, self._constants)) != self._marks

    def _remembered(self) -> list[Any]:
        if not self._hidden:
            return []
        skipped = (*self._written.values(), *self._holders)
        return memory_of(self._hidden, _MOST_HIDDEN, skipped)

    def _now(self) -> list[Any]:
        live = itertools.chain.from_iterable(self._live)
        return list(itertools.chain(live, self._readings.now()))

    def _module(self, path: str, module: nn.Module, without: Collection[str]) -> None:
        held = vars(module)
        names = [
            name
            for name, value in held.items()
            if name not in _OF_TORCH
            and type(value) not in PLAIN
            and not _is_in(f"{path}.{name}".lstrip("."), without)
            and (not isinstance(value, torch.Tensor) or self._is_known(value))
        ]
        self._names(held, names, _DEPTH)
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            self._inside(hook, _DEPTH)

    def _code(self, code: Reached) -> None:
        """What classes have, and containers and objects that code reaches by their names."""
        for cls in code.classes:
            own = vars(cls)
            is_ours = not is_installed(file_of(cls))
            names = [name for name in own if is_ours or name == "forward"]
            self._readings.items(own, [name for name in names if type(own[name]) not in PLAIN])
            for name in names:
                self._function(own[name])
        for namespace, name, _ in code.named:
            self._readings.items(namespace, [name])
            self._function(namespace[name])
        for space, unbound in code.unbound:
            self._readings.calls(_are_unbound(unbound), space)
        for place in code.places:
            value = get(place)
            if type(value) in CONTAINERS and id(value) not in self._written and _is_plain(value):
                namespace, name, _ = place
                if isinstance(namespace, types.CellType):
                    self._readings.attributes(namespace, name)
                else:
                    held = namespace if isinstance(namespace, Mapping) else vars(namespace)
                    self._readings.items(held, [name])
                self._inside(value, _DEPTH)

    def _function(self, value: Any) -> None:
        """What a function is made of, which reloading a module replaces in place."""
        if isinstance(value, property):
            for part in (value.fget, value.fset):
                self._function(part)
        function = getattr(value, "__func__", value)
        if isinstance(function, types.FunctionType) and id(function) not in self._seen:
            self._seen.add(id(function))
            self._readings.attributes(function, *_PARTS)
            self._live += [] if not function.__kwdefaults__ else [function.__kwdefaults__.values()]

    def _names(self, held: Mapping[str, Any], names: list[str], depth: int) -> None:
        self._readings.items(held, names)
        for name in names:
            self._inside(held[name], depth)

    def _inside(self, value: Any, depth: int) -> None:
        """What a value holds."""
        if isinstance(value, torch.Tensor):
            self._is_known(value)
            return
        self._function(value)
        if not depth or id(value) in self._seen or isinstance(value, (*PLAIN, *_STOPS, nn.Module)):
            return
        self._seen.add(id(value))
        if isinstance(value, (*_SEQUENCES, dict)):
            parts = dict.values(value) if isinstance(value, dict) else value
            if len(value) > _MOST:
                self._readings.calls(_length, value)
                return
            self._live += [value, parts] if isinstance(value, dict) else [parts]
            for part in parts:
                self._inside(part, depth - 1)
        elif type(value).__module__.partition(".")[0] not in _FOREIGN:
            held = getattr(value, "__dict__", None)
            if isinstance(held, dict) and not hasattr(value, "__next__"):
                self._live.append(held.values())
                for part in held.values():
                    self._inside(part, depth - 1)

    def _is_known(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor was read; and notes where one of the model's own is held twice."""
        self.has_parameters |= id(tensor) in self._own
        return id(tensor) in self._ids or id(tensor) in self._own


def _hidden(model: nn.Module, code: Reached, written: Collection[int]) -> list[Any]:
    """What no dict shows: slots, arrays, modules that are no submodules, objects of globals."""
    held = [value for _, value in held_code(model).opaque]
    others = [value for _, value in code.others if id(value) not in written]
    return held + list(filter(_holds, others))


def _holds(value: Any) -> bool:
    """Whether a value is a container, or an object with attributes, or leads to one."""
    if type(value) in _LEADING or is_array(value):
        return True
    if isinstance(value, types.FunctionType):
        return bool(vars(value))
    if isinstance(value, (tuple, frozenset)):
        return not all(isinstance(part, PLAIN) for part in value)
    if isinstance(value, (torch.Tensor, *_STOPS)) or is_iterator(value) or is_generator(value):
        return False
    is_object = hasattr(value, "__dict__") or has_slots(type(value))
    is_ours = type(value).__module__.partition(".")[0] not in _FOREIGN
    return type(value) in CONTAINERS or (is_object and is_ours)


def _is_watched_tensor(tensor: torch.Tensor) -> bool:
    try:
        _mark(tensor)
    except RuntimeError:  # made in inference mode, or without values
        return False
    return True


def _mark(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor._version, 0 if tensor.is_meta else tensor.data_ptr()


def _length(value: Any) -> tuple[int]:
    return (len(value),)


def _are_unbound(names: frozenset[str]) -> Callable[[Any], tuple[bool]]:
    return lambda space: (space.keys().isdisjoint(names),)


def _is_equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    plain = (*PLAIN, torch.dtype, torch.device, types.MethodType)
    return type(one) in plain and is_same_plain(one, other)


def _is_plain(value: Any, depth: int = 3) -> bool:
    """Whether a container holds settings: numbers, texts and tensors, and not many."""
    if isinstance(value, (*PLAIN, torch.Tensor, torch.dtype)):
        return True
    if not depth or not isinstance(value, (*_SEQUENCES, dict)) or len(value) > _MOST:
        return False
    parts = itertools.chain(value, dict.values(value)) if isinstance(value, dict) else value
    return all(_is_plain(part, depth - 1) for part in parts)


def _is_in(path: str, without: Collection[str]) -> bool:
    return any(other == path or other.startswith((f"{path}.", f"{path}[")) for other in without)
