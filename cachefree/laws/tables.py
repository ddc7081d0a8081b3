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
    letters = [
        _spelled_out(part, len(operand.sizes))
        for part, operand in zip(inputs.split(","), operands, strict=True)
    ]
    output = _spelled_out(output, len(source.sizes))
    if not output or any(len(set(part)) < len(part) for part in letters):
        return None
    axes = [names.index(output[dim]) if output[dim] in names else None for names in letters]
    sizes = [
        None if axis is None else operand.sizes[axis]
        for operand, axis in zip(operands, axes, strict=True)
    ]
    if source.sizes[dim] == 1 or any(n not in (None, 1, source.sizes[dim]) for n in sizes):
        return None
    sliced = tuple(
        operand if axis is None or size == 1 else _part(operand, axis, bounds, term, rewriter)
        for operand, axis, size in zip(operands, axes, sizes, strict=True)
    )
    return rewriter.build(source.op, (equation, sliced, *rest), term.shape, term)


def _spelled_out(letters: str, rank: int) -> str:
    """The axes of an operand of einsum, with a name for each that ``...`` stands for."""
    count = rank - len(letters.replace("...", ""))
    return letters.replace("...", "0123456789"[10 - count :])


def _part(source: Term, axis: int, bounds: Any, term: Term, rewriter: Rewriter) -> Term:
    size = rewriter.facts.simplified(bounds[1] - bounds[0])
    shape = (*source.sizes[:axis], size, *source.sizes[axis + 1 :])
    return rewriter.build("slice", (source, axis, *bounds), shape, source)


def _is_table(term: Term) -> bool:
    """Whether a value depends on sizes and the model's own tensors alone."""
    return all(below.op not in ("input", "bound", SCAN) for below in topological([term]))


def _slice_of_written(term: Term, rewriter: Rewriter) -> Term | None:
    source, dim, first, last, *_ = term.args
    found = _rows_written(source)
    if found is None or found[2] != dim or term.args[4:] not in ((), (1,)):
        return None
    rows, start = found[1], found[3]
    facts = rewriter.facts
    end = start + rows.sizes[dim]
    if facts.at_most(0, start) and facts.at_most(start, first) and facts.at_most(last, end):
        return _part(rows, dim, (first - start, last - start, 1), term, rewriter)
    return None


def _written_over(term: Term, rewriter: Rewriter) -> Term | None:
    found = _rows_written(term)
    before = None if found is None else _rows_written(found[0])
    if found is None or before is None or found[2] != before[2]:
        return None
    _, rows, dim, start = found
    whole, covered, _, begin = before
    facts = rewriter.facts
    is_over = (
        facts.at_most(0, start)
        and facts.at_most(start, begin)
        and facts.at_most(begin + covered.sizes[dim], start + rows.sizes[dim])
    )
    if not is_over:
        return None
    return rewriter.build(term.op, (whole, *term.args[1:]), term.shape, term)


def _rows_written(term: Term) -> tuple[Term, Term, int, Any] | None:
    """A tensor, the rows written to it one after the other, the axis, and the first one's place."""
    if term.op is not aten.slice_scatter.default:
        return None
    args: tuple[Any, ...] = (*term.args, *(0, None, None, 1)[len(term.args) - 2 :])
    whole, rows, dim, start, _, step = args
    if step != 1 or whole.dtype != rows.dtype or len(whole.sizes) != len(rows.sizes):
        return None
    return whole, rows, dim % len(whole.sizes), 0 if start is None else start


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
    Law(
        "slice-of-written",
        "slice_scatter(x, y, d, a, b)[c:e] = y[c-a:e-a]  if those rows of d are among y's",
        "exact",
        ("slice",),
        _slice_of_written,
    ),
    Law(
        "written-over",
        "slice_scatter(slice_scatter(x, y, d, a, b), z, d, c, e) = slice_scatter(x, z, d, c, e)  "
        "if the rows of y are among those of z",
        "exact",
        (aten.slice_scatter.default,),
        _written_over,
    ),
)
