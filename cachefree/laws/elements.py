"""The element of a tensor at a symbolic index, for a solver.

Integers and Booleans are the solver's own. A floating-point element is one of a few cases, each a
constant, an element of another tensor, or an operator applied to such.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from cachefree.facts import Facts, translate
from cachefree.laws.zeroness import is_nonzero, is_positive_zero
from cachefree.terms import Term

__all__ = [
    "NARROW",
    "Constant",
    "Elements",
    "Reader",
    "UnknownElementError",
    "is_float",
    "is_integer",
]

_TIMEOUT_MS = 3000
_MOST_CASES = 24
_INTEGERS = (torch.int64, torch.int32)
NARROW = (torch.uint8, torch.int8, torch.int16)


class UnknownElementError(Exception):
    """An element that the solver is not asked about."""


@dataclass(frozen=True)
class Constant:
    """A floating-point number, by its bits."""

    text: str


@dataclass(frozen=True)
class Element:
    """An element of a tensor that is not looked into."""

    term: Term
    index: tuple[Any, ...]


@dataclass(frozen=True)
class Integer:
    """An integer of the solver, as an operand of a floating-point operator."""

    value: Any


@dataclass(frozen=True)
class Applied:
    """An elementwise operator applied to elements."""

    op: Any
    dtype: Any
    operands: tuple[Any, ...]


class Elements:
    """Elements of terms at symbolic indices.

    Args:
        facts: What holds of the sizes.
        equal: Which terms are already known to be equal.
        readers: How the element of an operator's result is read, for each operator looked into.
    """

    def __init__(
        self,
        facts: Facts,
        equal: Callable[[Term, Term], bool],
        readers: Mapping[Any, Reader],
    ) -> None:
        import z3

        self.z3 = z3
        self.facts = facts
        self.equal = equal
        self.readers = readers
        self.representatives: list[tuple[Term, Any]] = []
        self.floats: list[Term] = []
        self.symbols: set[Any] = set()
        self.is_real = self.is_signless = False
        self._answers: dict[tuple[int, int, int], tuple[Any, bool]] = {}
        self.assumptions: list[Any] = [self.size(fact) for fact in facts.known]

    def size(self, expr: Any) -> Any:
        """A size or a fact for the solver."""
        value = sympy.sympify(expr)
        self.symbols |= value.free_symbols
        return translate(value)

    def same(self, one: Term, other: Term) -> bool:
        """Whether two tensors of one shape and dtype have the same elements."""
        index = self.indices(one)
        mine, theirs = self.at(one, index), self.at(other, index)
        if not is_float(one):
            return self.never(mine != theirs)
        return all(
            self.agree(left, right, self.z3.And(here, there))
            for here, left in mine
            for there, right in theirs
        )

    def uniform(self, term: Term) -> bool | float | None:
        """The number or truth that every element is; None where they differ."""
        index = self.indices(term)
        value = self.at(term, index)
        if not is_float(term):
            truths = [truth for truth in (True, False) if self.never(value != truth)]
            return truths[0] if truths else None
        found = {leaf for condition, leaf in value if not self.never(condition)}
        leaf = found.pop() if len(found) == 1 else None
        return float(leaf.text) if isinstance(leaf, Constant) else None

    def indices(self, term: Term) -> tuple[Any, ...]:
        """Symbols of an index into a tensor."""
        index = tuple(self.z3.Int(f"i{place}") for place in range(len(term.sizes)))
        self.assumptions += [
            self.z3.And(i >= 0, i < self.size(size))
            for i, size in zip(index, term.sizes, strict=True)
        ]
        return index

    def never(self, condition: Any) -> bool:
        """Whether a condition cannot hold."""
        condition = self.z3.simplify(condition)
        if self.z3.is_true(condition):
            return False  # tensors without elements are known by a law of their own
        if self.z3.is_false(condition):
            return True
        known = (condition.get_id(), len(self.assumptions), len(self.symbols))
        if known not in self._answers:
            self._answers[known] = condition, self._cannot_hold(condition)
        return self._answers[known][1]

    def _cannot_hold(self, condition: Any) -> bool:
        solver = self.z3.Solver()
        solver.set("timeout", _TIMEOUT_MS)
        solver.add(*self.assumptions, *(translate(symbol) >= 0 for symbol in self.symbols))
        solver.add(condition)
        return bool(solver.check() == self.z3.unsat)

    def agree(self, one: Any, other: Any, condition: Any) -> bool:
        """Whether two floating-point elements are the same wherever the condition holds."""
        if isinstance(one, Constant) and isinstance(other, Constant):
            if one == other or self.never(condition):
                return True
            is_zero = float(one.text) == float(other.text) == 0
            self.is_signless = self.is_signless or is_zero  # one of them is −0.0
            return is_zero
        if isinstance(one, Constant) or isinstance(other, Constant):
            number, leaf = (one, other) if isinstance(one, Constant) else (other, one)
            return self.never(condition) or self.is_zero(number, leaf, condition)
        if (
            isinstance(one, Element)
            and isinstance(other, Element)
            and (one.term is other.term or self.equal(one.term, other.term))
        ):
            differs = [a != b for a, b in zip(one.index, other.index, strict=True)]
            return self.never(self.z3.And(condition, self.z3.Or(*differs) if differs else False))
        if isinstance(one, Integer) and isinstance(other, Integer):
            return self.never(self.z3.And(condition, one.value != other.value))
        if (
            isinstance(one, Applied)
            and isinstance(other, Applied)
            and (one.op, one.dtype) == (other.op, other.dtype)
            and len(one.operands) == len(other.operands)
            and all(
                self.agree(a, b, condition)
                for a, b in zip(one.operands, other.operands, strict=True)
            )
        ):
            return True
        return self.never(condition)

    def is_zero(self, number: Constant, leaf: Any, condition: Any) -> bool:
        """Whether an element and a number are both zero wherever the condition holds."""
        if float(number.text) != 0 or isinstance(leaf, Integer):
            return False
        if not self.never(self.z3.And(condition, is_nonzero(self, leaf))):
            return False
        self.is_signless |= number.text != "0.0" or not is_positive_zero(leaf)
        return True

    def at(self, term: Term, index: tuple[Any, ...]) -> Any:
        """The element: the solver's integer or truth value, or the cases of a float."""
        reader = self.readers.get(term.op)
        if reader is not None:
            try:
                value = reader(self, term, index)
            except (UnknownElementError, NotImplementedError):
                value = None
            if value is not None and not (is_float(term) and len(value) > _MOST_CASES):
                return value
        return self.opaque(term, index)

    def opaque(self, term: Term, index: tuple[Any, ...]) -> Any:
        """The element of a tensor that is not looked into."""
        if is_float(term):
            return [(self.z3.BoolVal(True), Element(term, index))]
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
                raise UnknownElementError
            return [
                (self.z3.BoolVal(True), Constant(repr(torch.tensor(value, dtype=dtype).item())))
            ]
        if isinstance(value, float):
            raise UnknownElementError
        return self.size(value) if isinstance(value, sympy.Basic) else self.z3.IntVal(int(value))

    def converted(self, value: Any, source: Any, target: Any) -> Any:
        """An element cast to another dtype."""
        z3 = self.z3
        if source == target:
            return value
        if target.is_floating_point:
            if source == torch.bool:
                return [(value, Constant("1.0")), (z3.Not(value), Constant("0.0"))]
            if source.is_floating_point:
                return [(condition, self.rounded(leaf, target)) for condition, leaf in value]
            number = z3.simplify(value)
            if z3.is_int_value(number) and abs(number.as_long()) < 2**53:
                return self.number(number.as_long(), target)
            return [(z3.BoolVal(True), Applied("cast", target, (Integer(value),)))]
        if source.is_floating_point:
            if target == torch.bool:
                return z3.Or(*[z3.And(here, self.truth(leaf)) for here, leaf in value])
            raise UnknownElementError
        if source == torch.bool:
            return z3.If(value, z3.IntVal(1), z3.IntVal(0))
        if source not in (*_INTEGERS, *NARROW):
            raise UnknownElementError  # what torch makes of large unsigned integers
        if target == torch.bool:
            return value != 0
        if target == torch.int64 or (target == torch.int32 and self.fits_int32(value, source)):
            return value
        raise UnknownElementError

    def truth(self, leaf: Any) -> Any:
        """Whether a floating-point element is not zero."""
        if isinstance(leaf, Constant):
            return self.z3.BoolVal(float(leaf.text) != 0)
        return is_nonzero(self, leaf)

    def representative(self, term: Term) -> Term:
        """The first term looked at that a floating-point term is known to be equal to."""
        for known in self.floats:
            if known is term or (
                known.dtype == term.dtype
                and len(known.sizes) == len(term.sizes)
                and self.equal(known, term)
            ):
                return known
        self.floats.append(term)
        return term

    def fits_int32(self, value: Any, source: Any) -> bool:
        """Whether an integer element is one of 32 bits, by its dtype or by what it is made of."""
        return source in NARROW or self.is_of_sizes_alone(value)

    def is_of_sizes_alone(self, value: Any) -> bool:
        """Whether no tensor's element is in an integer: it is then as small as the sizes are."""
        elements = {str(function) for _, function in self.representatives}
        pending, seen = [value], set()
        while pending:
            part = pending.pop()
            if part.get_id() in seen:
                continue
            seen.add(part.get_id())
            if part.decl().name() in elements:
                return False
            pending.extend(part.children())
        return True

    def rounded(self, leaf: Any, dtype: Any) -> Any:
        """A floating-point element cast to another floating-point dtype."""
        if isinstance(leaf, Constant):
            return Constant(repr(torch.tensor(float(leaf.text), dtype=dtype).item()))
        return Applied("cast", dtype, (leaf,))

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
                raise UnknownElementError
        return [(condition, self.folded(term, leaves)) for condition, leaves in cases]

    def folded(self, term: Term, leaves: tuple[Any, ...]) -> Any:
        """An operator on constants as the constant that it gives."""
        if all(isinstance(leaf, Constant) for leaf in leaves):
            numbers: list[Any] = [
                torch.tensor(float(leaf.text), dtype=term.dtype) for leaf in leaves
            ]
            if "Scalar" in term.op._overloadname:
                numbers[1:] = [number.item() for number in numbers[1:]]
            return Constant(repr(term.op(*numbers).item()))
        return self.neutral(term, leaves) or Applied(term.op, term.dtype, leaves)

    def neutral(self, term: Term, leaves: tuple[Any, ...]) -> Any:
        """The other operand where one is the operator's neutral number; None where none is."""
        name = str(term.op).split(".")[1]
        for number, other in (leaves[::-1], leaves) if len(leaves) == 2 else ():
            if not isinstance(number, Constant) or isinstance(other, Constant):
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


def is_float(term: Term) -> bool:
    """Whether a term is a tensor of floating-point numbers."""
    return term.dtype is not None and term.dtype.is_floating_point


def is_integer(term: Term) -> bool:
    """Whether a term is a tensor of integers that are computed with as if they had no end.

    Those are integers of 64 bits; those of 32 bits where no tensor's element is in them. Narrower
    and unsigned ones wrap around at numbers that sizes reach, which has to be shown not to be so.
    """
    return term.dtype in _INTEGERS


Reader = Callable[[Elements, Term, tuple[Any, ...]], Any]
"""The element of an operator's result at an index, from elements of its operands; None if unknown.
"""
