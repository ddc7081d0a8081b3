"""A mask that only the first call applies."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from cachefree.laws.evaluation import is_of_sizes_alone
from cachefree.rules.rule import Edit, Site, at_first_call
from cachefree.terms import Table, Term

__all__ = ["FirstCallMask"]

aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default


class FirstCallMask:
    """Applies the first call's mask where nothing is past, and nothing elsewhere.

    Before: ``if past is None: scores = scores.masked_fill(mask, -inf)`` (or ``is_causal=past is
    None``), and no mask later.

    After: one mask for all calls: the first call's, padded over the past, and switched off where
    the past is not empty.

    Why equal: at past 0 the padding has no columns and the switch is off, so the mask is the first
    call's; at past ≥ 1 it masks nothing, and attention with a mask that masks nothing is attention
    without one.
    """

    name = "mask of the first call"
    neutral = "a mask that masks nothing once there is a past"

    def edit(self, site: Site) -> Edit | None:
        """The later path with the first call's mask; None where it is not the mask that differs."""
        other = site.divergence.other
        if len(site.past) != 1:
            return None
        for source in site.sources:
            if other.op is _SDPA:
                is_attention = source.op is _SDPA  # and not a view that is the same value
                new = self._attention(site, source, other) if is_attention else None
            elif other.op is aten.masked_fill.Scalar:
                new = self._masked_fill(site, source, other)
            elif other.op is aten.where.self:
                new = self._where(site, source, other)
            elif other.op is aten.add.Tensor:
                new = self._added(site, source, other)
            else:
                return None
            if new is not None:
                return Edit(source, new)
        return None

    def _attention(self, site: Site, source: Term, other: Term) -> Term | None:
        if source.args[3] is not None or source.args[5]:
            return None
        query, key = source.args[0], source.args[1]
        scores = (query.sizes[-2], key.sizes[-2])
        mask: Term | None = other.args[3]
        if other.args[5]:
            first = site.table.make(
                "full",
                ((scores[0], scores[0]), True, torch.bool, source.device),
                (scores[0], scores[0]),
                torch.bool,
                source.device,
                source.line,
            )
            mask = site.table.make(
                aten.tril.default, (first, 0), first.shape, torch.bool, source.device, source.line
            )
        if mask is None:
            return None
        gated = _gated(site, mask, scores[1], neutral=True if mask.dtype == torch.bool else 0.0)
        if gated is None:
            return None
        return site.table.like(source, _SDPA, (*source.args[:3], gated, *source.args[4:]))

    def _masked_fill(self, site: Site, source: Term, other: Term) -> Term | None:
        _, mask, number = other.args
        gated = _gated(site, mask, source.sizes[-1], neutral=False)
        return (
            None
            if gated is None
            else site.table.like(source, aten.masked_fill.Scalar, (source, gated, number))
        )

    def _where(self, site: Site, source: Term, other: Term) -> Term | None:
        condition, yes, no = other.args
        if yes.op == "full":
            gated = _gated(site, condition, source.sizes[-1], neutral=False)
            return (
                None
                if gated is None
                else site.table.like(source, aten.where.self, (gated, yes, source))
            )
        if no.op == "full":
            gated = _gated(site, condition, source.sizes[-1], neutral=True)
            return (
                None
                if gated is None
                else site.table.like(source, aten.where.self, (gated, source, no))
            )
        return None

    def _added(self, site: Site, source: Term, other: Term) -> Term | None:
        for mask, rest in ((other.args[1], other.args[0]), (other.args[0], other.args[1])):
            if (
                isinstance(mask, Term)
                and isinstance(rest, Term)
                and mask.dtype == source.dtype
                and _is_mask_of(mask, rest)
            ):
                gated = _gated(site, mask, source.sizes[-1], neutral=0.0)
                if gated is not None:
                    return site.table.like(source, aten.add.Tensor, (source, gated, 1))
        return None


def _is_mask_of(mask: Term, scores: Term) -> bool:
    """Whether one operand of a sum is broadcast over the other, or made of sizes alone."""
    return (
        is_of_sizes_alone(mask)
        or (len(mask.sizes) < len(scores.sizes))
        or (1 in mask.sizes and 1 not in scores.sizes)
    )


def _gated(site: Site, mask: Term, width: Any, *, neutral: bool | float) -> Term | None:
    """The mask padded to ``width`` columns, and neutral everywhere where the past is not empty."""
    past = site.past[0]
    if mask.sizes[-1] != 1 and sympy.expand(mask.sizes[-1] - at_first_call(width, site.past)) != 0:
        return None
    table = site.table
    if mask.sizes[-1] != 1:
        extra = sympy.expand(width - mask.sizes[-1])
        columns = (*mask.sizes[:-1], extra)
        padding = table.make(
            "full",
            (columns, neutral, mask.dtype, mask.device),
            columns,
            mask.dtype,
            mask.device,
            mask.line,
        )
        mask = table.like(mask, aten.cat.default, ((padding, mask), -1), (*mask.sizes[:-1], width))
    later = _is_later(table, past, mask)
    if mask.dtype == torch.bool and neutral:
        return table.like(mask, aten.logical_or.default, (mask, later))
    if mask.dtype == torch.bool:
        first = table.like(later, aten.logical_not.default, (later,))
        return table.like(mask, aten.logical_and.default, (mask, first))
    return table.like(mask, aten.masked_fill.Scalar, (mask, later, neutral))


def _is_later(table: Table, past: sympy.Symbol, like: Term) -> Term:
    """A Boolean of shape (1,): whether anything is past."""
    length = table.make(
        "arange", (past, 1, 1, torch.int64, like.device), (1,), torch.int64, like.device, like.line
    )
    return table.make(aten.gt.Scalar, (length, 0), (1,), torch.bool, like.device, like.line)
