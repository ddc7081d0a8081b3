"""Views by layout (``as_strided``), which see where elements lie in memory, not along axes.

Equal values may lie otherwise: a join lies in order where a transposed tensor does not. So such a
view is taken only of what lies in order on the path. It is then ``take(x, as_strided(arange))``,
the elements at places that sizes alone tell.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch

from cachefree.errors import SourceLine
from cachefree.sizes import expression
from cachefree.terms import Table, Term

__all__ = ["is_in_order", "taken"]

aten = torch.ops.aten


def is_in_order(example: torch.Tensor) -> bool:
    """Whether a fake tensor's elements lie one behind the other, from the storage's begin on."""
    if expression(example.storage_offset()) != 0:
        return False
    due: Any = sympy.Integer(1)
    for size, step in zip(reversed(example.shape), reversed(example.stride()), strict=True):
        if sympy.expand(expression(step) - due) != 0:
            return False
        due = due * expression(size)
    return True


def taken(table: Table, args: tuple[Any, ...], line: SourceLine | None) -> Term:
    """What ``as_strided`` gives of a tensor that lies in order.

    Args:
        table: Where the terms are made.
        args: The tensor, and the sizes, steps and offset of the view.
        line: The user's line.
    """
    source, size, stride, offset = args
    count, device = sympy.Mul(*source.sizes), source.device
    arange = (count, torch.int64, None, device, None)
    places = table.make(aten.arange.default, arange, (count,), torch.int64, device, line)
    seen = (places, size, stride, 0 if offset is None else offset)
    places = table.make(aten.as_strided.default, seen, size, torch.int64, device, line)
    return table.make(aten.take.default, (source, places), size, source.dtype, device, line)
