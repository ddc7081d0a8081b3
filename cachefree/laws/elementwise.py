"""Equality of tensors element by element, decided by a solver for every index and every size.

A mask may be cut out of a triangle, compared from two ranges, or joined from pieces. Here a tensor
is the function
from an index to its element: two tensors are equal if no index and no sizes tell them apart.
Integers and Booleans are the solver's own; a floating-point element is one of a few cases, each a
constant, an element of another tensor, or an operator applied to such.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from cachefree.facts import Facts, translate
from cachefree.laws.law import Law
from cachefree.terms import Term

__all__ = ["ELEMENTWISE", "equal_elementwise"]

aten = torch.ops.aten
_TIMEOUT_MS = 3000
_MOST_CASES = 24

ELEMENTWISE = Law(
    "elementwise",
    "x = y  if x[i] = y[i] for every index i and all sizes",
    "exact",
    (),
    lambda term, rewriter: None,
)


ELEMENTWISE_REAL = Law(
    "elementwise-real",
    "x = y  if x[i] = y[i] over the reals for every index i and all sizes, where z + 0.0 = z",
    "real",
    (),
    lambda term, rewriter: None,
)


class _UnknownError(Exception):
    """An element that the solver is not asked about."""


@dataclass(frozen=True)
class _Constant:
    """A floating-point number, by its bits."""

    text: str


@dataclass(frozen=True)
class _Element:
    """An element of a tensor that is not looked into."""

    term: Term
    index: tuple[Any, ...]


@dataclass(frozen=True)
class _Integer:
    """An integer of the solver, as an operand of a floating-point operator."""

    value: Any


@dataclass(frozen=True)
class _Applied:
    """An elementwise operator applied to elements."""

    op: Any
    dtype: Any
    operands: tuple[Any, ...]


def equal_elementwise(
    one: Term, other: Term, facts: Facts, equal: Callable[[Term, Term], bool]
) -> Law | None:
    """`ELEMENTWISE` where two tensors of one type are shown to be equal, else None.

    Args:
        one: A tensor.
        other: A tensor of the same shape and dtype.
        facts: What holds of the sizes.
        equal: Which other terms are already known to be equal.
    """
    if one.op not in _READERS and other.op not in _READERS:
        return None
    if one.dtype is None or one.dtype.is_complex:
        return None
    with facts.solver_lock:
        try:
            elements = _Elements(facts, equal)
            if not elements.same(one, other):
                return None
            return ELEMENTWISE_REAL if elements.is_real else ELEMENTWISE
        except (_UnknownError, NotImplementedError):
            return None


class _Elements:
    """Elements of terms at symbolic indices."""

    def __init__(self, facts: Facts, equal: Callable[[Term, Term], bool]) -> None:
        import z3

        self.z3 = z3
        self.facts = facts
        self.equal = equal
        self.representatives: list[tuple[Term, Any]] = []
        self.symbols: set[Any] = set()
        self.is_real = False
        self.assumptions: list[Any] = [self.size(fact) for fact in facts.known]

    def size(self, expr: Any) -> Any:
        """A size or a fact for the solver."""
        value = sympy.sympify(expr)
        self.symbols |= value.free_symbols
        return translate(value)

    def same(self, one: Term, other: Term) -> bool:
        index = tuple(self.z3.Int(f"i{place}") for place in range(len(one.sizes)))
        self.assumptions += [
            self.z3.And(i >= 0, i < self.size(size))
            for i, size in zip(index, one.sizes, strict=True)
        ]
        mine, theirs = self.at(one, index), self.at(other, index)
        if not _is_float(one):
            return self.never(mine != theirs)
        return all(
            self.agree(left, right, self.z3.And(here, there))
            for here, left in mine
            for there, right in theirs
        )

    def never(self, condition: Any) -> bool:
        """Whether a condition cannot hold."""
        solver = self.z3.Solver()
        solver.set("timeout", _TIMEOUT_MS)
        solver.add(*self.assumptions, *(translate(symbol) >= 0 for symbol in self.symbols))
        solver.add(condition)
        return bool(solver.check() == self.z3.unsat)

    def agree(self, one: Any, other: Any, condition: Any) -> bool:
        """Whether two floating-point elements are the same wherever the condition holds."""
        if isinstance(one, _Constant) and one == other:
            return True
        if isinstance(one, _Element) and isinstance(other, _Element):
            if one.term is other.term or self.equal(one.term, other.term):
                differs = [a != b for a, b in zip(one.index, other.index, strict=True)]
                return self.never(
                    self.z3.And(condition, self.z3.Or(*differs) if differs else False)
                )
        if isinstance(one, _Integer) and isinstance(other, _Integer):
            return self.never(self.z3.And(condition, one.value != other.value))
        if (
            isinstance(one, _Applied)
            and isinstance(other, _Applied)
            and (one.op, one.dtype) == (other.op, other.dtype)
        ):
            if len(one.operands) == len(other.operands) and all(
                self.agree(a, b, condition)
                for a, b in zip(one.operands, other.operands, strict=True)
            ):
                return True
        return self.never(condition)

    def at(self, term: Term, index: tuple[Any, ...]) -> Any:
        """The element: the solver's integer or truth value, or the cases of a float."""
        reader = _READERS.get(term.op)
        if reader is not None:
            try:
                value = reader(self, term, index)
            except (_UnknownError, NotImplementedError):
                value = None
            if value is not None and not (_is_float(term) and len(value) > _MOST_CASES):
                return value
        return self.opaque(term, index)

    def opaque(self, term: Term, index: tuple[Any, ...]) -> Any:
        """The element of a tensor that is not looked into."""
        if _is_float(term):
            return [(self.z3.BoolVal(True), _Element(term, index))]
        for known, function in self.representatives:
            if known is term or (
                known.dtype == term.dtype
                and len(known.sizes) == len(index)
                and self.equal(known, term)
            ):
                return function(*index) if index else function
        z3 = self.z3
        sort = z3.BoolSort() if term.dtype == torch.bool else z3.IntSort()
        name = f"t{term.number}"
        function = (
            z3.Function(name, *[z3.IntSort()] * len(index), sort) if index else z3.Const(name, sort)
        )
        self.representatives.append((term, function))
        return function(*index) if index else function

    def broadcast(self, term: Term, index: tuple[Any, ...]) -> Any:
        """The element of an operand that is broadcast to the index."""
        own = index[len(index) - len(term.sizes) :] if term.sizes else ()
        zero = self.z3.IntVal(0)
        return self.at(
            term, tuple(zero if size == 1 else i for i, size in zip(own, term.sizes, strict=True))
        )

    def operand(self, value: Any, index: tuple[Any, ...], dtype: Any) -> Any:
        """A tensor operand's element or a number, as an element of ``dtype``."""
        if isinstance(value, Term):
            return self.converted(self.broadcast(value, index), value.dtype, dtype)
        return self.number(value, dtype)

    def number(self, value: Any, dtype: Any) -> Any:
        """A number as an element."""
        if dtype == torch.bool:
            return self.z3.BoolVal(bool(value))
        if dtype.is_floating_point:
            if isinstance(value, sympy.Basic):
                raise _UnknownError
            return [
                (self.z3.BoolVal(True), _Constant(repr(torch.tensor(value, dtype=dtype).item())))
            ]
        if isinstance(value, float):
            raise _UnknownError
        return self.size(value) if isinstance(value, sympy.Basic) else self.z3.IntVal(int(value))

    def converted(self, value: Any, source: Any, target: Any) -> Any:
        """An element cast to another dtype."""
        z3 = self.z3
        if source == target:
            return value
        if target.is_floating_point:
            if source == torch.bool:
                return [(value, _Constant("1.0")), (z3.Not(value), _Constant("0.0"))]
            if source.is_floating_point:
                return [(condition, self.rounded(leaf, target)) for condition, leaf in value]
            return [(z3.BoolVal(True), _Applied("cast", target, (_Integer(value),)))]
        if source.is_floating_point:
            if target == torch.bool and all(isinstance(leaf, _Constant) for _, leaf in value):
                return z3.Or(*[condition for condition, leaf in value if float(leaf.text) != 0])
            raise _UnknownError
        if source == torch.bool:
            return z3.If(value, z3.IntVal(1), z3.IntVal(0))
        if target == torch.bool:
            return value != 0
        if target in (torch.int64, torch.int32):
            return value
        raise _UnknownError

    def rounded(self, leaf: Any, dtype: Any) -> Any:
        """A floating-point element cast to another floating-point dtype."""
        if isinstance(leaf, _Constant):
            return _Constant(repr(torch.tensor(float(leaf.text), dtype=dtype).item()))
        return _Applied("cast", dtype, (leaf,))

    def chosen(self, condition: Any, yes: Any, no: Any, dtype: Any) -> Any:
        """``yes`` where the condition holds, else ``no``."""
        if not dtype.is_floating_point:
            return self.z3.If(condition, yes, no)
        z3 = self.z3
        return [(z3.And(condition, c), leaf) for c, leaf in yes] + [
            (z3.And(z3.Not(condition), c), leaf) for c, leaf in no
        ]

    def applied(self, term: Term, operands: Sequence[Any]) -> Any:
        """A floating-point operator on its operands' cases; computed where all are constant."""
        cases: list[tuple[Any, tuple[Any, ...]]] = [(self.z3.BoolVal(True), ())]
        for operand in operands:
            cases = [
                (self.z3.And(here, there), (*leaves, leaf))
                for here, leaves in cases
                for there, leaf in operand
            ]
            if len(cases) > _MOST_CASES:
                raise _UnknownError
        return [(condition, self.folded(term, leaves)) for condition, leaves in cases]

    def folded(self, term: Term, leaves: tuple[Any, ...]) -> Any:
        """An operator on constants as the constant that it gives."""
        if all(isinstance(leaf, _Constant) for leaf in leaves):
            numbers: list[Any] = [
                torch.tensor(float(leaf.text), dtype=term.dtype) for leaf in leaves
            ]
            if "Scalar" in term.op._overloadname:
                numbers[1:] = [number.item() for number in numbers[1:]]
            return _Constant(repr(term.op(*numbers).item()))
        return self.neutral(term, leaves) or _Applied(term.op, term.dtype, leaves)

    def neutral(self, term: Term, leaves: tuple[Any, ...]) -> Any:
        """The other operand where one is the operator's neutral number; None where none is."""
        name = str(term.op).split(".")[1]
        for number, other in (leaves[::-1], leaves) if len(leaves) == 2 else ():
            if not isinstance(number, _Constant) or isinstance(other, _Constant):
                continue
            is_second = number is leaves[1]
            if (name == "mul" or (name == "div" and is_second)) and number.text == "1.0":
                return other
            if name == "sub" and is_second and number.text == "0.0":
                return other
            if name == "add" and number.text in ("0.0", "-0.0"):
                self.is_real = self.is_real or number.text == "0.0"
                return other
        return None


