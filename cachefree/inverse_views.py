"""How a changed view is put back into what it views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cachefree.terms import Table, Term

__all__ = ["CASTS", "is_part", "put_back"]

aten = torch.ops.aten

_PutBack = Callable[[Table, Term, Term, tuple[Any, ...], Any], Term]


def put_back(
    view: Any, table: Table, whole: Term, part: Term, args: tuple[Any, ...], index: Any
) -> Term | None:
    """The whole with a changed part in it; None where the view has no inverse.

    Args:
        view: The operator that gave the part.
        table: Where the terms are made.
        whole: What was viewed.
        part: The view as it is now.
        args: The view's other arguments.
        index: Which of its results the part is, where it gives several.
    """
    back = _PUT_BACK.get(view)
    return None if back is None else back(table, whole, part, args, index)


def is_part(view: Any) -> bool:
    """Whether a view may leave elements out, so that putting it back makes another tensor."""
    operator = view[2] if isinstance(view, tuple) else view
    return _PUT_BACK.get(operator) in (_sliced, _selected, _unbound)


def _reshaped(table: Table, whole: Term, part: Term, args: tuple[Any, ...], index: Any) -> Term:
    return table.like(whole, "reshape", (part, whole.shape))


def _same(table: Table, whole: Term, part: Term, args: tuple[Any, ...], index: Any) -> Term:
    return part


def _transposed(table: Table, whole: Term, part: Term, args: tuple[Any, ...], index: Any) -> Term:
    return table.like(whole, aten.transpose.int, (part, *args))


def _turned(table: Table, whole: Term, part: Term, args: tuple[Any, ...], index: Any) -> Term:
    return table.like(whole, aten.transpose.int, (part, -1, -2)) if len(whole.sizes) > 1 else part


def _permuted(table: Table, whole: Term, part: Term, args: tuple[Any, ...], index: Any) -> Term:
    inverse = [0] * len(args[0])
    for place, dim in enumerate(args[0]):
        inverse[dim] = place
    return table.like(whole, aten.permute.default, (part, tuple(inverse)))


def _sliced(table: Table, whole: Term, part: Term, args: tuple[Any, ...], index: Any) -> Term:
    return table.like(whole, aten.slice_scatter.default, (whole, part, *args))


def _selected(table: Table, whole: Term, part: Term, args: tuple[Any, ...], index: Any) -> Term:
    return table.like(whole, aten.select_scatter.default, (whole, part, *args))


def _unbound(table: Table, whole: Term, part: Term, args: tuple[Any, ...], index: Any) -> Term:
    return table.like(whole, aten.select_scatter.default, (whole, part, args[0], index))


CASTS = (
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten.type_as.default,
)
_PUT_BACK: dict[Any, _PutBack] = {
    aten.view.default: _reshaped,
    aten.reshape.default: _reshaped,
    aten._unsafe_view.default: _reshaped,
    aten.unsqueeze.default: _reshaped,
    aten.squeeze.default: _reshaped,
    aten.squeeze.dim: _reshaped,
    aten.flatten.using_ints: _reshaped,
    aten.unflatten.int: _reshaped,
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten.contiguous.default: _same,
    aten.dropout.default: _same,  # where it drops nothing
    **dict.fromkeys(CASTS, _same),
    aten.transpose.int: _transposed,
    aten.t.default: _turned,
    aten.mT.default: _turned,
    aten.permute.default: _permuted,
    aten.slice.Tensor: _sliced,
    aten.select.int: _selected,
    aten.unbind.int: _unbound,
}
