"""The model that a graph came from, watched so that what changes there is seen here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from cachefree.baked import Flags, asks_for_devices

__all__ = ["Origin"]

_Kind = tuple[Any, ...]


class Origin:
    """Notices when a model is not any more what its graph was captured from.

    New values of parameters need no notice: they are shared. A submodule that was replaced, a hook
    that was added, a parameter of another dtype, class or shape, or a flag that the model's code
    reads does; and another kind of device, where the code may go another way on it.

    Args:
        model: The model.
        again: Rewrites it again.
        without: Names of buffers and attributes that are a cache, which any call changes.
    """

    def __init__(
        self, model: nn.Module, again: Callable[[], Any], without: frozenset[str] = frozenset()
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
