"""The first rows and the last rows of a memory, kept once it is longer than both."""

from __future__ import annotations

import sympy
import torch
from torch.utils._sympy.functions import Max, Min

from cachefree.rules.rule import Edit, Site
from cachefree.terms import Term

__all__ = ["KeptEnds"]

aten = torch.ops.aten


class KeptEnds:
    """Keeps the first and the last rows of a memory, however long it is.

    Before: ``rows`` while there are few; ``cat([rows[:a], rows[n - w:]])`` once there are more than
    ``a + w``.

    After: ``cat([rows[:min(a, n)], rows[max(a, n - w):]])``.

    Why equal: where ``n <= a + w`` the second part begins where the first one ends, so that the
    join is all rows; where ``n >= a + w`` the bounds are those that they were.
    """

    name = "kept ends"
    neutral = "zero length, cut after the join"

    def edit(self, site: Site) -> Edit | None:
        """The join with bounds that meet; None where the value is no join of two ends."""
        for source in site.sources:
            found = self._ends(source)
            if found is not None:
                new = self._meeting(site, source, *found)
                if new is not source:
                    return Edit(source, new)
        return None

    def _ends(self, term: Term) -> tuple[Term, Term, int] | None:
        if term.op not in (aten.cat.default, aten.concat.default):
            return None
        parts, dim, *_ = (*term.args, 0)
        dim %= len(term.sizes)
        if len(parts) != 2 or any(part.op is not aten.slice.Tensor for part in parts):
            return None
        (one, axis, start, *_), (other, other_axis, *_) = (part.args for part in parts)
        is_same = _plain(one) is _plain(other) and start == 0
        is_along = axis % len(term.sizes) == other_axis % len(term.sizes) == dim
        return (parts[0], parts[1], dim) if is_same and is_along else None

    def _meeting(self, site: Site, term: Term, head: Term, tail: Term, dim: int) -> Term:
        rows = tail.args[0]
        total = sympy.sympify(rows.sizes[dim])
        first = sympy.sympify(head.args[3])
        start = sympy.expand(total - tail.sizes[dim])
        end = Min(first, total)
        begin = Min(Max(first, start), total)
        parts = tuple(
            site.table.like(
                part,
                aten.slice.Tensor,
                (part.args[0], dim, low, high, 1),
                (*part.sizes[:dim], sympy.expand(high - low), *part.sizes[dim + 1 :]),
            )
            for part, low, high in ((head, sympy.Integer(0), end), (tail, begin, total))
        )
        size = sympy.expand(sum((part.sizes[dim] for part in parts), sympy.Integer(0)))
        shape = (*term.sizes[:dim], size, *term.sizes[dim + 1 :])
        return site.table.like(term, term.op, (parts, dim), shape)


def _plain(term: Term) -> Term:
    """A value without slices that keep all of it."""
    while term.op is aten.slice.Tensor and term.args[0].shape == term.shape:
        term = term.args[0]
    return term
