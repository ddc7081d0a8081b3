"""Tensors made from sizes and numbers alone: constants, ranges and triangles."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from cachefree.laws.law import Law, Rewriter
from cachefree.terms import Term

__all__ = ["SEQUENCE_LAWS"]

aten = torch.ops.aten

_FILLED: dict[Any, Any] = {
    aten.zeros.default: 0,
    aten.ones.default: 1,
    aten.zeros_like.default: 0,
    aten.ones_like.default: 1,
    aten.new_zeros.default: 0,
    aten.new_ones.default: 1,
}
_FILL_ARGUMENT: dict[Any, int] = {
    aten.full.default: 1,
    aten.full_like.default: 1,
    aten.new_full.default: 2,
    aten.fill.Scalar: 1,
    aten.fill.Tensor: 1,
    aten.scalar_tensor.default: 0,
}


def _as_full(term: Term, rewriter: Rewriter) -> Term | None:
    number = _FILLED[term.op] if term.op in _FILLED else term.args[_FILL_ARGUMENT[term.op]]
    if isinstance(number, Term):
        if number.op != "full":
            return None
        number = number.args[1]
    if isinstance(number, sympy.Basic) and not _is_held(number, term.dtype):
        return None
    return rewriter.build("full", (term.shape, number, term.dtype, term.device), term.shape, term)


_HOLD_SIZES = (torch.int64, torch.int32)
_HOLD_NUMBERS = (torch.float32, torch.float64)


def _is_held(number: sympy.Basic, dtype: Any) -> bool:
    """Whether a dtype holds a number that sizes make, as it is: a truth value or a half do not."""
    return dtype in _HOLD_NUMBERS or (dtype in _HOLD_SIZES and bool(number.is_integer))


def _full(term: Term, rewriter: Rewriter) -> Term | None:
    shape, number, dtype, device = term.args
    number = _canonical_number(number, dtype)
    if any(size == 0 for size in shape):
        number = _canonical_number(0, dtype)
    if repr(number) == repr(term.args[1]):
        return None
    return rewriter.build("full", (shape, number, dtype, device), shape, term)


def _canonical_number(number: Any, dtype: Any) -> Any:
    if isinstance(number, sympy.Basic):
        return number
    if dtype == torch.bool:
        return bool(number)
    if dtype.is_floating_point:
        return float(torch.tensor(number, dtype=dtype).item())
    return int(number) if not dtype.is_complex else number


def _constant(term: Term, rewriter: Rewriter) -> Term | None:
    tensor = term.payload
    if tensor is None or tensor.numel() == 0 or tensor.is_meta or type(tensor) is not torch.Tensor:
        return None
    if tensor.numel() > 1:
        flat = tensor.detach().reshape(-1)
        if tensor.numel() > 4096 or not bool((flat == flat[0]).all()) or bool((flat == 0).any()):
            return None
    number = tensor.detach().reshape(-1)[0].item()
    return rewriter.build("full", (term.shape, number, term.dtype, term.device), term.shape, term)


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, sympy.Basic)) and bool(sympy.sympify(value).is_integer)


def _as_arange(term: Term, rewriter: Rewriter) -> Term | None:
    if term.dtype is None or term.dtype.is_floating_point:
        return None
    start: Any = 0
    step: Any = 1
    if term.op is aten.arange.default:
        end = term.args[0]
    elif term.op is aten.arange.start:
        start, end = term.args[:2]
    else:
        start, end, step = term.args[:3]
    if step != 1 or not (_is_integer(start) and _is_integer(end)):
        return None
    count = rewriter.facts.simplified(sympy.sympify(end) - start)
    return rewriter.build("arange", (start, count, 1, term.dtype, term.device), (count,), term)


def _shifted_arange(term: Term, rewriter: Rewriter) -> Term | None:
    first, offset, alpha = term.args
    if (
        isinstance(offset, Term)
        and isinstance(first, Term)
        and offset.op == "arange"
        and first.op == "full"
    ):
        first, offset = offset, first
        if term.op is not aten.add.Tensor:
            return None
    if isinstance(offset, Term):
        offset = offset.args[1] if offset.op == "full" else None
    if (
        not isinstance(first, Term)
        or not isinstance(offset, (int, sympy.Basic))
        or isinstance(offset, bool)
        or alpha != 1
    ):
        return None
    if first.dtype != term.dtype or first.shape != term.shape:
        return None
    sign = 1 if term.op in (aten.add.Tensor, aten.add.Scalar) else -1
    base = first.args[0] if first.op in ("reshape", "expand") else first
    if base.op != "arange":
        return None
    start, *rest = base.args
    moved = rewriter.build(
        "arange",
        (rewriter.facts.simplified(start + sign * sympy.sympify(offset)), *rest),
        base.shape,
        base,
    )
    if base is first:
        return moved
    return rewriter.build(first.op, (moved, term.shape), term.shape, term)


def _slice_of_arange(term: Term, rewriter: Rewriter) -> Term | None:
    source, _, start, end, _ = term.args
    if source.op != "arange":
        return None
    first, _, step, *rest = source.args
    start_value = rewriter.facts.simplified(first + sympy.sympify(start) * step)
    count = rewriter.facts.simplified(sympy.sympify(end) - start)
    return rewriter.build("arange", (start_value, count, step, *rest), (count,), term)


def _elementwise_full(term: Term, rewriter: Rewriter) -> Term | None:
    """A comparison or a cast of constants is a constant."""
    source = term.args[0]
    if (
        not isinstance(source, Term)
        or source.op != "full"
        or isinstance(source.args[1], sympy.Basic)
    ):
        return None
    number = torch.tensor(source.args[1], dtype=source.dtype)
    rest = term.args[1:]
    if term.op == "cast":
        if not _is_defined_cast(number, term.dtype):
            return None
        value = number.to(term.dtype)
    elif all(isinstance(arg, (int, float)) for arg in rest):
        value = term.op(number, *rest)
    else:
        return None
    return rewriter.build(
        "full", (term.shape, value.item(), term.dtype, term.device), term.shape, term
    )


def _is_defined_cast(number: torch.Tensor, dtype: Any) -> bool:
    """Whether every device agrees on a cast: not of what no integer of the dtype is near."""
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        return True
    if number.dtype.is_floating_point:
        limits = torch.iinfo(dtype)
        return bool(limits.min < number.item() < limits.max)
    return True


SEQUENCE_LAWS: tuple[Law, ...] = (
    Law(
        "fill",
        "zeros, ones, zeros_like, new_full, … = full(shape, number)",
        "exact",
        (*_FILLED, *_FILL_ARGUMENT),
        _as_full,
    ),
    Law(
        "full",
        "full(shape, number) with the number as its dtype holds it",
        "exact",
        ("full",),
        _full,
    ),
    Law(
        "constant",
        "a constant tensor of one value = full(shape, value)",
        "exact",
        ("constant",),
        _constant,
    ),
    Law(
        "range",
        "arange(a, b) = range of b − a integers from a",
        "exact",
        (aten.arange.default, aten.arange.start, aten.arange.start_step),
        _as_arange,
    ),
    Law(
        "shift-range",
        "range(a, n) + c = range(a + c, n)  for integers",
        "exact",
        (aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar),
        _shifted_arange,
    ),
    Law(
        "slice-of-range",
        "range(a, n)[i:j] = range(a + i, j − i)",
        "exact",
        ("slice",),
        _slice_of_arange,
    ),
    Law(
        "constant-folding",
        "f(full(shape, c)) = full(shape, f(c))  for elementwise f",
        "exact",
        (
            "cast",
            aten.eq.Scalar,
            aten.ne.Scalar,
            aten.lt.Scalar,
            aten.le.Scalar,
            aten.gt.Scalar,
            aten.ge.Scalar,
            aten.logical_not.default,
        ),
        _elementwise_full,
    ),
)
