"""Rows that a loop over tokens joins one by one: ``out = torch.cat([out, row], 1)``.

Traced as it is, ``out`` has as many rows as the example has tokens. What the loop leaves is what
one join of all its rows gives, so that takes its place wherever it is read after the loop. Inside
of the loop it stays what it is: a round that reads it is no step, and is refused as such.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cachefree.loops import Loops
from cachefree.token_rows import JOINS, rows_operator

__all__ = ["GrownRows", "of_any_round"]


@dataclass
class _Grown:
    """A tensor that some rounds have joined.

    Attributes:
        tensor: It.
        version: How often it was written to when it was made.
        loop: The number of the loop.
        dim: The axis of the tokens.
        rows: What each round joined to it, as it was then, from the first round on.
    """

    tensor: torch.Tensor
    version: int
    loop: int
    dim: int
    rows: list[torch.Tensor]
    whole: torch.Tensor | None = None

    @property
    def is_unwritten(self) -> bool:
        """Whether nothing was written to it since."""
        return self.tensor._version == self.version


class GrownRows:
    """The tensors that loops have joined row by row.

    Args:
        replaces: Is told which tensor takes the place of which.
    """

    def __init__(self, replaces: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        self._replaces = replaces
        self._found: dict[int, _Grown] = {}
        self._next: tuple[int, list[torch.Tensor]] | None = None

    def begins(self, loops: Loops | None, func: Any, args: Any, kwargs: Any) -> int | None:
        """The axis along which a call joins one more row to those of earlier rounds."""
        self._next = None
        if loops is None or loops.active is None or func not in JOINS or not args:
            return None
        parts = args[0]
        if not isinstance(parts, (list, tuple)) or len(parts) != 2 or kwargs.keys() - {"dim"}:
            return None
        before, row = parts
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        if not isinstance(dim, int) or row.dim() != before.dim() or not -row.dim() <= dim:
            return None
        dim = int(dim % row.dim())
        if row.shape[dim] != 1 or row.dtype != before.dtype or not loops.is_of_this_round(row):
            return None
        rows = self._rows(loops, before, dim)
        if rows is None:
            return None
        with torch._C.DisableTorchFunction(), loops.aside():
            self._next = dim, [*rows, row.clone()]  # it may be written to later
        return dim

    def _rows(self, loops: Loops, before: torch.Tensor, dim: int) -> list[torch.Tensor] | None:
        """The rows of the earlier rounds, if these are what the tensor is; None if not."""
        assert loops.active is not None
        known = self._found.get(id(before))
        if known is not None and (known.loop, known.dim) == (loops.active.number, dim):
            is_due = len(known.rows) == loops.round and known.is_unwritten
            return known.rows if is_due else None
        is_empty = before.shape[dim] == 0 and not loops.is_of_this_round(before)
        return [] if loops.round == 0 and is_empty else None

    def ends(self, loops: Loops, result: torch.Tensor) -> None:
        """Writes down what such a call returned."""
        assert self._next is not None
        assert loops.active is not None
        number, version = loops.active.number, result._version
        self._found[id(result)] = _Grown(result, version, number, *self._next)

    def replaced(self, loops: Loops | None, value: Any) -> Any:
        """A value with all rows in place of what a loop has joined, once the loop is over."""
        if not self._found or loops is None or loops.active is not None:
            return value
        if isinstance(value, torch.Tensor):
            return self._whole(loops, value)
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
            return type(value)([self.replaced(loops, part) for part in value])
        if type(value) is dict:
            return {key: self.replaced(loops, part) for key, part in value.items()}
        return value

    def _whole(self, loops: Loops, value: torch.Tensor) -> torch.Tensor:
        grown = self._found.get(id(value))
        if grown is None or grown.tensor is not value:
            return value
        loop = loops.found[grown.loop]
        if len(grown.rows) != loop.rounds:
            return value
        if grown.whole is None:
            if not grown.is_unwritten:
                return value
            count = loops.environment.size_of(loop.count)
            with torch._C.DisableTorchFunction():
                grown.whole = rows_operator()(grown.rows, count, grown.dim, True, loop.number)
            self._replaces(grown.whole, value)
        return grown.whole


def of_any_round(call: Any, dim: int, place: Any) -> Any:
    """A call that joins a row, written down with as many rows before it as there were rounds."""
    parts, *rest = call.args
    before, row = parts
    shape = (*before[1][:dim], place, *before[1][dim + 1 :])
    args = ((("tensor", shape, *before[2:]), row), *rest)
    return dataclasses.replace(call, args=args)
