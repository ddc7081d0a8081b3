"""What is put at places of a mask, where there is nothing to put."""

from __future__ import annotations

import torch

from cachefree.laws.law import Law, Rewriter
from cachefree.terms import Term

__all__ = ["SCATTER_LAWS"]

aten = torch.ops.aten


def _has_no_elements(term: Term, rewriter: Rewriter) -> bool:
    return any(rewriter.facts.equal(size, 0) for size in term.sizes)


def _nothing_scattered(term: Term, rewriter: Rewriter) -> Term | None:
    whole, _, source = term.args[:3]
    is_same = whole.shape == term.shape and whole.dtype == term.dtype
    return whole if is_same and _has_no_elements(source, rewriter) else None


def _nothing_put(term: Term, rewriter: Rewriter) -> Term | None:
    whole, places, values = term.args[:3]
    if not isinstance(values, Term) or not _has_no_elements(values, rewriter):
        return None
    is_same = whole.shape == term.shape and whole.dtype == term.dtype
    masks = [place for place in places if isinstance(place, Term)]
    is_mask = len(masks) == 1 and masks[0].dtype == torch.bool
    return whole if is_same and is_mask else None


SCATTER_LAWS: tuple[Law, ...] = (
    Law(
        "nothing-scattered",
        "masked_scatter(x, mask, e) = x  for e without elements, wherever it runs",
        "exact",
        (aten.masked_scatter.default,),
        _nothing_scattered,
    ),
    Law(
        "nothing-put",
        "index_put(x, mask, e) = x  for e without elements, wherever it runs",
        "exact",
        (aten.index_put.default,),
        _nothing_put,
    ),
)
"""Laws of inputs without rows: a mask that has places for them is an error of the left side."""
