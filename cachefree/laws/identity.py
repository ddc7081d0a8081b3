"""Operators that return their operand: copies, layouts, casts to its dtype, neutral numbers."""

from __future__ import annotations

from typing import Any

import torch

from cachefree.laws.law import Law, Rewriter
from cachefree.terms import Term

__all__ = ["COMMUTATIVE", "IDENTITY_LAWS"]

aten = torch.ops.aten


def _operand(term: Term, rewriter: Rewriter) -> Term | None:
    source = term.args[0]
    is_same = (
        source.dtype == term.dtype and source.device == term.device and source.shape == term.shape
    )
    return source if is_same else None


def _evaluated_dropout(term: Term, rewriter: Rewriter) -> Term | None:
    source, probability, is_training = term.args
    return source if not is_training or probability == 0.0 else None


def _cast(term: Term, rewriter: Rewriter) -> Term | None:
    source: Term = term.args[0]
    if source.dtype == term.dtype and source.device == term.device:
        return source
    if term.op == "cast":
        return _cast_of_cast(term, rewriter)
    return rewriter.build("cast", (source, term.dtype, term.device), term.shape, term)


def _cast_of_cast(term: Term, rewriter: Rewriter) -> Term | None:
    """``cast(cast(x, wide), dtype) = cast(x, dtype)`` where ``wide`` holds every value of x.

    An integer that does not fit wraps around, a floating-point number that does not is undefined.
    """
    inner = term.args[0]
    if inner.op != "cast" or inner.device != term.device or inner.args[0].device != term.device:
        return None
    source: Any = inner.args[0].dtype
    if not _holds_exactly(source, inner.dtype):
        return None
    is_detour = inner.dtype.is_floating_point and not source.is_floating_point
    target: Any = term.dtype
    if is_detour and not (
        target.is_floating_point or target in (torch.bool, source) or _holds_exactly(source, target)
    ):
        return None
    return rewriter.build("cast", (inner.args[0], term.dtype, term.device), term.shape, term)


_WIDER = {
    torch.bool: (
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    ),
    torch.float16: (torch.float32, torch.float64),
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
    torch.int32: (torch.int64, torch.float64),
    torch.int16: (torch.int32, torch.int64, torch.float32, torch.float64),
    torch.uint8: (torch.int16, torch.int32, torch.int64, torch.float32, torch.float64),
    torch.int8: (torch.int16, torch.int32, torch.int64, torch.float32, torch.float64),
}


def _holds_exactly(narrow: Any, wide: Any) -> bool:
    return wide in _WIDER.get(narrow, ())


def _number(value: Any) -> Any:
    """The number of a scalar operand: Python's, or a full tensor's; None where there is none."""
    if isinstance(value, Term):
        return value.args[1] if value.op == "full" else None
    return value


def _is(value: Any, number: float) -> bool:
    found = _number(value)
    return isinstance(found, (int, float)) and not isinstance(found, bool) and found == number


def _left_operand(term: Term) -> Term | None:
    """The first operand where it already has the result's type and shape."""
    source = term.args[0]
    if isinstance(source, Term) and source.shape == term.shape and source.dtype == term.dtype:
        return source
    return None


def _add_zero(term: Term, rewriter: Rewriter) -> Term | None:
    if term.dtype is None or term.dtype.is_floating_point or term.dtype.is_complex:
        return None
    first, second = term.args[0], term.args[1]
    if _is(second, 0):
        return _left_operand(term)
    if (
        _is(first, 0)
        and isinstance(second, Term)
        and term.op is not aten.sub.Tensor
        and term.args[2] == 1
    ):
        return second if second.shape == term.shape and second.dtype == term.dtype else None
    return None


def _add_float_zero(term: Term, rewriter: Rewriter) -> Term | None:
    if term.dtype is None or not term.dtype.is_floating_point:
        return None
    first, second = term.args[0], term.args[1]
    if _is(second, 0):
        return _left_operand(term)
    if (
        _is(first, 0)
        and isinstance(second, Term)
        and term.op is aten.add.Tensor
        and term.args[2] == 1
    ):
        return second if second.shape == term.shape and second.dtype == term.dtype else None
    return None


