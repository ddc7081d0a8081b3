"""A number or truth that is made of sizes alone, as an expression of the sizes.

Which one it is, is guessed: the operators are run at small sizes, and at those around the numbers
in the code. Bounds of sizes, of their sums and differences that fit there are shown for all sizes
then, element by element.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch

from cachefree.facts import Facts, translate
from cachefree.laws.evaluation import values_below
from cachefree.laws.quantified import Wanted, is_any, is_each
from cachefree.normal import Normaliser
from cachefree.sizes import compiled, size_symbol, symbols_of
from cachefree.terms import Table, Term, topological

__all__ = ["SizeFact", "UnknownFactError", "symbols_in"]

aten = torch.ops.aten
_SIZES = {0: 1, 1: 24, 2: 10, 3: 6, 4: 4}
_MOST_POINTS = 600
_MOST_NUMBER = 600
_TRUTH_OF = (aten.any.default, aten.any.dim, aten.any.dims)
_ALL_OF = (aten.all.default, aten.all.dim, aten.all.dims)
_LARGEST = (aten.max.default, aten.amax.default)
_LEAST = (aten.min.default, aten.amin.default)
_RELATIONS = {
    "eq": sympy.Eq,
    "ne": sympy.Ne,
    "lt": sympy.Lt,
    "le": sympy.Le,
    "gt": sympy.Gt,
    "ge": sympy.Ge,
}


class UnknownFactError(Exception):
    """What is asked is not known for all sizes."""


class SizeFact:
    """One value of sizes, as an expression.

    Args:
        table: Of all terms.
        term: The value, as the code computes it.
        known: What holds of the sizes.
    """

    def __init__(self, table: Table, term: Term, known: tuple[Any, ...]) -> None:
        self.term = term
        self.symbols = sorted(symbols_in(term) | symbols_of(known), key=str)
        least = [sympy.Ge(symbol, 1) for symbol in self.symbols]
        self.facts = Facts((*least, *known))
        self.normaliser = Normaliser(table, self.facts)
        (self.normal,) = self.normaliser.normal([term])
        if self.normaliser.misnoted:
            raise UnknownFactError
        self.points = self._points(known)

    def given(self) -> Any:
        """The value: a truth or a number of sizes.

        Raises:
            UnknownFactError: it is not known.
        """
        is_truth = self.term.dtype == torch.bool
        value = self._truth(self.normal) if is_truth else self._number(self.normal)
        if [_at(value, sizes) for sizes in self.points] != self._values(self.term):
            raise UnknownFactError
        return value

    def _points(self, known: tuple[Any, ...]) -> list[dict[str, int]]:
        """Small sizes, and those around the numbers in the code, where what is known holds."""
        if len(self.symbols) not in _SIZES:
            raise UnknownFactError
        small = range(1, _SIZES[len(self.symbols)] + 1)
        around = {
            number + step
            for number in _numbers(self.term)
            for step in (-1, 0, 1)
            if 1 <= number + step <= _MOST_NUMBER
        }
        sides = sorted({*small, *around})
        while len(sides) ** len(self.symbols) > _MOST_POINTS and len(sides) > len(around) + 2:
            sides.remove(max(set(sides) - around))
        names = [str(symbol) for symbol in self.symbols]
        points = itertools.product(sides, repeat=len(names))
        tried = [dict(zip(names, point, strict=True)) for point in points]
        found = [sizes for sizes in tried if all(_at(fact, sizes) for fact in known)]
        if not found or len(found) > 2 * _MOST_POINTS:
            raise UnknownFactError
        return found

    def _values(self, term: Term) -> list[Any]:
        found = []
        for sizes in self.points:
            values = _values_at(term, sizes)
            for below, value in values.items():
                if below.shape is not None and tuple(value.shape) != tuple(
                    _at(size, sizes) for size in below.shape
                ):
                    raise UnknownFactError
            found.append(values[term].item())
        return found

    def _truth(self, term: Term) -> Any:
        op = term.op
        name = term.name.split(".")[0]
        if op in _TRUTH_OF:
            return self._any(_below(term, _TRUTH_OF))
        if op in _ALL_OF:
            return sympy.Not(self._any(_below(term, _ALL_OF), is_not=True))
        if name in ("logical_not", "bitwise_not"):
            return sympy.Not(self._truth(self._of_truths(term.args[0])))
        if name in ("logical_and", "bitwise_and", "logical_or", "bitwise_or"):
            join = sympy.And if name.endswith("and") else sympy.Or
            return join(*[self._truth(self._of_truths(part)) for part in term.args])
        if name in _RELATIONS and isinstance(term.args[0], Term):
            one, other = term.args
            if other == 0 and one.op is aten.sum.default:
                return self._sum_against_zero(one, name)
        if name in _RELATIONS and _is_integer(term.args):
            return _RELATIONS[name](*[self._number(part) for part in term.args])
        return self._any(term)

    def _of_truths(self, term: Any) -> Term:
        if not isinstance(term, Term) or term.dtype != torch.bool:
            raise UnknownFactError
        return term

    def _sum_against_zero(self, term: Term, name: str) -> Any:
        source = term.args[0]
        if source.dtype != torch.bool and not is_each(source, lambda x: x >= 0, self.facts):
            raise UnknownFactError
        if name not in ("eq", "ne", "gt"):
            raise UnknownFactError
        found = self._any(source)
        return sympy.Not(found) if name == "eq" else found

    def _any(self, source: Term, *, is_not: bool = False) -> Any:
        """Whether any element is true (or, with ``is_not``, false)."""
        wanted = _is_false if source.dtype == torch.bool else _equals(0)
        values = []
        for sizes in self.points:
            value = _values_at(source, sizes)[source].bool()
            values.append(bool((~value if is_not else value).any()))
        for guess in self._guesses(values):
            if is_any(source, wanted if is_not else None, guess, self.facts):
                return guess
        raise UnknownFactError

    def _guesses(self, values: Sequence[bool]) -> list[Any]:
        """Facts that hold where a value is true: bounds of sizes, of their sums and differences."""
        found = []
        for is_true in (True, False):
            inside = [p for p, v in zip(self.points, values, strict=True) if v is is_true]
            fact = self._hull(inside)
            if all(
                _at(fact, p) is (v is is_true) for p, v in zip(self.points, values, strict=True)
            ):
                found.append(fact if is_true else sympy.Not(fact))
        return found

    def _hull(self, points: Sequence[Mapping[str, int]]) -> Any:
        if not points:
            return sympy.false
        bounds = []
        for side in self._sides():
            near = [_at(side, sizes) for sizes in points]
            everywhere = [_at(side, sizes) for sizes in self.points]
            if min(near) > min(everywhere):
                bounds.append(sympy.Ge(side, min(near)))
            if max(near) < max(everywhere):
                bounds.append(sympy.Le(side, max(near)))
        return self._fewest(bounds, points)

    def _fewest(self, bounds: list[Any], points: Sequence[Mapping[str, int]]) -> Any:
        """The bounds without those that others imply."""
        for bound in list(reversed(bounds)):
            rest = [other for other in bounds if other is not bound]
            count = sum(all(_at(other, sizes) for other in rest) for sizes in self.points)
            if count == len(points):
                bounds = rest
        return sympy.And(*bounds)

    def _sides(self) -> list[Any]:
        pairs = list(itertools.combinations(self.symbols, 2))
        sums = [sum(part) for part in pairs]
        differences = [one - other for one, other in pairs]
        return [*self.symbols, *sums, *([sum(self.symbols)] if pairs else []), *differences]

    def _number(self, value: Any) -> Any:
        """An integer of no axes as an expression of sizes."""
        if not isinstance(value, Term):
            return sympy.sympify(value)
        name = value.name.split(".")[0]
        if value.dtype not in (torch.int64, torch.int32):
            raise UnknownFactError
        if value.op in (*_LARGEST, *_LEAST):
            return self._extreme(value)
        if name in ("add", "sub", "mul") and len(value.args) >= 2 and not value.sizes:
            if value.args[2:] not in ((), (1,)) or not _is_integer(value.args[:2]):
                raise UnknownFactError
            one, other = map(self._number, value.args[:2])
            return one + other if name == "add" else one - other if name == "sub" else one * other
        expr = self._fitted(value)
        if is_each(value, _equals(expr), self.facts):
            return expr
        raise UnknownFactError

    def _extreme(self, term: Term) -> Any:
        source, expr = term.args[0], self._fitted(term)
        limit = _at_most(expr) if term.op in _LARGEST else _at_least(expr)
        is_bound = is_each(source, limit, self.facts)
        if is_bound and is_any(source, _equals(expr), sympy.true, self.facts):
            return expr
        raise UnknownFactError

    def _fitted(self, term: Term) -> Any:
        """The sum of multiples of sizes that a number is at all sizes that were tried."""
        values = self._values(term)
        names = [str(symbol) for symbol in self.symbols]
        rows = [[float(sizes[name]) for name in names] + [1.0] for sizes in self.points]
        due = torch.tensor(values, dtype=torch.float64)[:, None]
        rates = torch.linalg.lstsq(torch.tensor(rows, dtype=torch.float64), due).solution[:, 0]
        *factors, constant = [round(rate) for rate in rates.tolist()]
        parts = [rate * size for rate, size in zip(factors, self.symbols, strict=True)]
        expr = sum(parts, sympy.Integer(constant))
        if [_at(expr, sizes) for sizes in self.points] != values:
            raise UnknownFactError
        return expr


def _is_false(value: Any) -> Any:
    return value == False  # noqa: E712 - an equation of the solver's


def _equals(expr: Any) -> Wanted:
    return lambda value: value == translate(sympy.sympify(expr))


def _at_most(expr: Any) -> Wanted:
    return lambda value: value <= translate(sympy.sympify(expr))


def _at_least(expr: Any) -> Wanted:
    return lambda value: value >= translate(sympy.sympify(expr))


def _at(expr: Any, sizes: Mapping[str, int]) -> Any:
    return compiled(expr)(sizes)


def _values_at(term: Term, sizes: Mapping[str, int]) -> dict[Term, Any]:
    return values_below(term, {size_symbol(name): size for name, size in sizes.items()})


def _below(term: Term, reductions: tuple[Any, ...]) -> Term:
    """What is reduced, through several reductions of one kind."""
    while term.op in reductions:
        term = term.args[0]
    return term


def _is_integer(args: tuple[Any, ...]) -> bool:
    """Whether all are integers: sizes, numbers, tensors of no axes."""
    return all(
        not arg.sizes and arg.dtype in (torch.int64, torch.int32)
        if isinstance(arg, Term)
        else isinstance(arg, (int, sympy.Expr)) and bool(sympy.sympify(arg).is_integer)
        for arg in args
    )


def _leaves(terms: Sequence[Term]) -> Iterator[Any]:
    for term in topological(terms):
        pending: list[Any] = [term.args, term.shape or ()]
        while pending:
            part = pending.pop()
            if isinstance(part, (tuple, list)):
                pending.extend(part)
            elif isinstance(part, (int, sympy.Basic)) and not isinstance(part, bool):
                yield sympy.sympify(part)


def symbols_in(term: Term) -> set[sympy.Symbol]:
    """The sizes that a value is made of."""
    return symbols_of(_leaves([term]))


def _numbers(term: Term) -> set[int]:
    """The numbers in what a value is made of."""
    return {int(number) for leaf in _leaves([term]) for number in leaf.atoms(sympy.Integer)}
