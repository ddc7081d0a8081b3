"""Masks: choices whose condition is constant."""

from __future__ import annotations

from typing import Any

import torch

from cachefree.laws.law import Law, Rewriter
from cachefree.terms import Term

__all__ = ["MASK_LAWS"]

aten = torch.ops.aten


def _truth(term: Any) -> bool | None:
    if isinstance(term, Term) and term.op == "full" and isinstance(term.args[1], bool):
        return term.args[1]
    return None


def _where(term: Term, rewriter: Rewriter) -> Term | None:
    condition, yes, no = term.args
    truth = _truth(condition)
    if truth is None:
        return None
    chosen = yes if truth else no
    if not isinstance(chosen, Term) or chosen.dtype != term.dtype:
        return None
    return (
        chosen
        if chosen.shape == term.shape
        else rewriter.build("expand", (chosen, term.shape), term.shape, term)
    )


def _where_number(term: Term, rewriter: Rewriter) -> Term | None:
    """Numbers as tensors without dimensions, where they do not change the dtype."""
    condition, yes, no = term.args
    if not any(isinstance(value, Term) and value.dtype == term.dtype for value in (yes, no)):
        return None

    def tensor(value: Any) -> Term:
        if isinstance(value, Term):
            return value
        return rewriter.build("full", ((), value, term.dtype, term.device), (), term)

    return rewriter.build(aten.where.self, (condition, tensor(yes), tensor(no)), term.shape, term)


def _masked_fill(term: Term, rewriter: Rewriter) -> Term | None:
    source, mask, _ = term.args
    return source if _truth(mask) is False and source.shape == term.shape else None


def _neutral_truth(term: Term, rewriter: Rewriter) -> Term | None:
    first: Term
    second: Term
    first, second = term.args
    if first.dtype != torch.bool or second.dtype != torch.bool:
        return None
    neutral = term.op in (aten.logical_and.default, aten.bitwise_and.Tensor)
    for one, other in ((first, second), (second, first)):
        truth = _truth(one)
        if truth is neutral and other.shape == term.shape:
            return other
        if truth is (not neutral):
            return rewriter.build(
                "full", (term.shape, not neutral, term.dtype, term.device), term.shape, term
            )
    return None


MASK_LAWS: tuple[Law, ...] = (
    Law(
        "where",
        "where(true, x, y) = x;  where(false, x, y) = y",
        "exact",
        (aten.where.self,),
        _where,
    ),
    Law(
        "where-number",
        "where(c, x, number) = where(c, x, full((), number))",
        "exact",
        (aten.where.ScalarOther, aten.where.ScalarSelf),
        _where_number,
    ),
    Law(
        "fill-nothing",
        "masked_fill(x, false, c) = x",
        "exact",
        (aten.masked_fill.Scalar, aten.masked_fill.Tensor),
        _masked_fill,
    ),
    Law(
        "neutral-truth",
        "x ∧ true = x;  x ∨ false = x;  x ∧ false = false;  x ∨ true = true",
        "exact",
        (
            aten.logical_and.default,
            aten.logical_or.default,
            aten.bitwise_and.Tensor,
            aten.bitwise_or.Tensor,
        ),
        _neutral_truth,
    ),
)
