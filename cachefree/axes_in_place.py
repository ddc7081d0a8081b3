"""Operators that give a tensor other axes in place: ``x.squeeze_(2)``, ``w.t_()``.

They move no element. All that has changed is which view the tensor object is, so that from there on
its name stands for a view of what it stood for; what was seen of it before stays what it is. This
takes that no other name is that very object: ``contiguous()`` may give its operand itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from cachefree.in_place import without_the_write
from cachefree.loops import LOOP
from cachefree.sizes import expression
from cachefree.storages import Value

__all__ = ["changes_axes", "names_of", "view_of"]

aten = torch.ops.aten
_VIEWS = (aten.squeeze, aten.unsqueeze, aten.transpose, aten.t, aten.swapaxes, aten.swapdims)

_PERHAPS_ITSELF = aten.contiguous.default  # the only one for which sizes decide


def changes_axes(target: Any) -> bool:
    """Whether an operator gives its operand other axes, or another memory, in place."""
    return torch.Tag.inplace_view in target.tags


def view_of(target: Any, name: str) -> Any:
    """The operator that gives the same axes as a view; None where there is none.

    Args:
        target: The operator that changes its operand.
        name: Its name: ``"squeeze_"``.
    """
    view = without_the_write(target, name)
    return view if view is not None and view.overloadpacket in _VIEWS else None


def names_of(value: Value, node: fx.Node, known: Iterable[tuple[fx.Node, Any]]) -> list[fx.Node]:
    """The nodes that are the tensor whose axes change; none where that cannot be told.

    Args:
        value: The tensor.
        node: The operator's node.
        known: What each earlier node is.
    """
    pairs = [pair for pair in known if isinstance(pair[1], Value)]
    names = [other for other, held in pairs if held is value]
    place = node.meta.get(LOOP)

    def may_be_one(name: fx.Node) -> bool:
        return any(each.target is _PERHAPS_ITSELF for each in (name, *name.users))

    layouts = [_layout(other) for other in names]
    for other, held in pairs:
        if held is not value and held.base is value.base and _layout(other) in layouts:
            return []
    if place is not None and any(each.meta.get(LOOP, ())[:2] != place[:2] for each in names):
        return []
    return [] if any(map(may_be_one, names)) else names


def _layout(node: fx.Node) -> Any:
    """How a tensor lies in its storage: no two objects that are one differ in it."""
    example = node.meta["val"]
    numbers = (*example.shape, *example.stride(), example.storage_offset())
    return tuple(map(expression, numbers))
