"""A state that holds nothing yet: products with zeros, extremes with the lowest number."""

from __future__ import annotations

import math
from typing import Any

import torch

from cachefree.laws.law import Law, Rewriter
from cachefree.terms import Term, operands, topological

__all__ = ["ZERO_LAWS"]

aten = torch.ops.aten
_PRODUCTS = (
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.matmul.default,
    aten.bmm.default,
    aten.mm.default,
    aten.mv.default,
    aten.einsum.default,
)
_DIVISIONS = {
    aten.div.Tensor: 1,
    aten.div.Scalar: 1,
    aten.reciprocal.default: 0,
    aten.log.default: 0,
    aten.log2.default: 0,
    aten.log10.default: 0,
    aten.rsqrt.default: 0,
    aten.pow.Tensor_Scalar: 0,
    aten.pow.Tensor_Tensor: 0,
}
_EXTREMES = {aten.maximum.default: -1, aten.minimum.default: 1}


def _is_zero(value: Any) -> bool:
    number = value.args[1] if isinstance(value, Term) and value.op == "full" else value
    return isinstance(number, (int, float)) and number == 0


def _product(term: Term, rewriter: Rewriter) -> Term | None:
    factors = list(operands(term))
    if not any(_is_zero(arg) for arg in (*factors, *term.args)):
        return None
    if not all(map(_is_finite, factors)):
        return None
    return rewriter.build("full", (term.shape, 0, term.dtype, term.device), term.shape, term)


def _is_finite(term: Term) -> bool:
    """Whether no infinity can be seen in how a value is computed: 0 · ∞ is not 0."""
    for below in topological([term]):
        if below.op == "bound":  # what a loop carries to a token is not seen here
            return False
        if any(isinstance(arg, float) and not math.isfinite(arg) for arg in below.args):
            return False
        if below.op == "constant" and not _has_finite_values(below):
            return False
        place = _DIVISIONS.get(below.op)
        if place is not None and _is_zero(below.args[place]):
            return False
    return True


def _has_finite_values(term: Term) -> bool:
    tensor = term.payload
    is_read = isinstance(tensor, torch.Tensor) and not tensor.is_meta
    return bool(is_read and tensor.isfinite().all())


def _extreme(term: Term, rewriter: Rewriter) -> Term | None:
    return _other_operand(term, -math.inf)


def _finite_extreme(term: Term, rewriter: Rewriter) -> Term | None:
    assert term.dtype is not None
    if not term.dtype.is_floating_point:
        return None
    return _other_operand(term, torch.finfo(term.dtype).min)


def _other_operand(term: Term, lowest: float) -> Term | None:
    """The operand beside the lowest (for a minimum the highest) number."""
    bound = -_EXTREMES[term.op] * lowest
    for number, other in (term.args, term.args[::-1]):
        if (
            number.op == "full"
            and number.args[1] == bound
            and other.shape == term.shape
            and other.dtype == term.dtype
        ):
            return other  # type: ignore[no-any-return]
    return None


def _infinity(term: Term, rewriter: Rewriter) -> Term | None:
    """An infinity with something added to it or taken away from it."""
    first, second, alpha = term.args
    if alpha != 1 or not isinstance(first, Term) or not isinstance(second, Term):
        return None
    is_sum = term.op is aten.add.Tensor
    for infinite, other, sign in ((first, second, 1), (second, first, 1 if is_sum else -1)):
        number = infinite.args[1] if infinite.op == "full" else 0
        if isinstance(number, float) and math.isinf(number) and _is_finite(other):
            args = (term.shape, sign * number, term.dtype, term.device)
            return rewriter.build("full", args, term.shape, term)
    return None


def _folded(term: Term, rewriter: Rewriter) -> Term | None:
    source = term.args[0]
    if source.op != "full" or source.dtype != term.dtype or len(term.args) > 1:
        return None
    number = term.op(torch.tensor(source.args[1], dtype=source.dtype)).item()
    return rewriter.build("full", (term.shape, number, term.dtype, term.device), term.shape, term)


ZERO_LAWS: tuple[Law, ...] = (
    Law(
        "zero-product",
        "0 · x = 0, 0 @ x = 0, einsum(…, 0, …) = 0  if no infinity is in x",
        "real",
        _PRODUCTS,
        _product,
    ),
    Law(
        "lowest",
        "maximum(−∞, x) = x;  minimum(∞, x) = x",
        "exact",
        tuple(_EXTREMES),
        _extreme,
    ),
    Law(
        "lowest-finite",
        "maximum(c, x) = x  for the lowest number c of the dtype and finite x",
        "real",
        tuple(_EXTREMES),
        _finite_extreme,
    ),
    Law(
        "infinity",
        "−∞ + x = −∞ − x = −∞  if no infinity is in x",
        "real",
        (aten.add.Tensor, aten.sub.Tensor),
        _infinity,
    ),
    Law(
        "folded-function",
        "f(full(shape, c)) = full(shape, f(c))  for f of one argument",
        "real",
        (
            aten.exp.default,
            aten.neg.default,
            aten.relu.default,
            aten.tanh.default,
            aten.sigmoid.default,
            aten.silu.default,
            aten.sqrt.default,
            aten.abs.default,
        ),
        _folded,
    ),
)
