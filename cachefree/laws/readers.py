"""How the element of an operator's result is read from elements of its operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch

from cachefree.laws.elements import NARROW, Constant, Elements, Reader, is_float, is_integer
from cachefree.laws.padding import padding_of
from cachefree.terms import Term

__all__ = ["READERS"]

aten = torch.ops.aten


def _full(elements: Elements, term: Term, index: tuple[Any, ...]) -> Any:
    return elements.number(term.args[1], term.dtype)


def _arange(elements: Elements, term: Term, index: tuple[Any, ...]) -> Any:
    if not is_integer(term):
        return None
    return elements.size(term.args[0]) + index[0] * elements.size(term.args[2])


def _reshape(elements: Elements, term: Term, index: tuple[Any, ...]) -> Any:
    source, shape = term.args
    kept = [place for place, size in enumerate(shape) if size != 1]
    own = [place for place, size in enumerate(source.sizes) if size != 1]
    if len(kept) != len(own) or not all(
        elements.facts.equal(shape[a], source.sizes[b]) for a, b in zip(kept, own, strict=True)
    ):
        return None
    inner = [elements.z3.IntVal(0)] * len(source.sizes)
    for a, b in zip(kept, own, strict=True):
        inner[b] = index[a]
    return elements.at(source, tuple(inner))


def _permute(elements: Elements, term: Term, index: tuple[Any, ...]) -> Any:
    source, order = term.args
    inner: list[Any] = [None] * len(order)
    for place, dim in enumerate(order):
        inner[dim] = index[place]
    return elements.at(source, tuple(inner))


def _expand(elements: Elements, term: Term, index: tuple[Any, ...]) -> Any:
    return elements.broadcast(term.args[0], index)


def _slice(elements: Elements, term: Term, index: tuple[Any, ...]) -> Any:
    source, dim, start, _, _ = term.args
    return elements.at(source, (*index[:dim], index[dim] + elements.size(start), *index[dim + 1 :]))


def _cat(elements: Elements, term: Term, index: tuple[Any, ...]) -> Any:
    parts, dim = term.args
    if any(part.dtype != term.dtype for part in parts):
        return None
    offsets = [sympy.Integer(0)]
    for part in parts[:-1]:
        offsets.append(offsets[-1] + part.sizes[dim])
    value = None
    for part, offset in zip(reversed(parts), reversed(offsets), strict=True):
        inner = elements.at(
            part, (*index[:dim], index[dim] - elements.size(offset), *index[dim + 1 :])
        )
        value = (
            inner
            if value is None
            else elements.chosen(
                index[dim] < elements.size(offset + part.sizes[dim]), inner, value, term.dtype
            )
        )
    return value


def _where(elements: Elements, term: Term, index: tuple[Any, ...]) -> Any:
    condition, yes, no = term.args
    if not isinstance(condition, Term) or condition.dtype != torch.bool:
        return None
    return elements.chosen(
        elements.broadcast(condition, index),
        elements.operand(yes, index, term.dtype),
        elements.operand(no, index, term.dtype),
        term.dtype,
    )


def _masked_fill(elements: Elements, term: Term, index: tuple[Any, ...]) -> Any:
    source, mask, number = term.args
    if mask.dtype != torch.bool:
        return None
    return elements.chosen(
        elements.broadcast(mask, index),
        elements.operand(number, index, term.dtype),
        elements.broadcast(source, index),
        term.dtype,
    )


def _triangle(elements: Elements, term: Term, index: tuple[Any, ...]) -> Any:
    source, diagonal = term.args
    offset = elements.size(diagonal)
    below = index[-1] - index[-2] <= offset
    kept = below if term.op is aten.tril.default else index[-1] - index[-2] >= offset
    return elements.chosen(
        kept, elements.at(source, index), elements.number(0, term.dtype), term.dtype
    )


def _cast(elements: Elements, term: Term, index: tuple[Any, ...]) -> Any:
    source = term.args[0]
    return elements.converted(elements.at(source, index), source.dtype, term.dtype)


_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


def _comparison(elements: Elements, term: Term, index: tuple[Any, ...]) -> Any:
    one, other = term.args
    dtypes = {value.dtype for value in (one, other) if isinstance(value, Term)}
    dtype = one.dtype if len(dtypes) == 1 else torch.int64
    if (
        any(is_float(value) for value in (one, other) if isinstance(value, Term))
        or isinstance(one, float)
        or isinstance(other, float)
    ):
        return _float_comparison(elements, term, index)
    if dtype == torch.bool:
        dtype = torch.int64
    if dtype not in (torch.int64, torch.int32):
        return None
    name = str(term.op).split(".")[1]
    return _COMPARISONS[name](
        elements.operand(one, index, dtype), elements.operand(other, index, dtype)
    )


def _float_comparison(elements: Elements, term: Term, index: tuple[Any, ...]) -> Any:
    """A comparison of constant cases with a number."""
    one, other = term.args
    if not isinstance(one, Term) or isinstance(other, (Term, sympy.Basic)) or not is_float(one):
        return None
    cases = elements.broadcast(one, index)
    if not all(isinstance(leaf, Constant) for _, leaf in cases):
        return None
    name = str(term.op).split(".")[1]
    number = torch.tensor(other, dtype=one.dtype).item()  # torch compares in the tensor's dtype
    holds = [condition for condition, leaf in cases if _COMPARISONS[name](float(leaf.text), number)]
    return elements.z3.Or(*holds) if holds else elements.z3.BoolVal(False)


def _truth(elements: Elements, value: Term, index: tuple[Any, ...]) -> Any:
    return elements.converted(elements.broadcast(value, index), value.dtype, torch.bool)


def _logical(elements: Elements, term: Term, index: tuple[Any, ...]) -> Any:
    name = str(term.op).split(".")[1]
    if term.dtype != torch.bool or not all(isinstance(arg, Term) for arg in term.args):
        return None
    truths = [_truth(elements, arg, index) for arg in term.args]
    z3 = elements.z3
    if name.endswith("not"):
        return z3.Not(truths[0])
    if name.endswith("and"):
        return z3.And(*truths)
    return z3.Xor(*truths) if name.endswith("xor") else z3.Or(*truths)


def _arithmetic(elements: Elements, term: Term, index: tuple[Any, ...]) -> Any:
    name = str(term.op).split(".")[1]
    one, other, *rest = term.args
    if rest and rest[0] != 1:
        return None
    if not is_float(term):
        if name == "div" or not (is_integer(term) or term.dtype in NARROW):
            return None
        a, b = elements.operand(one, index, term.dtype), elements.operand(other, index, term.dtype)
        if name == "rsub":
            return _unwrapped(elements, term, b - a)
        return _unwrapped(
            elements, term, a + b if name == "add" else a - b if name == "sub" else a * b
        )
    if _is_wider_number(one, term) or _is_wider_number(other, term):
        return None
    return elements.applied(
        term, [elements.operand(value, index, term.dtype) for value in (one, other)]
    )


def _unwrapped(elements: Elements, term: Term, value: Any) -> Any:
    """An integer result that has not wrapped around; None where it may have."""
    if term.dtype in NARROW:
        limits = torch.iinfo(term.dtype)
        is_out = elements.z3.Or(value < limits.min, value > limits.max)
        return value if elements.never(is_out) else None
    is_wide = term.dtype == torch.int64
    return value if is_wide or elements.is_of_sizes_alone(value) else None


def _is_wider_number(value: Any, term: Term) -> bool:
    """Whether half-precision arithmetic takes a number that half precision does not hold.

    It computes in float32, with the number as float32 has it.
    """
    if term.dtype not in (torch.float16, torch.bfloat16):
        return False
    if isinstance(value, Term):
        return not value.sizes and value.dtype != term.dtype
    return bool(torch.tensor(value, dtype=term.dtype).item() != value)


def _negative(elements: Elements, term: Term, index: tuple[Any, ...]) -> Any:
    if is_float(term):
        return elements.applied(term, [elements.at(term.args[0], index)])
    if not is_integer(term):
        return None
    return _unwrapped(elements, term, -elements.at(term.args[0], index))


def _unary(elements: Elements, term: Term, index: tuple[Any, ...]) -> Any:
    return (
        elements.applied(term, [elements.at(term.args[0], index)])
        if is_float(term) and is_float(term.args[0])
        else None
    )


def _absolute(elements: Elements, term: Term, index: tuple[Any, ...]) -> Any:
    if is_float(term):
        return _unary(elements, term, index)
    if not is_integer(term):
        return None
    value = elements.at(term.args[0], index)
    return _unwrapped(elements, term, elements.z3.If(value >= 0, value, -value))


def _clamp(elements: Elements, term: Term, index: tuple[Any, ...]) -> Any:
    source, low, high = term.args[0], term.args[1], term.args[2] if len(term.args) > 2 else None
    if not is_integer(term) or term.dtype != source.dtype:
        return None
    if isinstance(low, (Term, float)) or isinstance(high, (Term, float)):
        return None
    if term.op is aten.clamp_max.default:
        low, high = None, low
    value, z3 = elements.at(source, index), elements.z3
    if low is not None:
        value = z3.If(value < elements.size(low), elements.size(low), value)
    if high is not None:
        value = z3.If(value > elements.size(high), elements.size(high), value)
    return value


def _slice_scatter(elements: Elements, term: Term, index: tuple[Any, ...]) -> Any:
    whole, part, dim, start, end, step = term.args
    if step != 1:
        return None
    dim %= len(whole.sizes)
    facts, size = elements.facts, whole.sizes[dim]
    start = 0 if start is None else start
    end = size if end is None or (isinstance(end, int) and end >= 2**62) else end
    if facts.at_most(start, -1):
        start = facts.simplified(sympy.Max(0, start + sympy.sympify(size)))
    if facts.at_most(end, -1):
        end = facts.simplified(sympy.Max(0, end + sympy.sympify(size)))
    if not (facts.at_most(0, start) and facts.at_most(0, end)):
        return None
    first, last = elements.size(start), elements.size(end)
    inside = elements.z3.And(index[dim] >= first, index[dim] < last)
    inner = elements.at(part, (*index[:dim], index[dim] - first, *index[dim + 1 :]))
    return elements.chosen(inside, inner, elements.at(whole, index), term.dtype)


def _select_scatter(elements: Elements, term: Term, index: tuple[Any, ...]) -> Any:
    whole, part, dim, place = term.args
    dim %= len(whole.sizes)
    if elements.facts.at_most(place, -1):
        place = place + sympy.sympify(whole.sizes[dim])
    elif not elements.facts.at_most(0, place):
        return None
    inner = elements.at(part, (*index[:dim], *index[dim + 1 :]))
    return elements.chosen(
        index[dim] == elements.size(place), inner, elements.at(whole, index), term.dtype
    )


def _pad(elements: Elements, term: Term, index: tuple[Any, ...]) -> Any:
    """The padded tensor's element inside, the number outside, whatever sign the padding has."""
    found = padding_of(term)
    if found is None:
        return None
    source, pairs, number = found
    z3, inner, inside = elements.z3, list(index), []
    for dim, (front, _) in pairs.items():
        inner[dim] = index[dim] - elements.size(front)
        inside += [inner[dim] >= 0, inner[dim] < elements.size(source.sizes[dim])]
    return elements.chosen(
        z3.And(*inside),
        elements.at(source, tuple(inner)),
        elements.number(number, term.dtype),
        term.dtype,
    )