def _is_float(term: Term) -> bool:
    return term.dtype is not None and term.dtype.is_floating_point


Reader = Callable[[_Elements, Term, tuple[Any, ...]], Any]


def _full(elements: _Elements, term: Term, index: tuple[Any, ...]) -> Any:
    return elements.number(term.args[1], term.dtype)


def _arange(elements: _Elements, term: Term, index: tuple[Any, ...]) -> Any:
    return elements.size(term.args[0]) + index[0] * elements.size(term.args[2])


def _reshape(elements: _Elements, term: Term, index: tuple[Any, ...]) -> Any:
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


def _permute(elements: _Elements, term: Term, index: tuple[Any, ...]) -> Any:
    source, order = term.args
    inner: list[Any] = [None] * len(order)
    for place, dim in enumerate(order):
        inner[dim] = index[place]
    return elements.at(source, tuple(inner))


def _expand(elements: _Elements, term: Term, index: tuple[Any, ...]) -> Any:
    return elements.broadcast(term.args[0], index)


def _slice(elements: _Elements, term: Term, index: tuple[Any, ...]) -> Any:
    source, dim, start, _, _ = term.args
    return elements.at(source, (*index[:dim], index[dim] + elements.size(start), *index[dim + 1 :]))


def _cat(elements: _Elements, term: Term, index: tuple[Any, ...]) -> Any:
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


