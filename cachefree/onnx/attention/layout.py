"""How a model lays out a cache of keys or values: which axis is the batch, the head, the row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from cachefree.sizes import size_symbol
from cachefree.spec import CacheSlot

__all__ = ["Layout", "layouts"]

_BATCH = size_symbol("batch")


@dataclass(frozen=True)
class Layout:
    """The axes of a slot, each by its role.

    Attributes:
        roles: ``"b"`` batch, ``"k"`` heads, ``"p"`` rows, ``"d"`` the size of a head, in the
            model's order; ``"bk"`` is the batch and the heads in one axis.
        heads: K, the heads that keys and values have.
    """

    roles: tuple[str, ...]
    heads: int

    @property
    def is_plain(self) -> bool:
        """Whether the slot is (B, K, P, D) without moving anything in memory."""
        return self.roles in (("b", "k", "p", "d"), ("b", "p", "d"), ("bk", "p", "d"))

    @property
    def order(self) -> tuple[int, ...]:
        """The permutation that makes (B, K, P, D) of the model's axes, once each has its own."""
        apart = self.apart
        return tuple(apart.index(role) for role in ("b", "k", "p", "d"))

    @property
    def apart(self) -> tuple[str, ...]:
        """The roles where the batch and the heads have an axis each, and heads have one at all."""
        roles: tuple[str, ...] = ()
        for role in self.roles:
            roles += ("b", "k") if role == "bk" else (role,)
        return roles if "k" in roles else (roles[0], "k", *roles[1:])

    def heads_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """A slot's tensor as (B, K, P, D), a view of it."""
        if "bk" in self.roles:
            tensor = tensor.unflatten(self.roles.index("bk"), (-1, self.heads))
        elif "k" not in self.roles:
            tensor = tensor.unsqueeze(1)
        return tensor.permute(self.order)

    def as_model(self, tensor: torch.Tensor) -> torch.Tensor:
        """A (B, K, P, D) tensor as the model has it, a view of it."""
        back = sorted(range(4), key=self.order.__getitem__)
        tensor = tensor.permute(back)
        if "bk" in self.roles:
            start = self.apart.index("b")
            return tensor.flatten(start, start + 1)
        return tensor if "k" in self.roles else tensor.squeeze(1)


def layouts(slot: CacheSlot) -> Iterator[Layout]:
    """The layouts that a slot of this shape can have."""
    shape = [sympy.sympify(size) for size in slot.past.shape]
    if len(slot.growing_axes) != 1 or len(shape) not in (3, 4):
        return
    rows = slot.growing_axes[0]
    if not isinstance(shape[rows], sympy.Symbol):
        return
    batch = [axis for axis, size in enumerate(shape) if _BATCH in size.free_symbols]
    rest = [axis for axis in range(len(shape)) if axis not in (rows, *batch)]
    if len(batch) != 1 or any(not shape[axis].is_Integer for axis in rest):
        return
    factor = sympy.cancel(shape[batch[0]] / _BATCH)
    if not factor.is_Integer or (len(shape) == 4 and factor != 1):
        return
    if len(shape) == 3:
        roles: dict[int, Any] = {rows: "p", batch[0]: "b" if factor == 1 else "bk", rest[0]: "d"}
        if factor != 1 or batch[0] == 0:
            yield Layout(tuple(roles[axis] for axis in range(3)), int(factor))
        return
    for heads, size in (rest, rest[::-1]):
        roles = {rows: "p", batch[0]: "b", heads: "k", size: "d"}
        yield Layout(tuple(roles[axis] for axis in range(4)), int(shape[heads]))
