"""Rows at the tokens' places: what a round reads of a tensor, and what it writes into one.

``x[:, t]`` for each ``t`` are the rows of ``x``; ``x[:, t + 1]`` those of ``x[:, 1:]``, and
``x[:, n - 1 - t]`` those of ``x.flip(1)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from cachefree.terms import Table, Term, replace_operands
from cachefree.token_places import is_token, least_of

__all__ = [
    "Written",
    "has_token",
    "part_at",
    "put_in_order",
    "read_again",
    "rows_in_order",
    "written_rows",
]

aten = torch.ops.aten


@dataclass(frozen=True)
class Part:
    """One row of a tensor.

    Attributes:
        source: The tensor.
        dim: The axis of its tokens.
        begin: Where the first token's row is.
        step: 1, or -1 where the rows of later tokens are before it.
        is_kept: Whether the row keeps that axis, with size 1.
    """

    source: Term
    dim: int
    begin: Any
    step: int
    is_kept: bool


@dataclass(frozen=True)
class Written:
    """Rows that the rounds write into a tensor, one each.

    Attributes:
        lanes: They, one a round.
        before: What the tensor was before the first round.
        dim: The axis of its tokens.
        begin: Where the first token's row is.
        step: 1, or -1 where the rows of later tokens are before it.
        is_kept: Whether a row has that axis, with size 1.
        is_all: Whether all rows of the tensor are written.
    """

    lanes: tuple[Term, ...]
    before: Term
    dim: int
    begin: Any
    step: int
    is_kept: bool
    is_all: bool


def part_at(term: Term, symbol: sympy.Symbol) -> Part | None:
    """``x.select(dim, t + n)`` and ``x[t + n : t + n + 1]`` as what they are a part of."""
    if term.op is aten.select.int:
        index, is_kept = term.args[2], False
    elif term.op is aten.slice.Tensor and _is_one_row(term.args[2:]):
        index, is_kept = term.args[2], True
    else:
        return None
    place = _place(index, symbol)
    if place is None:
        return None
    source = term.args[0]
    return Part(source, term.args[1] % len(source.sizes), *place, is_kept)


def rows_in_order(table: Table, part: Part, count: Any) -> Term | None:
    """The rows that the rounds read, in their order; None where they are not known to be there."""
    source, dim = part.source, part.dim
    least = part.begin if part.step == 1 else part.begin - count + 1
    if not _are_inside(least, count, source.sizes[dim]):
        return None
    if sympy.expand(source.sizes[dim] - count) != 0:
        shape = (*source.sizes[:dim], count, *source.sizes[dim + 1 :])
        args = (source, dim, least, sympy.expand(least + count), 1)
        source = table.like(source, aten.slice.Tensor, args, shape)
    return source if part.step == 1 else _flipped(table, source, dim)


def written_rows(
    lanes: tuple[Term, ...], symbols: Sequence[sympy.Symbol], count: Any
) -> Written | None:
    """The rows, where each value is the one before it with a row written at the token's place."""
    values: list[Term] = []
    found: set[Any] = set()
    for term, symbol in zip(lanes, symbols, strict=True):
        wrote = _write_at(term, symbol)
        if wrote is None or (values and term.args[0] is not lanes[len(values) - 1]):
            return None
        values.append(wrote[0])
        found.add(wrote[1:])
    if len(found) != 1:
        return None
    dim, begin, step, is_kept = found.pop()
    before = lanes[0].args[0]
    least = begin if step == 1 else begin - count + 1
    if not _are_inside(least, count, before.sizes[dim]):
        return None
    is_all = sympy.expand(before.sizes[dim] - count) == 0
    return Written(tuple(values), before, dim, begin, step, is_kept, is_all)