def _times_one(term: Term, rewriter: Rewriter) -> Term | None:
    if term.dtype is not None and term.dtype.is_complex:
        return None  # an infinite part times the other factor's zero is nan
    if _is(term.args[1], 1):
        return _left_operand(term)
    if term.op in (aten.mul.Tensor,) and _is(term.args[0], 1) and isinstance(term.args[1], Term):
        second = term.args[1]
        return second if second.shape == term.shape and second.dtype == term.dtype else None
    return None


def _ordered(term: Term, rewriter: Rewriter) -> Term | None:
    first, second, *rest = term.args
    if not (isinstance(first, Term) and isinstance(second, Term)) or first.number <= second.number:
        return None
    if rest and rest[0] != 1:
        return None
    return rewriter.build(term.op, (second, first, *rest), term.shape, term)


_MIRRORED = {
    aten.gt.Tensor: aten.lt.Tensor,
    aten.ge.Tensor: aten.le.Tensor,
}


def _mirrored(term: Term, rewriter: Rewriter) -> Term | None:
    return rewriter.build(_MIRRORED[term.op], (term.args[1], term.args[0]), term.shape, term)


_SPELLED = {
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__xor__.Tensor: aten.bitwise_xor.Tensor,
    aten.true_divide.Tensor: aten.div.Tensor,
    aten.subtract.Tensor: aten.sub.Tensor,
    aten.multiply.Tensor: aten.mul.Tensor,
    aten.less.Tensor: aten.lt.Tensor,
    aten.less_equal.Tensor: aten.le.Tensor,
    aten.greater.Tensor: aten.gt.Tensor,
    aten.greater_equal.Tensor: aten.ge.Tensor,
    aten.not_equal.Tensor: aten.ne.Tensor,
}


def _spelled(term: Term, rewriter: Rewriter) -> Term | None:
    return rewriter.build(_SPELLED[term.op], term.args, term.shape, term)


def _negated(term: Term, rewriter: Rewriter) -> Term | None:
    if term.args[0].dtype != torch.bool:
        return None
    return rewriter.build(aten.logical_not.default, term.args, term.shape, term)


def _double_negation(term: Term, rewriter: Rewriter) -> Term | None:
    inner: Term = term.args[0]
    if inner.op is not aten.logical_not.default:
        return None
    source: Term = inner.args[0]
    return source if source.dtype == torch.bool else None


_CASTS = (
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
    "cast",
)
_COPIES = (
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    aten.lift_fresh.default,
    aten.lift.default,
    aten.positive.default,
    aten.expand_copy.default,
    aten.detach_copy.default,
)

COMMUTATIVE = (
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.logical_and.default,
    aten.logical_or.default,
    aten.bitwise_and.Tensor,
    aten.bitwise_or.Tensor,
    aten.eq.Tensor,
    aten.ne.Tensor,
)

IDENTITY_LAWS: tuple[Law, ...] = (
    Law("copy", "copy(x) = x", "exact", _COPIES, _operand),
    Law(
        "evaluated-dropout",
        "dropout(x, p, train) = x  if not train or p = 0",
        "exact",
        (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default),
        _evaluated_dropout,
    ),
    Law(
        "cast",
        "cast(x, dtype(x)) = x;  cast(cast(x, wide), d) = cast(x, d)  if wide holds x",
        "exact",
        _CASTS,
        _cast,
    ),
    Law(
        "add-zero-integer",
        "x + 0 = x  for integers",
        "exact",
        (aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar),
        _add_zero,
    ),
    Law(
        "add-zero-float",
        "x + 0.0 = x  over the reals (−0.0 + 0.0 is 0.0)",
        "real",
        (aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar),
        _add_float_zero,
    ),
    Law(
        "times-one",
        "x · 1 = x / 1 = x  if x is not complex",
        "exact",
        (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar),
        _times_one,
    ),
    Law("commute", "x ∘ y = y ∘ x  for +, ·, ∧, ∨, =, ≠", "exact", COMMUTATIVE, _ordered),
    Law(
        "spelling",
        "x | y = bitwise_or(x, y);  true_divide = div;  multiply = mul; …",
        "exact",
        tuple(_SPELLED),
        _spelled,
    ),
    Law("mirror", "(x > y) = (y < x);  (x ≥ y) = (y ≤ x)", "exact", tuple(_MIRRORED), _mirrored),
    Law("not", "~x = not x  for Booleans", "exact", (aten.bitwise_not.default,), _negated),
    Law(
        "not-not",
        "not not x = x  for Booleans",
        "exact",
        (aten.logical_not.default,),
        _double_negation,
    ),
)
