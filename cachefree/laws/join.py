"""Joins: concatenation with a neutral element of length 0, and slices of joins."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from cachefree.laws.law import Law, Rewriter
from cachefree.terms import Term

__all__ = ["JOIN_LAWS"]

aten = torch.ops.aten


def _as_cat(term: Term, rewriter: Rewriter) -> Term | None:
    parts, dim = term.args
    rank = len(term.sizes)
    return rewriter.build("cat", (parts, dim % rank), term.shape, term)


def _as_stacked_rows(term: Term, rewriter: Rewriter) -> Term | None:
    """``hstack`` joins on axis 1, or 0 for vectors; ``vstack`` on axis 0."""
    parts = term.args[0]
    if any(len(part.sizes) != len(term.sizes) for part in parts):
        return None
    dim = 0 if term.op is aten.vstack.default or len(term.sizes) == 1 else 1
    return rewriter.build("cat", (parts, dim), term.shape, term)


def _as_joined_unsqueezed(term: Term, rewriter: Rewriter) -> Term | None:
    parts, dim = term.args
    dim %= len(term.sizes)
    shape = (*term.sizes[:dim], 1, *term.sizes[dim + 1 :])
    rows = tuple(
        rewriter.build("reshape", (part, shape), shape, term, part.dtype) for part in parts
    )
    return rewriter.build("cat", (rows, dim), term.shape, term)


def _cat(term: Term, rewriter: Rewriter) -> Term | None:
    parts, dim = term.args
    if any(part.dtype != term.dtype for part in parts):
        same = tuple(
            part
            if part.dtype == term.dtype
            else rewriter.build("cast", (part, term.dtype, term.device), part.shape, term)
            for part in parts
        )
        return rewriter.build("cat", (same, dim), term.shape, term)
    kept: list[Term] = []
    for part in parts:
        if len(part.sizes) != len(term.sizes) and any(size == 0 for size in part.sizes):
            continue  # torch.cat takes empty tensors of rank 1 as absent
        if part.op == "cat" and part.args[1] == dim:
            kept.extend(part.args[0])
        elif part.sizes[dim] != 0:
            kept.append(part)
    if not kept:
        return None
    if len(kept) == 1:
        return kept[0]
    kept = _merged(kept, dim, rewriter)
    if len(kept) == 1:
        return kept[0]
    return (
        rewriter.build("cat", (tuple(kept), dim), term.shape, term)
        if tuple(kept) != parts
        else None
    )


def _merged(parts: list[Term], dim: int, rewriter: Rewriter) -> list[Term]:
    """Neighbours that continue one another as one: ``x[a:b], x[b:c] → x[a:c]``, equal rows."""
    merged: list[Term] = []
    for part in parts:
        before = merged[-1] if merged else None
        joined = _continued(before, part, dim, rewriter) if before is not None else None
        if joined is None:
            merged.append(part)
        else:
            merged[-1] = joined
    return merged


def _continued(one: Term, two: Term, dim: int, rewriter: Rewriter) -> Term | None:
    length = sympy.sympify(one.sizes[dim]) + two.sizes[dim]
    shape = (*one.sizes[:dim], rewriter.facts.simplified(length), *one.sizes[dim + 1 :])
    row = _only_row(one, dim)
    if row is not None and row is _only_row(two, dim):
        return rewriter.build("expand", (row, shape), shape, one)
    if (
        one.op == "slice"
        and two.op == "slice"
        and one.args[:2] == two.args[:2]
        and one.args[1] == dim
    ):
        if rewriter.facts.equal(one.args[3], two.args[2]):
            return rewriter.build("slice", (*one.args[:3], two.args[3], 1), shape, one)
        return None
    if one.op == "full" and two.op == "full" and repr(one.args[1:]) == repr(two.args[1:]):
        return rewriter.build("full", (shape, *one.args[1:]), shape, one)
    if one.op == "arange" and two.op == "arange" and one.args[2] == two.args[2]:
        start, count, step = one.args[:3]
        if rewriter.facts.equal(start + count * step, two.args[0]):
            return rewriter.build("arange", (start, shape[0], step, *one.args[3:]), shape, one)
    return None


def _only_row(term: Term, dim: int) -> Term | None:
    """What every row of a tensor along one axis is made of; None where the rows may differ."""
    source: Term = term.args[0] if term.op == "expand" else term
    place = dim - (len(term.sizes) - len(source.sizes))
    return source if place < 0 or source.sizes[place] == 1 else None


def _slice_of_cat(term: Term, rewriter: Rewriter) -> Term | None:
    source, dim, start, end, _ = term.args
    if source.op != "cat":
        return None
    parts, joined = source.args
    if joined != dim:
        return _slice_each(term, rewriter)
    facts, spans, offset = rewriter.facts, [], sympy.Integer(0)
    for part in parts:
        after = facts.simplified(offset + part.sizes[dim])
        if not (facts.at_most(after, start) or facts.at_most(end, offset)):
            first = _within(facts, start, offset)
            last = _within(facts, end, after, is_end=True)
            if first is None or last is None or not facts.at_most(first, last):
                return None  # whether the slice reaches this part is not known
            spans.append((part, facts.simplified(first - offset), facts.simplified(last - offset)))
        offset = after
    kept = [_span(part, dim, first, last, term, rewriter) for part, first, last in spans]
    if not kept:
        return None
    return (
        kept[0] if len(kept) == 1 else rewriter.build("cat", (tuple(kept), dim), term.shape, term)
    )


def _span(part: Term, dim: int, first: Any, last: Any, term: Term, rewriter: Rewriter) -> Term:
    length = rewriter.facts.simplified(sympy.sympify(last) - first)
    shape = (*part.sizes[:dim], length, *part.sizes[dim + 1 :])
    return rewriter.build("slice", (part, dim, first, last, 1), shape, term)


def _within(facts: Any, bound: Any, edge: Any, *, is_end: bool = False) -> Any:
    """``max(bound, edge)`` for a start, ``min`` of them for an end, where the facts decide it."""
    if facts.at_most(bound, edge):
        return bound if is_end else edge
    if facts.at_most(edge, bound):
        return edge if is_end else bound
    return None


def _slice_each(term: Term, rewriter: Rewriter) -> Term:
    source, dim, start, end, _ = term.args
    parts, joined = source.args
    rows = tuple(
        rewriter.build(
            "slice",
            (part, dim, start, end, 1),
            (*part.sizes[:dim], term.sizes[dim], *part.sizes[dim + 1 :]),
            term,
        )
        for part in parts
    )
    return rewriter.build("cat", (rows, joined), term.shape, term)


JOIN_LAWS: tuple[Law, ...] = (
    Law(
        "concat",
        "concat(xs, d) = cat(xs, d)",
        "exact",
        (aten.cat.default, aten.concat.default, aten.concatenate.default),
        _as_cat,
    ),
    Law(
        "hstack",
        "hstack(xs) = cat(xs, 1);  vstack(xs) = cat(xs, 0)",
        "exact",
        (aten.hstack.default, aten.vstack.default),
        _as_stacked_rows,
    ),
    Law(
        "stack",
        "stack(xs, d) = cat([unsqueeze(x, d) for x in xs], d)",
        "exact",
        (aten.stack.default,),
        _as_joined_unsqueezed,
    ),
    Law(
        "cat-empty",
        "cat([e, x], d) = x  if size(e, d) = 0 and the dtypes agree;  cat([x], d) = x;  "
        "cat is associative;  cat([x, x], d) = expand(x, …)  if size(x, d) = 1",
        "exact",
        ("cat",),
        _cat,
    ),
    Law(
        "slice-of-cat",
        "cat([x, y], d)[a:b] = the slices of x and y that a and b fall into",
        "exact",
        ("slice",),
        _slice_of_cat,
    ),
)