def _embedding(elements: Elements, term: Term, index: tuple[Any, ...]) -> Any:
    """``embedding(w, i)[…, j] = w[i[…], j]``, and so do gradients where no row is left out."""
    weight, rows, padding, *_ = term.args
    if isinstance(padding, int) and padding >= 0:
        return None
    return elements.at(weight, (elements.at(rows, index[:-1]), index[-1]))


def _index_select(elements: Elements, term: Term, index: tuple[Any, ...]) -> Any:
    source, dim, rows = term.args
    if not source.sizes or len(rows.sizes) != 1:
        return None
    dim %= len(source.sizes)
    return elements.at(source, (*index[:dim], elements.at(rows, (index[dim],)), *index[dim + 1 :]))


def _index(elements: Elements, term: Term, index: tuple[Any, ...]) -> Any:
    """``x[…, rows, …]`` with one tensor of indices that are not negative."""
    source, places = term.args
    given = [(dim, rows) for dim, rows in enumerate(places) if rows is not None]
    if len(given) != 1 or given[0][1].dtype != torch.int64:
        return None
    dim, rows = given[0]
    width = len(rows.sizes)
    row = elements.at(rows, index[dim : dim + width])
    if not elements.never(row < 0):
        return None
    return elements.at(source, (*index[:dim], row, *index[dim + width :]))


