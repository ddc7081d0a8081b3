"""Masks: choices whose condition is constant."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from cachefree.laws.elementwise import uniform
from cachefree.laws.law import Law, Rewriter
from cachefree.terms import Term

__all__ = ["MASK_LAWS"]

aten = torch.ops.aten


def _truth(term: Any, rewriter: Rewriter) -> bool | None:
    if not isinstance(term, Term) or term.dtype != torch.bool:
        return None
    if term.op == "full":
        return None if isinstance(term.args[1], sympy.Basic) else bool(term.args[1])
    value = uniform(term, rewriter.facts)
    return value if isinstance(value, bool) else None


def _where(term: Term, rewriter: Rewriter) -> Term | None:
    condition, yes, no = term.args
    truth = _truth(condition, rewriter)
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
    return source if _truth(mask, rewriter) is False and source.shape == term.shape else None


def _neutral_truth(term: Term, rewriter: Rewriter) -> Term | None:
    first: Term
    second: Term
    first, second = term.args
    if first.dtype != torch.bool or second.dtype != torch.bool:
        return None
    neutral = term.op in (aten.logical_and.default, aten.bitwise_and.Tensor)
    for one, other in ((first, second), (second, first)):
        truth = _truth(one, rewriter)
        if truth is neutral and other.shape == term.shape:
            return other
        if truth is (not neutral):
            return rewriter.build(
                "full", (term.shape, not neutral, term.dtype, term.device), term.shape, term
            )
    return None


def _nothing_added(term: Term, rewriter: Rewriter) -> Term | None:
    source, mask = term.args[:2]
    if len(term.args) > 2 and term.args[2] != 1:
        return None
    for one, other in ((source, mask), (mask, source)):
        if not isinstance(one, Term) or not isinstance(other, Term):
            continue
        if one.shape != term.shape or one.dtype != term.dtype or other.op == "full":
            continue
        if uniform(other, rewriter.facts) in (0.0, -0.0):
            return one
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
    Law(
        "mask-nothing",
        "x + m = x  if every element of m is 0, m of sizes alone",
        "real",
        (aten.add.Tensor,),
        _nothing_added,
    ),
)
