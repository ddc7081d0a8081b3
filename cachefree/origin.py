"""The model that a graph came from, watched so that what changes there is seen here."""

from __future__ import annotations

import itertools
import operator
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from cachefree.baked import Flags, asks_for_devices, names_in_code
from cachefree.glances import Identities
from cachefree.held import Held
from cachefree.held_code import file_of, is_installed
from cachefree.reach import reached_by

__all__ = ["Origin"]

_Kind = tuple[Any, ...]


class Origin:
    """Notices when a model is not any more what its graph was captured from.

    New values of parameters need no notice: they are shared. A submodule that was replaced, a hook
    that was added, a parameter of another dtype, class or shape, two that were one, a flag that the
    code reads, what is in an attribute, or a method that was put on an object does; and another
    kind of device, where the code may go another way on it.

    Args:
        model: The model.
        again: Rewrites it, or a copy of it, again.
        without: Names of buffers and attributes that are a cache, which any call changes.
        constants: Tensors that the graph has read, and that are no parameters or buffers.
        holders: Objects that hold a cache and are no modules: what is in them is not looked at.
    """

    def __init__(
        self,
        model: nn.Module,
        again: Callable[[nn.Module], Any],
        without: frozenset[str] = frozenset(),
        constants: Iterable[torch.Tensor] = (),
        *,
        holders: Iterable[Any] = (),
    ) -> None:
        self.model = model
        self._again = again
        self._flags = Flags(model, without)
        self._held = Held(model, without, constants, holders=holders)
        self._asks_for_devices = asks_for_devices(model)
        modules = dict(model.named_modules())
        own = list(map(vars, modules.values()))
        self._plain = [
            (names, name, names[name])
            for path, names in zip(modules, own, strict=True)
            for name in names
            if _is_watched(name, names[name]) and f"{path}.{name}".lstrip(".") not in without
        ]
        self._own = _Lengths(own)
        self._names = [
            (module, set(vars(module)) | _names_at(path, without))
            for path, module in modules.items()
        ]
        self._read = names_in_code(model)
        classes = [cls for cls in reached_by(model).classes if not is_installed(file_of(cls))]
        self._of_classes = _Lengths(list(map(vars, classes)))
        self._class_names = [(cls, set(vars(cls))) for cls in classes]
        self._below = {
            name
            for module in modules.values()
            for name in (*module._parameters, *module._buffers, *module._modules)
        }
        self._modules = list(modules.values())
        self._classes = list(map(type, self._modules))
        self._children = Identities(
            (module._modules for module in modules.values()), are_named=True
        )
        self._hooks = Identities(
            [
                *(_global_forward_hooks, _global_forward_pre_hooks),
                *(module._forward_hooks for module in modules.values()),
                *(module._forward_pre_hooks for module in modules.values()),
            ]
        )
        kept = {name.rpartition(".")[0] for name in without}
        self._tensors = [
            tensors
            for path, module in modules.items()
            for tensors in (module._parameters, module._buffers)
            if not any(f"{path}.{name}".lstrip(".") in without for name in tensors)
            and not (tensors is module._buffers and path in kept)
        ]
        self._identities = Identities(self._tensors, is_kept=False)
        self._twins = _twins(self._tensors)
        self._mark = operator.attrgetter(*_MARKS, *(["device"] if self._asks_for_devices else []))
        self._marks, self._kinds = self._marks_now(), self._kinds_now()

    def has_changed(self) -> bool:
        """Whether the graph has to be captured again."""
        if self._flags.have_changed() or self._children.have_changed():
            return True
        if self._hooks.have_changed() or self._held.have_changed():
            return True
        for own, name, value in self._plain:
            now = own.get(name)
            if now is not value and (type(now) is not type(value) or now != value):
                return True
        if self._own.have_changed() and any(map(self._is_read, self._names)):
            return True
        if self._of_classes.have_changed() and any(map(self._is_asked_for, self._class_names)):
            return True
        if list(map(type, self._modules)) != self._classes:
            return True
        return self._have_tensors_changed()

    def rewritten(self, model: nn.Module | None = None) -> Any:
        """The model as it is now, or a copy of it, rewritten as it was asked for at first.

        Raises:
            CacheFreeError: it cannot be rewritten.
        """
        return self._again(self.model if model is None else model)

    def _is_read(self, before: tuple[nn.Module, set[str]]) -> bool:
        """Whether names are new on a module that its class has too, or that code may ask for."""
        module, names = before
        new = set(vars(module)) - names
        return bool(new & self._read) or any(hasattr(type(module), name) for name in new)

    def _is_asked_for(self, before: tuple[type, set[str]]) -> bool:
        """Whether names are new on a class that its bases have too, or that code may ask for."""
        cls, names = before
        return any(
            callable(vars(cls)[name])
            if name.startswith("__")
            else name in self._read | self._below
            or any(name in vars(base) for base in cls.__mro__[1:])
            for name in vars(cls).keys() - names
        )

    def _have_tensors_changed(self) -> bool:
        are_others = self._identities.have_changed()
        if not are_others and self._marks_now() == self._marks:
            return False
        if self._kinds_now() != self._kinds or (are_others and self._are_parted()):
            return True
        self._identities = Identities(self._tensors, is_kept=False)
        self._marks = self._marks_now()
        return False

    def _are_parted(self) -> bool:
        """Whether tensors that were one, and have one name in the graph, are one no more."""
        if self._held.has_parameters:
            return True
        now = list(_values(self._tensors))
        return any(now[place] is not now[first] for place, first in self._twins)

    def _marks_now(self) -> list[Any]:
        """What is cheap to compare of tensors that stay the same objects."""
        return list(map(self._mark, self._identities.held()))

    def _kinds_now(self) -> list[_Kind | None]:
        """What the capture depends on."""
        return [
            None
            if tensor is None
            else (
                tensor.dtype,
                type(tensor),
                tensor.shape,
                tensor.device.type if self._asks_for_devices else "",
            )
            for tensor in _values(self._tensors)
        ]


def _values(namespaces: Iterable[Mapping[Any, Any]]) -> Iterator[Any]:
    return itertools.chain.from_iterable(map(operator.methodcaller("values"), namespaces))


def _twins(namespaces: Iterable[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """The places at which a tensor stands that stood at an earlier one, with that place."""
    first: dict[int, int] = {}
    places = [(k, first.setdefault(id(t), k)) for k, t in enumerate(_values(namespaces))]
    return [(k, before) for k, before in places if k != before]


class _Lengths:
    """Notices when dicts hold more or less than before."""

    def __init__(self, namespaces: list[Any]) -> None:
        self._namespaces = namespaces
        self._known = list(map(len, namespaces))

    def have_changed(self) -> bool:
        """Whether any of them does."""
        return list(map(len, self._namespaces)) != self._known


def _names_at(path: str, paths: Iterable[str]) -> set[str]:
    """The attributes of one module among some paths."""
    plain = (re.split(r"[\[(]", other, maxsplit=1)[0].rpartition(".") for other in paths)
    return {name for module, _, name in plain if module == path}


_OF_TORCH = frozenset(vars(nn.Module()))
_MARKS = ("dtype", "shape")


def _is_watched(name: str, value: Any) -> bool:
    kinds = (type(None), types.FunctionType, types.MethodType)
    return name not in _OF_TORCH and isinstance(value, kinds)
