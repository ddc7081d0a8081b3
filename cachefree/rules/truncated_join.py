"""A memory that is joined and then cut to its last rows, in two cases."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import Min

from cachefree.rules.rule import Edit, Site
from cachefree.terms import Term

__all__ = ["TruncatedJoin"]

aten = torch.ops.aten


class TruncatedJoin:
    """Keeps the last rows of a memory, whichever of its two parts they come from.

    Before: ``new[:, -keep:]`` where the new rows alone fill the memory, as they do first; else
    ``cat([past[:, new - keep:], new])``.

    After: ``cat([past, new])[:, -keep:]``.

    Why equal: the last ``keep`` rows of a join lie in its second part, or run from its first part
    to its end; the slice of a join is the join of the slices.
    """

    name = "truncated join"
    neutral = "zero length, cut after the join"

    def edit(self, site: Site) -> Edit | None:
        """A join that is cut afterwards for one cut before; None where no such join differs."""
        other = site.divergence.other
        if other.op != "slice":
            return None
        for source in site.sources:
            join = self._join(source)
            if join is not None:
                return Edit(source, self._cut(site, source, *join))
        return None

    def _join(self, term: Term) -> tuple[tuple[Term, ...], int] | None:
        """The parts of a join with slices of its first part undone."""
        if term.op not in (aten.cat.default, aten.concat.default):
            return None
        parts, dim = term.args
        dim %= len(term.sizes)
        whole = tuple(
            _unsliced(part, dim) if place == 0 else part for place, part in enumerate(parts)
        )
        return (whole, dim) if whole != parts else None

    def _cut(self, site: Site, term: Term, parts: tuple[Term, ...], dim: int) -> Term:
        total: Any = sympy.expand(sum((part.sizes[dim] for part in parts), sympy.Integer(0)))
        shape = (*term.sizes[:dim], total, *term.sizes[dim + 1 :])
        joined = site.table.like(term, aten.cat.default, (parts, dim), shape)
        start = _unclamped(sympy.expand(total - term.sizes[dim]), parts[0].sizes[dim])
        kept = (*term.sizes[:dim], sympy.expand(total - start), *term.sizes[dim + 1 :])
        return site.table.like(term, aten.slice.Tensor, (joined, dim, start, total, 1), kept)


def _unclamped(start: Any, size: Any) -> Any:
    """Where a slice of the first part begins, were that part as long as needed."""
    if isinstance(start, (Min, sympy.Min)) and size in start.args and len(start.args) == 2:
        return next(arg for arg in start.args if arg != size)
    return start


def _unsliced(term: Term, dim: int) -> Term:
    """What a slice along ``dim`` was cut from; full slices of other dimensions are skipped."""
    while term.op is aten.slice.Tensor:
        source, axis, *_ = term.args
        if axis % len(term.sizes) != dim and source.shape != term.shape:
            break
        term = source
    return term
