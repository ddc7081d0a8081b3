"""Attention: a causal flag, a mask and no mask at all as one form."""

from __future__ import annotations

import torch

from cachefree.laws.law import Law, Rewriter
from cachefree.terms import Term

__all__ = ["ATTENTION_LAWS"]

aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default


def _with_mask(term: Term, rewriter: Rewriter) -> Term | None:
    """``sdpa`` with a Boolean mask of the full shape, whatever it was given.

    ``is_causal`` is aligned top left: query i sees keys 0…i (torch,
    ``scaled_dot_product_attention``).
    """
    query, key, value, mask, dropout, is_causal, scale, grouped = term.args
    if query.sizes[:-3] != key.sizes[:-3]:
        return None  # the scores are as wide as the wider of the two
    scores = (*query.sizes[:-1], key.sizes[-2])
    if mask is None:
        mask = rewriter.build(
            "full", (scores, True, torch.bool, term.device), scores, term, torch.bool
        )
        if is_causal:
            mask = rewriter.build(aten.tril.default, (mask, 0), scores, term, torch.bool)
    elif is_causal or mask.shape == scores:
        return None
    else:
        mask = rewriter.build("expand", (mask, scores), scores, term, mask.dtype)
    return rewriter.build(
        _SDPA, (query, key, value, mask, dropout, False, scale, grouped), term.shape, term
    )


def _repeated_heads(term: Term, rewriter: Rewriter) -> Term | None:
    """Grouped-query attention with each key and value head repeated for its query heads."""
    query, key, value, *rest, grouped = term.args
    if not grouped or len(query.sizes) < 3:
        return None
    heads, groups = query.sizes[-3], key.sizes[-3]
    if not (isinstance(heads, int) and isinstance(groups, int) and heads % groups == 0):
        return None

    def repeat(part: Term) -> Term:
        *lead, count, length, width = part.sizes
        inner = rewriter.build(
            "reshape",
            (part, (*lead, count, 1, length, width)),
            (*lead, count, 1, length, width),
            part,
        )
        shape = (*lead, count, heads // groups, length, width)
        wide = rewriter.build("expand", (inner, shape), shape, part)
        return rewriter.build(
            "reshape", (wide, (*lead, heads, length, width)), (*lead, heads, length, width), part
        )

    return rewriter.build(
        _SDPA, (query, repeat(key), repeat(value), *rest, False), term.shape, term
    )


ATTENTION_LAWS: tuple[Law, ...] = (
    Law(
        "grouped-attention",
        "sdpa(q, k, v, enable_gqa) = sdpa(q, repeat_interleave(k), repeat_interleave(v))",
        "real",
        (_SDPA,),
        _repeated_heads,
    ),
    Law(
        "attention-mask",
        "sdpa(q, k, v, causal) = sdpa(q, k, v, tril(true));  sdpa(q, k, v) = sdpa(q, k, v, true)",
        "real",
        (_SDPA,),
        _with_mask,
    ),
)
