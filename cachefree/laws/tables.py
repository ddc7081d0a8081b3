"""A part of a table is the table of a part: what is computed row by row of no input.

These laws are for tables that a model keeps, such as rotary angles, and are not tried elsewhere:
slices of what depends on inputs are better left where they are.
"""

from __future__ import annotations

from typing import Any

import torch

from cachefree.laws.law import Law, Rewriter
from cachefree.terms import SCAN, Term, topological

__all__ = ["TABLE_LAWS"]

aten = torch.ops.aten


def _slice_of_pointwise(term: Term, rewriter: Rewriter) -> Term | None:
    source, dim, *bounds = term.args
    is_pointwise = source.op == "cast" or (
        isinstance(source.op, torch._ops.OpOverload)
        and torch.Tag.pointwise in source.op.tags
        and torch.Tag.nondeterministic_seeded not in source.op.tags
    )
    if not is_pointwise or not _is_table(source):
        return None
    if any(isinstance(arg, (tuple, list)) for arg in source.args):
        return None  # operands in a list would stay as they are

    def part(arg: Any) -> Any:
        if not isinstance(arg, Term):
            return arg
        axis = dim - (len(source.sizes) - len(arg.sizes))
        if axis < 0 or arg.sizes[axis] != source.sizes[dim]:
            return arg  # one row for all
        return _part(arg, axis, bounds, term, rewriter)

    operands = [arg for arg in source.args if isinstance(arg, Term)]
    sizes = [arg.sizes[dim - len(source.sizes) + len(arg.sizes)]
             for arg in operands if len(arg.sizes) >= len(source.sizes) - dim]  # fmt: skip
    if source.sizes[dim] == 1 or any(size not in (1, source.sizes[dim]) for size in sizes):
        return None
    return rewriter.build(source.op, tuple(map(part, source.args)), term.shape, term)


def _slice_of_product(term: Term, rewriter: Rewriter) -> Term | None:
    source, dim, *bounds = term.args
    if source.op is aten.outer.default and _is_table(source):
        parts = list(source.args)
        parts[dim] = _part(parts[dim], 0, bounds, term, rewriter)
        return rewriter.build(source.op, tuple(parts), term.shape, term)
    if source.op is not aten.einsum.default or not _is_table(source):
        return None
    equation, operands, *rest = source.args
    inputs, _, output = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    if not output or "." in equation or any(len(set(part)) < len(part) for part in letters):
        return None
    sliced = tuple(
        _part(operand, names.index(output[dim]), bounds, term, rewriter)
        if output[dim] in names
        else operand
        for operand, names in zip(operands, letters, strict=True)
    )
    return rewriter.build(source.op, (equation, sliced, *rest), term.shape, term)


def _part(source: Term, axis: int, bounds: Any, term: Term, rewriter: Rewriter) -> Term:
    size = rewriter.facts.simplified(bounds[1] - bounds[0])
    shape = (*source.sizes[:axis], size, *source.sizes[axis + 1 :])
    return rewriter.build("slice", (source, axis, *bounds), shape, source)


def _is_table(term: Term) -> bool:
    """Whether a value depends on sizes and the model's own tensors alone."""
    return all(below.op not in ("input", "bound", SCAN) for below in topological([term]))


TABLE_LAWS: tuple[Law, ...] = (
    Law(
        "slice-of-pointwise",
        "f(x, y)[a:b] = f(x[a:b], y[a:b])  for f that computes each element alone",
        "exact",
        ("slice",),
        _slice_of_pointwise,
    ),
    Law(
        "slice-of-product",
        "einsum('i,j->ij', x, y)[a:b] = einsum('i,j->ij', x[a:b], y);  outer alike",
        "real",
        ("slice",),
        _slice_of_product,
    ),
)
