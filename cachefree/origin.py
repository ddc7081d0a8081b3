"""The model that a graph came from, watched so that what changes there is seen here."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from cachefree.baked import Flags, asks_for_devices

__all__ = ["Origin"]

_Kind = tuple[Any, ...]


class Origin:
    """Notices when a model is not any more what its graph was captured from.

    New values of parameters need no notice: they are shared. A submodule that was replaced, a hook
    that was added, a parameter of another dtype, class or shape, a flag that the code reads,
    a function in an attribute, or a method that was put on an object does; and another kind of
    device, where the code may go another way on it.

    Args:
        model: The model.
        again: Rewrites it again.
        without: Names of buffers and attributes that are a cache, which any call changes.
        has_state: Whether calls of the model change its attributes.
    """

    def __init__(
        self,
        model: nn.Module,
        again: Callable[[], Any],
        without: frozenset[str] = frozenset(),
        *,
        has_state: bool = False,
    ) -> None:
        self.model = model
        self.again = again
        self._flags = Flags(model, without)
        self._asks_for_devices = asks_for_devices(model)
        self._children: list[tuple[dict[str, Any], list[int]]] = []
        self._hooks: list[tuple[dict[int, Any], int]] = []
        self._tensors: list[
            tuple[Mapping[str, Any], list[tuple[Any, ...]], list[_Kind | None]]
        ] = []
        self._plain: list[tuple[dict[str, Any], str, Any]] = []
        self._names: list[tuple[nn.Module, set[str]]] = []
        for hooks in (_global_forward_hooks, _global_forward_pre_hooks):
            self._hooks.append((hooks, len(hooks)))
        for module in () if has_state else model.modules():
            own = vars(module)
            self._names.append((module, set(own)))
            self._plain += [(own, name, own[name]) for name in own if _is_watched(name, own[name])]
        for path, module in model.named_modules():
            if module._modules:
                self._children.append((module._modules, [*map(id, module._modules.values())]))
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                self._hooks.append((hooks, len(hooks)))
            for tensors in (module._parameters, module._buffers):
                names = [f"{path}.{name}".lstrip(".") for name, _ in tensors.items()]
                is_state = any(name in without for name in names)
                if tensors and not is_state:
                    self._tensors.append((tensors, self._marks(tensors), self._kinds(tensors)))

    def has_changed(self) -> bool:
        """Whether the graph has to be captured again."""
        if self._flags.have_changed():
            return True
        for children, ids in self._children:
            if [*map(id, children.values())] != ids:
                return True
        for hooks, count in self._hooks:
            if len(hooks) != count:
                return True
        for own, name, value in self._plain:
            now = own.get(name)
            if now is not value and (type(now) is not type(value) or now != value):
                return True
        for module, names in self._names:
            if len(vars(module)) != len(names) and any(_is_method(module, names)):
                return True
        return self._have_tensors_changed()

    def _have_tensors_changed(self) -> bool:
        for place, (tensors, marks, kinds) in enumerate(self._tensors):
            now = self._marks(tensors)
            if now != marks:
                if self._kinds(tensors) != kinds:
                    return True
                self._tensors[place] = (tensors, now, kinds)
        return False

    def _marks(self, tensors: Mapping[str, torch.Tensor | None]) -> list[tuple[Any, ...]]:
        """What is cheap to compare: identities and dtypes."""
        if self._asks_for_devices:
            return [(id(x), None if x is None else (x.dtype, x.device)) for x in tensors.values()]
        return [
            (id(tensor), None if tensor is None else tensor.dtype) for tensor in tensors.values()
        ]

    def _kinds(self, tensors: Mapping[str, torch.Tensor | None]) -> list[_Kind | None]:
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
            for tensor in tensors.values()
        ]


_OF_TORCH = frozenset(vars(nn.Module()))


def _is_watched(name: str, value: Any) -> bool:
    kinds = (type(None), types.FunctionType, types.MethodType)
    return name not in _OF_TORCH and isinstance(value, kinds)


def _is_method(module: nn.Module, names: set[str]) -> Iterator[bool]:
    """Whether names that are new on an object hide a method of its class."""
    for name in set(vars(module)) - names:
        yield callable(getattr(type(module), name, None))
