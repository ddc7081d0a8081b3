"""What is written over all of a tensor: nothing of the tensor is left."""

from __future__ import annotations

import torch

from cachefree.laws.law import Law, Rewriter
from cachefree.terms import Term

__all__ = ["OVERWRITE_LAWS"]

aten = torch.ops.aten


def _only_row(term: Term, rewriter: Rewriter) -> Term | None:
    whole, row, dim, place = term.args
    is_only = rewriter.facts.equal(whole.sizes[dim], 1) and place in (0, -1)
    if not is_only or row.dtype != whole.dtype or whole.shape != term.shape:
        return None
    return rewriter.build("reshape", (row, term.sizes), term.sizes, term)


def _every_row(term: Term, rewriter: Rewriter) -> Term | None:
    whole, rows, *_ = term.args
    step = term.args[5] if len(term.args) > 5 else 1
    is_same = rows.dtype == whole.dtype and whole.shape == term.shape
    if not is_same or step != 1 or len(rows.sizes) != len(whole.sizes):
        return None
    return rows if all(map(rewriter.facts.equal, rows.sizes, whole.sizes)) else None


OVERWRITE_LAWS: tuple[Law, ...] = (
    Law(
        "only-row",
        "select_scatter(x, y, d, 0) = unsqueeze(y, d)  if x has one row, of y's dtype",
        "exact",
        (aten.select_scatter.default,),
        _only_row,
    ),
    Law(
        "every-row",
        "slice_scatter(x, y, d, a, b) = y  if y is as large as x, of its dtype",
        "exact",
        (aten.slice_scatter.default,),
        _every_row,
    ),
)