def read_again(
    table: Table, lanes: tuple[Term, ...], symbols: Sequence[sympy.Symbol]
) -> tuple[Term, ...] | None:
    """The values that rounds wrote, where each reads the row that it wrote, or the one before it.

    ``y[:, t] = f(y[:, t - 1])`` carries a row, and the first one is what was there before.
    """
    parts = [part_at(term, symbol) for term, symbol in zip(lanes, symbols, strict=True)]
    first = parts[0]
    if first is None:
        return None
    for late in (0, 1):
        values: list[Term] = list(lanes[:late])  # the first round reads what was there
        for turn in range(late, len(lanes)):
            part = parts[turn]
            wrote = None if part is None else _write_at(part.source, symbols[turn - late])
            if part is None or wrote is None:
                break
            value, dim, begin, step, is_kept = wrote
            due = (first.dim, first.begin + late * first.step, first.step, first.is_kept)
            here = (part.dim, part.begin, part.step, part.is_kept)
            same = (first.dim, first.begin, first.step, first.is_kept)
            if here != same or (dim, sympy.expand(begin), step, is_kept) != due:
                break
            values.append(value)
        if len(values) == len(lanes):
            return _begun(table, first, lanes, values, late)
    return None


def _begun(
    table: Table, first: Part, lanes: tuple[Term, ...], values: list[Term], late: int
) -> tuple[Term, ...]:
    """The values, of which the first one, if it is read of what was there, is at a known place."""
    if late:
        begin = first.begin
        args: tuple[Any, ...]
        if first.is_kept:
            args = (first.source, first.dim, begin, begin + 1, 1)
        else:
            args = (first.source, first.dim, begin)
        values[0] = table.like(lanes[0], lanes[0].op, args)
    return tuple(values)


def _write_at(term: Term, symbol: sympy.Symbol) -> tuple[Term, int, Any, int, bool] | None:
    """The row that a value was last given at a token's place: it, axis, begin, step, is kept."""
    if term.op is aten.select_scatter.default:
        index, is_kept = term.args[3], False
    elif term.op is aten.slice_scatter.default and _is_one_row(term.args[3:]):
        index, is_kept = term.args[3], True
    else:
        return None
    place = _place(index, symbol)
    return (
        None if place is None else (term.args[1], term.args[2] % len(term.sizes), *place, is_kept)
    )


def put_in_order(table: Table, written: Written, rows: Term) -> Term:
    """The tensor with the rows of all rounds in it."""
    dim, before = written.dim, written.before
    if written.step != 1:
        rows = _flipped(table, rows, dim)
    if written.is_all:
        return rows
    count = rows.sizes[dim]
    least = written.begin if written.step == 1 else sympy.expand(written.begin - count + 1)
    args = (before, rows, dim, least, sympy.expand(least + count), 1)
    return table.like(before, aten.slice_scatter.default, args)


def _flipped(table: Table, rows: Term, dim: int) -> Term:
    return table.like(rows, aten.flip.default, (rows, (dim,)))


def _place(index: Any, symbol: sympy.Symbol) -> tuple[Any, int] | None:
    """Where the first token's row is, and whether later ones follow it or are before it."""
    for step in (1, -1):
        begin = sympy.expand(sympy.sympify(index) - step * symbol)
        if not any(is_token(other) for other in begin.free_symbols):
            return begin, step
    return None


def _is_one_row(bounds: tuple[Any, ...]) -> bool:
    start, end, step = bounds
    return bool(step == 1 and sympy.expand(sympy.sympify(end) - start) == 1)


def _are_inside(least: Any, count: Any, size: Any) -> bool:
    """Whether the rows from ``least`` on are rows of the tensor, whatever the sizes."""
    least, spare = sympy.sympify(least), sympy.expand(sympy.sympify(size) - least - count)
    if least == 0 and spare == 0:
        return True
    return bool(least_of(least).is_nonnegative) and bool(least_of(spare).is_nonnegative)


def has_token(term: Term, symbols: Sequence[sympy.Symbol] | None) -> bool:
    """Whether a term has the place of a token among its own numbers."""
    found = False

    def look(arg: Any) -> Any:
        nonlocal found
        if isinstance(arg, sympy.Basic):
            for symbol in arg.free_symbols:
                found = found or (is_token(symbol) if symbols is None else symbol in symbols)
        return arg

    replace_operands(term.args, look)
    replace_operands(term.shape or (), look)
    return found