def _where(elements: _Elements, term: Term, index: tuple[Any, ...]) -> Any:
    condition, yes, no = term.args
    if not isinstance(condition, Term) or condition.dtype != torch.bool:
        return None
    return elements.chosen(
        elements.broadcast(condition, index),
        elements.operand(yes, index, term.dtype),
        elements.operand(no, index, term.dtype),
        term.dtype,
    )


def _masked_fill(elements: _Elements, term: Term, index: tuple[Any, ...]) -> Any:
    source, mask, number = term.args
    return elements.chosen(
        elements.broadcast(mask, index),
        elements.operand(number, index, term.dtype),
        elements.broadcast(source, index),
        term.dtype,
    )


def _triangle(elements: _Elements, term: Term, index: tuple[Any, ...]) -> Any:
    source, diagonal = term.args
    offset = elements.size(diagonal)
    below = index[-1] - index[-2] <= offset
    kept = below if term.op is aten.tril.default else index[-1] - index[-2] >= offset
    return elements.chosen(
        kept, elements.at(source, index), elements.number(0, term.dtype), term.dtype
    )


def _cast(elements: _Elements, term: Term, index: tuple[Any, ...]) -> Any:
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


def _comparison(elements: _Elements, term: Term, index: tuple[Any, ...]) -> Any:
    one, other = term.args
    dtypes = {value.dtype for value in (one, other) if isinstance(value, Term)}
    dtype = one.dtype if len(dtypes) == 1 else torch.int64
    if (
        any(d.is_floating_point for d in dtypes)
        or isinstance(one, float)
        or isinstance(other, float)
    ):
        return _float_comparison(elements, term, index)
    if dtype == torch.bool and not (isinstance(one, Term) and isinstance(other, Term)):
        dtype = torch.int64
    name = str(term.op).split(".")[1]
    return _COMPARISONS[name](
        elements.operand(one, index, dtype), elements.operand(other, index, dtype)
    )


