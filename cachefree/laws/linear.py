"""Projections: a part of a fused projection is the projection with a part of the weight."""

from __future__ import annotations

import sympy
import torch

from cachefree.laws.law import Law, Rewriter
from cachefree.terms import Term

__all__ = ["LINEAR_LAWS"]

aten = torch.ops.aten


def _slice_of_permute(term: Term, rewriter: Rewriter) -> Term | None:
    source, dim, start, end, _ = term.args
    if source.op != "permute":
        return None
    inner, order = source.args
    place = order[dim]
    shape = (*inner.sizes[:place], term.sizes[dim], *inner.sizes[place + 1 :])
    part = rewriter.build("slice", (inner, place, start, end, 1), shape, term)
    return rewriter.build("permute", (part, order), term.shape, term)


def _slice_of_reshape(term: Term, rewriter: Rewriter) -> Term | None:
    """One entry of a dimension that a reshape split off is a slice of the dimension before."""
    source, dim, start, end, _ = term.args
    if source.op != "reshape":
        return None
    inner = source.args[0]
    place = _split_place(inner.sizes, source.sizes, dim)
    if place is None:
        return None
    width = sympy.Integer(1)
    for size in source.sizes[dim + 1 : dim + 1 + place[1]]:
        width *= size
    axis = place[0]
    first, last = rewriter.facts.simplified(start * width), rewriter.facts.simplified(end * width)
    shape = (*inner.sizes[:axis], rewriter.facts.simplified(last - first), *inner.sizes[axis + 1 :])
    part = rewriter.build("slice", (inner, axis, first, last, 1), shape, term)
    return rewriter.build("reshape", (part, term.shape), term.shape, term)


def _split_place(
    before: tuple[object, ...], after: tuple[object, ...], dim: int
) -> tuple[int, int] | None:
    """The axis that ``after[dim:…]`` splits, and how many more dimensions it is split into.

    Sizes of 1 do not count.
    """
    lead = [size for size in after[:dim] if size != 1]
    axis = 0
    for size in lead:
        while axis < len(before) and before[axis] == 1:
            axis += 1
        if axis >= len(before) or before[axis] != size:
            return None
        axis += 1
    while axis < len(before) and before[axis] == 1:
        axis += 1
    if axis >= len(before):
        return None
    product = sympy.Integer(1)
    for count, size in enumerate(after[dim:]):
        product *= size
        if product == before[axis]:
            return axis, count
    return None


def _slice_of_linear(term: Term, rewriter: Rewriter) -> Term | None:
    source, dim, start, end, _ = term.args
    if source.op is not aten.linear.default:
        return None
    inputs, weight, bias = source.args
    if dim != len(source.sizes) - 1:
        shape = (*inputs.sizes[:dim], term.sizes[dim], *inputs.sizes[dim + 1 :])
        part = rewriter.build("slice", (inputs, dim, start, end, 1), shape, inputs)
        return rewriter.build(source.op, (part, weight, bias), term.shape, term)
    count = term.sizes[dim]
    rows = rewriter.build("slice", (weight, 0, start, end, 1), (count, weight.sizes[1]), weight)
    offsets = (
        None if bias is None else rewriter.build("slice", (bias, 0, start, end, 1), (count,), bias)
    )
    return rewriter.build(source.op, (inputs, rows, offsets), term.shape, term)


LINEAR_LAWS: tuple[Law, ...] = (
    Law(
        "slice-of-permute",
        "permute(x, p)[a:b on d] = permute(x[a:b on p(d)], p)",
        "exact",
        ("slice",),
        _slice_of_permute,
    ),
    Law(
        "slice-of-reshape",
        "reshape(x, (…, n, m))[a:b on n] = reshape(x[a·m : b·m])",
        "exact",
        ("slice",),
        _slice_of_reshape,
    ),
    Law(
        "slice-of-linear",
        "linear(x, W, b)[…, i:j] = linear(x, W[i:j], b[i:j])",
        "real",
        ("slice",),
        _slice_of_linear,
    ),
)
