"""Attention: a causal flag, a mask and no mask at all as one form."""

from __future__ import annotations

from typing import Any

import torch

from cachefree.laws.law import Law, Rewriter
from cachefree.terms import Term

__all__ = ["ATTENTION_LAWS"]

aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default


def _broadcasts(mask: Term, scores: tuple[Any, ...], rewriter: Rewriter) -> bool:
    """Whether a mask has the sizes of the scores, or 1, on every axis."""
    sizes = tuple(reversed(mask.sizes))
    return len(sizes) <= len(scores) and all(
        size == 1 or rewriter.facts.equal(size, score)
        for size, score in zip(sizes, reversed(scores), strict=False)
    )


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
    elif is_causal or mask.shape == scores or not _broadcasts(mask, scores, rewriter):
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

    keys, values = (_repeated(part, heads // groups, rewriter) for part in (key, value))
    return rewriter.build(_SDPA, (query, keys, values, *rest, False), term.shape, term)


def _repeated(part: Term, times: int, rewriter: Rewriter) -> Term:
    """Each head of ``(…, H, L, D)`` so many times in a row."""
    *lead, count, length, width = part.sizes
    narrow = (*lead, count, 1, length, width)
    wide = (*lead, count, times, length, width)
    flat = (*lead, count * times, length, width)
    inner = rewriter.build("reshape", (part, narrow), narrow, part)
    expanded = rewriter.build("expand", (inner, wide), wide, part)
    return rewriter.build("reshape", (expanded, flat), flat, part)


def _packed_heads(term: Term, rewriter: Rewriter) -> Term | None:
    """Query heads that stand where tokens stand, as heads of one token again.

    With one token a group of query heads that shares a key head is given as that many tokens.
    """
    query, key, value, mask, dropout, is_causal, scale, grouped = term.args
    if query.op != "reshape" or is_causal or grouped or len(query.sizes) != 4:
        return None
    batch, groups, count, width = query.sizes
    if not (isinstance(count, int) and count > 1 and isinstance(groups, int)):
        return None
    if mask is None or len(mask.sizes) != 4 or key.sizes[1] != groups:
        return None
    heads = (batch, groups * count, 1)
    scores = (batch, groups, count, key.sizes[-2])
    if not _broadcasts(mask, scores, rewriter):
        return None
    if mask.op == "expand" and mask.args[0].sizes[-3:-1] == (1, 1):
        masks = rewriter.build(
            "expand", (mask.args[0], (*heads, scores[-1])), (*heads, scores[-1]), mask
        )
    elif mask.shape == scores:
        masks = rewriter.build("reshape", (mask, (*heads, scores[-1])), (*heads, scores[-1]), mask)
    else:
        return None
    one = rewriter.build("reshape", (query, (*heads, width)), (*heads, width), query)
    keys, values = (_repeated(part, count, rewriter) for part in (key, value))
    shape = (*heads, term.sizes[-1])
    attended = rewriter.build(
        _SDPA, (one, keys, values, masks, dropout, False, scale, False), shape, term
    )
    return rewriter.build("reshape", (attended, term.shape), term.shape, term)


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
    Law(
        "packed-heads",
        "sdpa(reshape(q, (B, G, n, D)), k, v) = sdpa(q, repeat(k, n), repeat(v, n)), reshaped",
        "real",
        (_SDPA,),
        _packed_heads,
    ),
)