def _float_comparison(elements: _Elements, term: Term, index: tuple[Any, ...]) -> Any:
    """A comparison of constant cases with a number."""
    one, other = term.args
    if not isinstance(one, Term) or isinstance(other, (Term, sympy.Basic)) or not _is_float(one):
        return None
    cases = elements.broadcast(one, index)
    if not all(isinstance(leaf, _Constant) for _, leaf in cases):
        return None
    name = str(term.op).split(".")[1]
    holds = [condition for condition, leaf in cases if _COMPARISONS[name](float(leaf.text), other)]
    return elements.z3.Or(*holds) if holds else elements.z3.BoolVal(False)


def _truth(elements: _Elements, value: Term, index: tuple[Any, ...]) -> Any:
    return elements.converted(elements.broadcast(value, index), value.dtype, torch.bool)


def _logical(elements: _Elements, term: Term, index: tuple[Any, ...]) -> Any:
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


def _arithmetic(elements: _Elements, term: Term, index: tuple[Any, ...]) -> Any:
    name = str(term.op).split(".")[1]
    one, other, *rest = term.args
    if rest and (name in ("add", "sub") and rest[0] != 1):
        return None
    if not _is_float(term):
        if name == "div" or term.dtype not in (torch.int64, torch.int32):
            return None
        a, b = elements.operand(one, index, term.dtype), elements.operand(other, index, term.dtype)
        if name == "rsub":
            return b - a
        return a + b if name == "add" else a - b if name == "sub" else a * b
    if rest and rest[0] != 1:
        return None
    return elements.applied(
        term, [elements.operand(value, index, term.dtype) for value in (one, other)]
    )


def _negative(elements: _Elements, term: Term, index: tuple[Any, ...]) -> Any:
    if _is_float(term):
        return elements.applied(term, [elements.at(term.args[0], index)])
    return -elements.at(term.args[0], index)


def _unary(elements: _Elements, term: Term, index: tuple[Any, ...]) -> Any:
    return (
        elements.applied(term, [elements.at(term.args[0], index)])
        if _is_float(term) and _is_float(term.args[0])
        else None
    )


def _absolute(elements: _Elements, term: Term, index: tuple[Any, ...]) -> Any:
    if _is_float(term):
        return _unary(elements, term, index)
    value = elements.at(term.args[0], index)
    return elements.z3.If(value >= 0, value, -value)


def _clamp(elements: _Elements, term: Term, index: tuple[Any, ...]) -> Any:
    source, low, high = term.args[0], term.args[1], term.args[2] if len(term.args) > 2 else None
    if _is_float(term) or isinstance(low, (Term, float)) or isinstance(high, (Term, float)):
        return None
    if term.op is aten.clamp_max.default:
        low, high = None, low
    value, z3 = elements.at(source, index), elements.z3
    if low is not None:
        value = z3.If(value < elements.size(low), elements.size(low), value)
    if high is not None:
        value = z3.If(value > elements.size(high), elements.size(high), value)
    return value


def _slice_scatter(elements: _Elements, term: Term, index: tuple[Any, ...]) -> Any:
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


def _select_scatter(elements: _Elements, term: Term, index: tuple[Any, ...]) -> Any:
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


def _embedding(elements: _Elements, term: Term, index: tuple[Any, ...]) -> Any:
    """``embedding(w, i)[…, j] = w[i[…], j]``."""
    weight, rows = term.args[0], term.args[1]
    return elements.at(weight, (elements.at(rows, index[:-1]), index[-1]))


def _index_select(elements: _Elements, term: Term, index: tuple[Any, ...]) -> Any:
    source, dim, rows = term.args
    dim %= len(source.sizes)
    return elements.at(source, (*index[:dim], elements.at(rows, (index[dim],)), *index[dim + 1 :]))


def _index(elements: _Elements, term: Term, index: tuple[Any, ...]) -> Any:
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


_READERS: dict[Any, Reader] = {
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
    **_named("embedding", "default", _embedding),
    **_named("index_select", "default", _index_select),
    **_named("index", "Tensor", _index),
}
