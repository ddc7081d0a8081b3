"""A memory that takes rows of the past only where there are too few new ones."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import Max

from cachefree.rules.rule import Edit, Site
from cachefree.terms import Term

__all__ = ["LastRowsOfBoth"]

aten = torch.ops.aten


class LastRowsOfBoth:
    """Keeps the last rows of all, whether or not the new rows alone fill the memory.

    Before: ``new[:, -keep:]``; and ``cat([past[:, -1:], new])`` where a call brings one row.

    After: ``cat([past, new])[:, -keep:]``.

    Why equal: where there are ``keep`` new rows or more, the last ``keep`` rows of a join lie in
    its second part; where there is one, they are it and the past's last ``keep - 1``.
    """

    name = "last rows of both"
    neutral = "zero length, cut after the join"

    def edit(self, site: Site) -> Edit | None:
        """A cut of the new rows made a cut of all; None where no such cut differs."""
        other = site.divergence.other
        if other.op not in (aten.cat.default, "cat"):
            return None
        parts, dim, *_ = (*other.args, 0)
        past = parts[0]
        while past.op == "slice":
            past = past.args[0]
        if past is parts[0] or past.op != "input":
            return None
        dim %= len(other.sizes)
        for source in site.sources:
            cut = _plain(source)
            keep = self._kept(cut, dim)
            if keep is not None:
                return Edit(source, self._cut(site, cut, past, dim, keep))
        return None

    def _kept(self, term: Term, dim: int) -> Any:
        """How many rows a cut keeps, from the end on; None where the value is no such cut."""
        if term.op is not aten.slice.Tensor:
            return None
        rows, axis, start, *_ = term.args
        if (
            rows.sizes == term.sizes
            or axis % len(term.sizes) != dim
            or not isinstance(start, (Max, sympy.Max))
        ):
            return None
        begins = [arg for arg in start.args if arg != 0]
        if len(start.args) != 2 or len(begins) != 1:
            return None
        keep = sympy.expand(rows.sizes[dim] - begins[0])
        return keep if keep.is_Integer and keep > 0 else None

    def _cut(self, site: Site, term: Term, past: Term, dim: int, keep: Any) -> Term:
        rows = term.args[0]
        total = sympy.expand(past.sizes[dim] + rows.sizes[dim])
        shape = (*term.sizes[:dim], total, *term.sizes[dim + 1 :])
        joined = site.table.like(rows, aten.cat.default, ((past, rows), dim), shape)
        start = Max(0, sympy.expand(total - keep))
        kept = (*term.sizes[:dim], total - start, *term.sizes[dim + 1 :])
        return site.table.like(term, aten.slice.Tensor, (joined, dim, start, total, 1), kept)


def _plain(term: Term) -> Term:
    """A value without copies, and without slices that keep all of it.

    The whole of it is edited, since copies of a cut have its length.
    """
    while term.op is aten.clone.default or (
        term.op is aten.slice.Tensor and term.args[0].shape == term.shape
    ):
        term = term.args[0]
    return term