def _named(names: str, overloads: str, reader: Reader) -> dict[Any, Reader]:
    found: dict[Any, Reader] = {}
    for name in names.split():
        packet = getattr(aten, name)
        for overload in overloads.split():
            if overload in packet.overloads():
                found[getattr(packet, overload)] = reader
    return found


READERS: dict[Any, Reader] = {
    "full": _full,
    "arange": _arange,
    "reshape": _reshape,
    "permute": _permute,
    "expand": _expand,
    "slice": _slice,
    "cat": _cat,
    "cast": _cast,
    **_named("where", "self ScalarSelf ScalarOther Scalar", _where),
    **_named("masked_fill", "Scalar Tensor", _masked_fill),
    **_named("tril triu", "default", _triangle),
    **_named("eq ne lt le gt ge", "Scalar Tensor", _comparison),
    **_named("logical_and logical_or logical_xor logical_not", "default", _logical),
    **_named("bitwise_and bitwise_or bitwise_xor bitwise_not", "Tensor default", _logical),
    **_named("add sub mul div rsub", "Tensor Scalar", _arithmetic),
    **_named("neg", "default", _negative),
    **_named("abs", "default", _absolute),
    **_named("clamp clamp_min clamp_max", "default", _clamp),
    **_named(
        "log exp sqrt rsqrt sin cos tanh sigmoid silu relu reciprocal log2 floor", "default", _unary
    ),
    **_named("slice_scatter", "default", _slice_scatter),
    **_named("select_scatter", "default", _select_scatter),
    **_named("pad constant_pad_nd", "default", _pad),
    **_named("embedding", "default", _embedding),
    **_named("index_select", "default", _index_select),
    **_named("index", "Tensor", _index),
}
