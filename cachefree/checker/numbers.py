"""What the laws of numbers, masks, attention and states say, a second time; see ``shapes.py``."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import sympy
import torch

from cachefree.checker.shapes import Rights, operators
from cachefree.checker.terms import Term, Terms, operands

__all__ = ["NUMBERS"]


def number_of(value: Any) -> Any:
    """The number of a full tensor, or the number itself; None for any other tensor."""
    if isinstance(value, Term):
        return value.args[1] if value.op == "full" else None
    return value


def is_number(value: Any, wanted: float) -> bool:
    """Whether a value is this number, or a tensor full of it; −0.0 is 0.0 here."""
    number = number_of(value)
    is_truth = getattr(value, "dtype", None) == torch.bool
    return isinstance(number, (int, float)) and not is_truth and bool(float(number) == wanted)


def is_of_type(x: Any, left: Term) -> bool:
    """Whether a term has the shape, dtype and device of the left side."""
    return isinstance(x, Term) and (x.shape, x.dtype, x.device) == (
        left.shape, left.dtype, left.device)  # fmt: skip


FILLED = {"zeros": 0, "ones": 1, "zeros_like": 0, "ones_like": 1, "new_zeros": 0, "new_ones": 1}
PLACES = {"full": 1, "full_like": 1, "new_full": 2, "fill": 1, "scalar_tensor": 0}


def fill(m: Terms, t: Term) -> Rights:
    name = t.op.split(".")[1]
    number = FILLED[name] if name in FILLED else number_of(t.args[PLACES[name]])
    if number is None:
        return
    wide = [torch.float32, torch.float64]
    if isinstance(number, sympy.Basic) and number.is_integer:
        wide += [torch.int32, torch.int64]
    if not isinstance(number, sympy.Basic) or t.dtype in wide:
        yield m.full(t.shape, number, t.dtype, t.device)


def plain(number: Any, dtype: Any) -> Any:
    """A number as a dtype holds it."""
    return number if isinstance(number, sympy.Basic) else torch.tensor(number, dtype=dtype).item()


def full(m: Terms, t: Term) -> Rights:
    shape, number, dtype, device = t.args
    yield m.full(shape, plain(0 if 0 in shape else number, dtype), dtype, device)


def constant(m: Terms, t: Term) -> Rights:
    identity = t.args[0]
    if not t.parts or tuple(identity) != ("bits", hashlib.sha256(t.parts).hexdigest()):
        return
    numbers = torch.frombuffer(bytearray(t.parts), dtype=t.dtype)
    if len(numbers) == 1 or (bool((numbers == numbers[0]).all()) and bool(numbers[0] != 0)):
        yield m.full(t.shape, numbers[0].item(), t.dtype, t.device)


def as_range(m: Terms, t: Term) -> Rights:
    name = t.op.rsplit(".", 1)[1]
    start, end = (0, t.args[0]) if name == "default" else t.args[:2]
    step = t.args[2] if name == "start_step" else 1
    whole = all(bool(sympy.sympify(x).is_integer) for x in (start, end))
    if step == 1 and whole and not t.dtype.is_floating_point:
        count = sympy.sympify(end) - start
        yield m.make("arange", (start, count, 1, t.dtype, t.device), (count,), t.dtype, t.device)


def shift_range(m: Terms, t: Term) -> Rights:
    is_sum = t.op.startswith("aten.add")
    for x, offset in (t.args[:2], t.args[1::-1])[: 1 + is_sum]:
        base = x.args[0] if isinstance(x, Term) and x.op in ("reshape", "expand") else x
        number = number_of(offset)
        if not isinstance(base, Term) or base.op != "arange" or not is_of_type(x, t):
            continue
        if t.args[2] != 1 or not bool(sympy.sympify(number).is_integer):
            continue
        start = base.args[0] + (1 if is_sum else -1) * sympy.sympify(number)
        moved = m.make("arange", (start, *base.args[1:]), base.shape, base.dtype, base.device)
        yield moved if base is x else m.make(x.op, (moved, t.shape), t.shape, t.dtype, t.device)


def slice_of_range(m: Terms, t: Term) -> Rights:
    x, _, start, end, _ = t.args
    if x.op == "arange":
        first, count = x.args[0] + sympy.sympify(start) * x.args[2], sympy.sympify(end) - start
        yield m.make("arange", (first, count, *x.args[2:]), (count,), t.dtype, t.device)


def fold(m: Terms, t: Term) -> Rights:
    x, name = t.args[0], t.op.split(".")
    number = number_of(x) if isinstance(x, Term) else None
    if number is None or isinstance(number, sympy.Basic):
        return
    value = torch.tensor(number, dtype=x.dtype)
    if t.op == "cast":
        whole = not (t.dtype.is_floating_point or t.dtype.is_complex or t.dtype == torch.bool)
        if whole and x.dtype.is_floating_point:
            limits = torch.iinfo(t.dtype)
            if not limits.min < number < limits.max:
                return
        value = value.to(t.dtype)
    elif all(isinstance(arg, (int, float)) for arg in t.args[1:]):
        value = getattr(getattr(torch.ops.aten, name[1]), name[2])(value, *t.args[1:])
    if value.dtype == t.dtype:
        yield m.full(t.shape, value.item(), t.dtype, t.device)


def operand(m: Terms, t: Term) -> Rights:
    if is_of_type(t.args[0], t):
        yield t.args[0]


def dropout(m: Terms, t: Term) -> Rights:
    if not t.args[2] or t.args[1] == 0:
        yield from operand(m, t)


def holds_all_of(wide: Any, narrow: Any) -> bool:
    """Whether a dtype has every number of another."""

    def bits(dtype: Any) -> tuple[float, float, float]:
        if dtype == torch.bool:
            return 0, 1, 1
        if dtype.is_floating_point:
            return -math.inf, math.inf, 1 - math.log2(torch.finfo(dtype).eps)
        return torch.iinfo(dtype).min, torch.iinfo(dtype).max, torch.iinfo(dtype).bits

    if wide.is_floating_point and narrow.is_floating_point:
        a, b = torch.finfo(wide), torch.finfo(narrow)
        return a.max >= b.max and a.eps <= b.eps and a.tiny * a.eps <= b.tiny * b.eps
    if narrow.is_floating_point or wide == torch.bool:
        return False
    low, high, width = bits(wide)
    least, most, _ = bits(narrow)
    is_in_range = low <= least and most <= high
    return is_in_range and (not wide.is_floating_point or 2**width >= max(most, -least))


def cast(m: Terms, t: Term) -> Rights:
    x = t.args[0]
    if x.dtype == t.dtype and x.device == t.device:
        yield x
    elif t.op != "cast":
        yield m.cast(x, t.dtype, t.device)
    elif x.op == "cast" and {x.device, x.args[0].device} == {t.device}:
        first = x.args[0]
        detour = x.dtype.is_floating_point and not first.dtype.is_floating_point
        lands = t.dtype.is_floating_point or t.dtype in (torch.bool, first.dtype)
        if holds_all_of(x.dtype, first.dtype) and (
            not detour or lands or holds_all_of(t.dtype, first.dtype)
        ):
            yield m.cast(first, t.dtype, t.device)


def neutral_number(is_float: bool, number: int) -> Callable[[Terms, Term], Rights]:
    """``x + 0 = x − 0 = x``, ``x · 1 = x / 1 = x``, and mirrored where they commute."""

    def rights(m: Terms, t: Term) -> Rights:
        if t.dtype.is_complex or (number == 0 and t.dtype.is_floating_point is not is_float):
            return
        x, y = t.args[:2]
        if is_number(y, number) and is_of_type(x, t):
            yield x
        commutes = t.op == ("aten.mul.Tensor" if number else "aten.add.Tensor")
        if commutes and is_number(x, number) and is_of_type(y, t) and t.args[2:] in ((), (1,)):
            yield y

    return rights


def commute(m: Terms, t: Term) -> Rights:
    if t.args[2:] in ((), (1,)):
        yield m.make(t.op, (t.args[1], t.args[0], *t.args[2:]), t.shape, t.dtype, t.device)


NAMES = {"__or__": "bitwise_or", "__and__": "bitwise_and", "__xor__": "bitwise_xor",
         "true_divide": "div", "subtract": "sub", "multiply": "mul", "less": "lt",
         "less_equal": "le", "greater": "gt", "greater_equal": "ge", "not_equal": "ne"}  # fmt: skip


def spelling(m: Terms, t: Term) -> Rights:
    _, name, kind = t.op.split(".")
    if name in NAMES:
        yield m.make(f"aten.{NAMES[name]}.{kind}", t.args, t.shape, t.dtype, t.device)


def mirror(m: Terms, t: Term) -> Rights:
    name = {"aten.gt.Tensor": "aten.lt.Tensor", "aten.ge.Tensor": "aten.le.Tensor"}.get(t.op)
    if name:
        yield m.make(name, t.args[::-1], t.shape, t.dtype, t.device)


def not_(m: Terms, t: Term) -> Rights:
    if t.op == "aten.bitwise_not.default" and t.args[0].dtype == torch.bool:
        yield m.make("aten.logical_not.default", t.args, t.shape, t.dtype, t.device)


def not_not(m: Terms, t: Term) -> Rights:
    inner = t.args[0]
    if inner.op == t.op and inner.args[0].dtype == torch.bool:
        yield inner.args[0]


def where(m: Terms, t: Term) -> Rights:
    truth = number_of(t.args[0])
    if truth is not None and not isinstance(truth, sympy.Basic):
        chosen = t.args[1] if truth else t.args[2]
        if isinstance(chosen, Term) and chosen.dtype == t.dtype:
            yield chosen if chosen.shape == t.shape else m.expand(chosen, t.shape)


def where_number(m: Terms, t: Term) -> Rights:
    if any(isinstance(x, Term) and x.dtype == t.dtype for x in t.args[1:]):
        pair = [x if isinstance(x, Term) else m.full((), x, t.dtype, t.device) for x in t.args[1:]]
        yield m.make("aten.where.self", (t.args[0], *pair), t.shape, t.dtype, t.device)


def fill_nothing(m: Terms, t: Term) -> Rights:
    truth = number_of(t.args[1])
    is_told = truth is not None and not isinstance(truth, sympy.Basic)
    if is_told and not truth and t.args[1].dtype == torch.bool and is_of_type(t.args[0], t):
        yield t.args[0]


def neutral_truth(m: Terms, t: Term) -> Rights:
    neutral = "and" in t.op
    if any(x.dtype != torch.bool for x in t.args):
        return
    for x, other in (t.args, t.args[::-1]):
        truth = number_of(x)
        truth = None if isinstance(truth, sympy.Basic) else truth
        if truth is not None and bool(truth) is neutral and other.shape == t.shape:
            yield other
        if truth is not None and bool(truth) is not neutral:
            yield m.full(t.shape, not neutral, t.dtype, t.device)


def attention_mask(m: Terms, t: Term) -> Rights:
    q, k, v, mask, dropped, causal, scale, grouped = t.args
    if q.shape[:-3] != k.shape[:-3]:
        return
    scores = (*q.shape[:-1], k.shape[-2])
    if mask is None:
        mask = m.full(scores, True, torch.bool, t.device)
        if causal:
            mask = m.make("aten.tril.default", (mask, 0), scores, torch.bool, t.device)
    elif not causal and len(mask.shape) <= len(scores):
        pairs = zip(mask.shape[::-1], scores[::-1], strict=False)
        if mask.shape == scores or not all(a in (1, b) for a, b in pairs):
            return
        mask = m.expand(mask, scores)
    else:
        return
    yield m.make(t.op, (q, k, v, mask, dropped, False, scale, grouped), t.shape, t.dtype, t.device)


def grouped_attention(m: Terms, t: Term) -> Rights:
    q, k, v, *rest, grouped = t.args
    heads, groups = q.shape[-3], k.shape[-3]
    if grouped and isinstance(heads, int) and isinstance(groups, int) and heads % groups == 0:

        def repeated(x: Term) -> Term:
            *lead, count, length, width = x.shape
            inner = m.reshape(x, (*lead, count, 1, length, width))
            wide = m.expand(inner, (*lead, count, heads // groups, length, width))
            return m.reshape(wide, (*lead, count * (heads // groups), length, width))

        args = (q, repeated(k), repeated(v), *rest, False)
        yield m.make(t.op, args, t.shape, t.dtype, t.device)


def pad(m: Terms, t: Term) -> Rights:
    x, amounts, *rest = t.args
    number = rest[-1]
    if (len(rest) > 1 and rest[0] != "constant") or isinstance(number, (Term, sympy.Basic)):
        return
    rank, number = len(x.shape), 0 if number is None else number
    for dim in range(rank - 1, rank - 1 - len(amounts) // 2, -1):
        pair = amounts[2 * (rank - 1 - dim) :][:2]
        if not all(m.sizes.at_most(0, n) or m.sizes.at_most(n, 0) for n in pair):
            return
    for dim in range(rank - 1, rank - 1 - len(amounts) // 2, -1):
        front, back = amounts[2 * (rank - 1 - dim) :][:2]
        start = 0 if m.sizes.at_most(0, front) else -front
        end = x.shape[dim] if m.sizes.at_most(0, back) else x.shape[dim] + back
        parts = [m.slice(x, dim, start, end)]
        for amount, place in ((front, 0), (back, len(parts) + 1)):
            if not m.sizes.at_most(amount, 0):
                shape = (*parts[0].shape[:dim], amount, *parts[0].shape[dim + 1 :])
                parts.insert(place, m.full(shape, number, t.dtype, t.device))
        total = sum((sympy.sympify(part.shape[dim]) for part in parts), sympy.Integer(0))
        shape = (*parts[0].shape[:dim], total, *parts[0].shape[dim + 1 :])
        x = parts[0] if len(parts) == 1 else m.cat(parts, dim, shape, t)
    yield x


def pad_replicate(m: Terms, t: Term) -> Rights:
    x, amounts, mode, _ = t.args
    dim = len(x.shape) - 1
    size = x.shape[dim]
    known = m.sizes.at_most(1, size) and all(m.sizes.at_most(0, n) for n in amounts)
    if mode != "replicate" or len(amounts) != 2 or not known:
        return
    rest = x.shape[:dim]
    ends = [m.slice(x, dim, 0, 1), m.slice(x, dim, size - 1, size)]
    front, back = (m.expand(end, (*rest, n)) for end, n in zip(ends, amounts, strict=True))
    yield m.cat([front, x, back], dim, (*rest, size + sum(amounts)), t)


def zero_product(m: Terms, t: Term) -> Rights:
    has_zero = any(is_number(x, 0) for x in (*operands(t.args), *t.args))
    if has_zero and all(map(is_finite, operands(t.args))):
        yield m.full(t.shape, 0, t.dtype, t.device)


DIVISORS = {"div": 1, "reciprocal": 0, "log": 0, "log2": 0, "log10": 0, "rsqrt": 0, "pow": 0}


def is_finite(t: Term) -> bool:
    """Whether no infinity is seen in how a value is computed."""
    seen, pending = set(), [t]
    while pending:
        x = pending.pop()
        if x in seen:
            continue
        seen.add(x)
        pending += operands(x.args)
        if any(isinstance(arg, float) and not math.isfinite(arg) for arg in x.args):
            return False
        place = DIVISORS.get(x.op.split(".")[1]) if x.op.startswith("aten.") else None
        if place is not None and is_number(x.args[place], 0):
            return False
        if x.op == "constant" and not (
            x.parts and torch.frombuffer(bytearray(x.parts), dtype=x.dtype).isfinite().all()
        ):
            return False
    return True


def lowest(bottom: Callable[[Any], float]) -> Callable[[Terms, Term], Rights]:
    """The maximum with the lowest number, and the minimum with the highest."""

    def rights(m: Terms, t: Term) -> Rights:
        number = bottom(t.dtype) * (1 if "maximum" in t.op else -1)
        for x, other in (t.args, t.args[::-1]):
            if is_number(x, number) and is_of_type(other, t):
                yield other

    return rights


def infinity(m: Terms, t: Term) -> Rights:
    x, y, alpha = t.args
    pairs = ((x, y, 1), (y, x, 1 if t.op == "aten.add.Tensor" else -1))
    for infinite, other, sign in pairs if isinstance(y, Term) and alpha == 1 else ():
        number = number_of(infinite)
        if isinstance(number, float) and math.isinf(number) and is_finite(other):
            yield m.full(t.shape, sign * float(number), t.dtype, t.device)


def folded_function(m: Terms, t: Term) -> Rights:
    if len(t.args) == 1 and t.args[0].dtype == t.dtype:
        yield from fold(m, t)


SUMS = operators("add.Tensor sub.Tensor add.Scalar sub.Scalar")
PRODUCTS = operators("mul.Tensor mul.Scalar matmul bmm mm mv einsum")
EXTREMES = operators("maximum minimum")
COMPARED = operators("eq.Scalar ne.Scalar lt.Scalar le.Scalar gt.Scalar ge.Scalar logical_not")
COMMUTED = "mul.Tensor logical_and logical_or bitwise_and.Tensor bitwise_or.Tensor eq.Tensor"
NUMBERS = {
    "copy": (
        operators(
            "clone contiguous detach alias lift_fresh_copy lift_fresh lift positive expand_copy "
            "detach_copy"
        ),
        operand,
    ),
    "evaluated-dropout": (operators("dropout feature_dropout alpha_dropout"), dropout),
    "cast": (
        operators("to.dtype to.device to.dtype_layout to.other _to_copy type_as") | {"cast"},
        cast,
    ),
    "add-zero-integer": (SUMS, neutral_number(False, 0)),
    "add-zero-float": (SUMS, neutral_number(True, 0)),
    "times-one": (
        operators("mul.Tensor mul.Scalar div.Tensor div.Scalar"),
        neutral_number(False, 1),
    ),
    "commute": (operators(f"add.Tensor ne.Tensor {COMMUTED}"), commute),
    "spelling": (None, spelling),
    "mirror": (operators("gt.Tensor ge.Tensor"), mirror),
    "not": (operators("bitwise_not"), not_),
    "not-not": (operators("logical_not"), not_not),
    "fill": (
        operators(
            "zeros ones zeros_like ones_like new_zeros new_ones full full_like new_full "
            "fill.Scalar fill.Tensor scalar_tensor"
        ),
        fill,
    ),
    "full": ({"full"}, full),
    "constant": ({"constant"}, constant),
    "range": (operators("arange arange.start arange.start_step"), as_range),
    "shift-range": (SUMS, shift_range),
    "slice-of-range": ({"slice"}, slice_of_range),
    "constant-folding": (COMPARED | {"cast"}, fold),
    "where": (operators("where.self"), where),
    "where-number": (operators("where.ScalarOther where.ScalarSelf"), where_number),
    "fill-nothing": (operators("masked_fill.Scalar masked_fill.Tensor"), fill_nothing),
    "neutral-truth": (
        operators("logical_and logical_or bitwise_and.Tensor bitwise_or.Tensor"),
        neutral_truth,
    ),
    "attention-mask": (operators("scaled_dot_product_attention"), attention_mask),
    "grouped-attention": (operators("scaled_dot_product_attention"), grouped_attention),
    "pad": (operators("pad constant_pad_nd"), pad),
    "pad-replicate": (operators("pad"), pad_replicate),
    "zero-product": (PRODUCTS, zero_product),
    "lowest": (EXTREMES, lowest(lambda dtype: -math.inf)),
    "lowest-finite": (EXTREMES, lowest(lambda dtype: torch.finfo(dtype).min)),
    "infinity": (operators("add.Tensor sub.Tensor"), infinity),
    "folded-function": (
        operators("exp neg relu tanh sigmoid silu sqrt abs"),
        folded_function,
    ),
}
"""Law → the operators at the head of its left side (None: any), and its right sides."""
