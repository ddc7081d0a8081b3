"""A copy of a rewritten model: its graph and its weights, without the model they came from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from cachefree.errors import DomainError, Refusal

__all__ = ["Copied", "Kinds", "kinds_of"]

Kinds = Mapping[str, tuple[torch.dtype, torch.Size] | None]


def kinds_of(module: nn.Module) -> Kinds:
    """The dtype and the shape of each parameter and buffer, which a graph has as constants."""
    return dict(zip(_names(_namespaces(module)), _kinds(_namespaces(module)), strict=True))


class Copied:
    """Notices when a copy's weights are not any more what its graph was captured with.

    There is no model that could be captured again.

    Args:
        module: The copy.
        kinds: Of the weights that its graph was captured with.
    """

    def __init__(self, module: nn.Module, kinds: Kinds) -> None:
        self._namespaces = _namespaces(module)
        self._captured, self._known = kinds, list(kinds.values())

    def has_changed(self) -> bool:
        """Whether the graph would have to be captured again."""
        return _kinds(self._namespaces) != self._known

    def refusal(self) -> DomainError:
        """What has changed, in words."""
        now = dict(zip(_names(self._namespaces), _kinds(self._namespaces), strict=True))
        names = {**self._captured, **now}
        name = next(name for name in names if self._captured.get(name) != now.get(name))
        was, is_now = _words(self._captured.get(name)), _words(now.get(name))
        return DomainError(
            Refusal(
                "The weights of a copy of a rewritten model are not what its graph was captured"
                " with.",
                why=f"{name} was {was}, and is {is_now}: dtypes and sizes are constants of the"
                " graph, and a copy has no model to capture again.",
                remedy="Change the model, rewrite it, and copy what comes back.",
            )
        )


_Namespaces = list[tuple[str, dict[str, torch.Tensor | None]]]


def _namespaces(module: nn.Module) -> _Namespaces:
    return [
        (path, tensors)
        for path, child in module.named_modules()
        for tensors in (child._parameters, child._buffers)
        if tensors
    ]


def _names(namespaces: _Namespaces) -> list[str]:
    return [f"{path}.{name}".lstrip(".") for path, tensors in namespaces for name in tensors]


def _kinds(namespaces: _Namespaces) -> list[tuple[torch.dtype, torch.Size] | None]:
    return [
        None if tensor is None else (tensor.dtype, tensor.shape)
        for _, tensors in namespaces
        for tensor in tensors.values()
    ]


def _words(kind: tuple[torch.dtype, torch.Size] | None) -> str:
    return "no tensor" if kind is None else f"{kind[0]} of shape {tuple(kind[1])}"
