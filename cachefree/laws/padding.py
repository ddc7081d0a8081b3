"""Padding: a join with a constant, and convolutions that pad by themselves."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from cachefree.laws.alone import EACH_ALONE
from cachefree.laws.law import Law, Rewriter
from cachefree.terms import Term

__all__ = ["PADDING_LAWS", "padding_of"]

aten = torch.ops.aten
_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


def padding_of(term: Term) -> tuple[Term, dict[int, tuple[Any, Any]], Any] | None:
    """What is padded, by how much in front and behind on which axes, and with which number."""
    if term.op is aten.pad.default:
        source, amounts, mode, number = term.args
        if mode != "constant":
            return None
    else:
        source, amounts, number = term.args
    if isinstance(number, (Term, sympy.Basic)):
        return None
    rank = len(source.sizes)
    pairs = {
        rank - 1 - place: (amounts[2 * place], amounts[2 * place + 1])
        for place in range(len(amounts) // 2)
    }
    return source, pairs, 0 if number is None else number


def _as_join(term: Term, rewriter: Rewriter) -> Term | None:
    found = padding_of(term)
    if found is None:
        return None
    source, pairs, number = found
    facts = rewriter.facts
    for dim, (front, back) in sorted(pairs.items(), reverse=True):
        for amount in (front, back):
            if not (facts.at_most(0, amount) or facts.at_most(amount, 0)):
                return None
        source = _cut(source, dim, front, back, rewriter)
        source = _joined(source, dim, front, back, number, rewriter)
    return source


def _cut(source: Term, dim: int, front: Any, back: Any, rewriter: Rewriter) -> Term:
    """Negative padding cuts."""
    facts, size = rewriter.facts, source.sizes[dim]
    start = 0 if facts.at_most(0, front) else facts.simplified(-front)
    end = size if facts.at_most(0, back) else facts.simplified(size + back)
    shape = (*source.sizes[:dim], facts.simplified(end - start), *source.sizes[dim + 1 :])
    return rewriter.build("slice", (source, dim, start, end, 1), shape, source)


def _joined(source: Term, dim: int, front: Any, back: Any, number: Any, rewriter: Rewriter) -> Term:
    facts = rewriter.facts
    parts, total = [source], source.sizes[dim]
    for amount, place in ((front, 0), (back, 2)):
        if facts.at_most(amount, 0):
            continue
        shape = (*source.sizes[:dim], amount, *source.sizes[dim + 1 :])
        constant = rewriter.build(
            "full", (shape, number, source.dtype, source.device), shape, source
        )
        parts.insert(place, constant)
        total = total + amount
    if len(parts) == 1:
        return source
    shape = (*source.sizes[:dim], facts.simplified(total), *source.sizes[dim + 1 :])
    return rewriter.build("cat", (tuple(parts), dim), shape, source)


def _repeated(term: Term, rewriter: Rewriter) -> Term | None:
    """The first and the last row, repeated at the ends of the last axis."""
    source, amounts, mode, _ = term.args
    dim, facts = len(source.sizes) - 1, rewriter.facts
    if mode != "replicate" or len(amounts) != 2 or not facts.at_most(1, source.sizes[dim]):
        return None
    if not all(facts.at_most(0, amount) for amount in amounts):
        return None
    size = source.sizes[dim]
    rows = [
        rewriter.build("slice", (source, dim, at, at + 1, 1), (*source.sizes[:dim], 1), source)
        for at in (0, facts.simplified(size - 1))
    ]
    shapes = [(*source.sizes[:dim], amount) for amount in amounts]
    front, back = (
        rewriter.build("expand", (row, shape), shape, row)
        for row, shape in zip(rows, shapes, strict=True)
    )
    shape = (*source.sizes[:dim], facts.simplified(size + sum(amounts)))
    return rewriter.build("cat", ((front, source, back), dim), shape, source)


def _unpadded(term: Term, rewriter: Rewriter) -> Term | None:
    """A convolution that pads is the convolution of what is padded."""
    source, weight, bias, stride, padding, dilation, groups = term.args
    if all(amount == 0 for amount in padding):
        return None
    count = len(padding)
    lead = len(source.sizes) - count
    for place, amount in enumerate(padding):
        source = _joined(source, lead + place, amount, amount, 0, rewriter)
    args = (source, weight, bias, stride, tuple([0] * count), dilation, groups)
    return rewriter.build(term.op, args, term.shape, term)


def _slice_of_convolution(term: Term, rewriter: Rewriter) -> Term | None:
    """A part of a convolution is the convolution of the part that it looks at."""
    whole, dim, start, end, _ = term.args
    if whole.op not in _CONVOLUTIONS:
        return None
    source, weight, bias, stride, padding, dilation, groups = whole.args
    axis = dim - (len(source.sizes) - len(padding))
    facts = rewriter.facts
    if axis < 0 or any(amount != 0 for amount in padding):
        return None
    if not facts.at_most(start + sympy.Integer(1), end):
        return None
    step, width = _each(stride, axis), (weight.sizes[2 + axis] - 1) * _each(dilation, axis) + 1
    first = facts.simplified(sympy.sympify(start) * step)
    last = facts.simplified((sympy.sympify(end) - 1) * step + width)
    shape = (*source.sizes[:dim], facts.simplified(last - first), *source.sizes[dim + 1 :])
    part = rewriter.build("slice", (source, dim, first, last, 1), shape, source)
    args = (part, weight, bias, stride, padding, dilation, groups)
    return rewriter.build(whole.op, args, term.shape, term)


def _slice_of_activation(term: Term, rewriter: Rewriter) -> Term | None:
    """A part of what is computed element by element of a convolution, or of a part of one."""
    whole, dim, start, end, _ = term.args
    if whole.op not in EACH_ALONE or any(isinstance(arg, Term) for arg in whole.args[1:]):
        return None
    source: Term = whole.args[0]
    below: Term = source.args[0] if source.op == "slice" and source.args[1] == dim else source
    if below.op not in _CONVOLUTIONS or dim < 2 or source.shape != whole.shape:
        return None
    part = rewriter.build("slice", (source, dim, start, end, 1), term.shape, source)
    return rewriter.build(whole.op, (part, *whole.args[1:]), term.shape, term)


def _each(values: tuple[Any, ...], axis: int) -> Any:
    return values[axis] if len(values) > 1 else values[0]


PADDING_LAWS: tuple[Law, ...] = (
    Law(
        "pad",
        "pad(x, (a, b), c) = cat([full(a, c), x, full(b, c)]);  negative padding is a slice",
        "exact",
        (aten.pad.default, aten.constant_pad_nd.default),
        _as_join,
    ),
    Law(
        "pad-replicate",
        "pad(x, (a, b), replicate) = cat([expand(x[:1], a), x, expand(x[-1:], b)])  if x has a row",
        "exact",
        (aten.pad.default,),
        _repeated,
    ),
    Law(
        "padded-convolution",
        "conv(x, w, padding=p) = conv(pad(x, (p, p)), w)",
        "real",
        _CONVOLUTIONS,
        _unpadded,
    ),
    Law(
        "slice-of-convolution",
        "conv(x, w)[a:b] = conv(x[a·s : (b−1)·s + (k−1)·d + 1], w)  if a < b",
        "real",
        ("slice",),
        _slice_of_convolution,
    ),
    Law(
        "slice-of-activation",
        "f(conv(x, w))[a:b] = f(conv(x, w)[a:b])  for f of each element alone",
        "exact",
        ("slice",),
        _slice_of_activation,
    ),
)
