"""Facts about sizes, decided for every size: linear integer arithmetic by elimination.

A size is a sympy expression of symbols that are integers from 0. To show a fact, its negation is
split into cases of inequalities, and variables are eliminated (Fourier and Motzkin) until a
contradiction is left. What cannot be shown is taken for false.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from typing import Any

import sympy

__all__ = ["Sizes", "parsed"]

_MOST_ROWS = 600
Row = tuple[frozenset[tuple[Any, int]], int]  # Σ coefficient · variable + number ≥ 0


class FloorDiv(sympy.Function):  # type: ignore[misc]
    """``x // y``, rounded down."""

    is_integer = True

    @classmethod
    def eval(cls, number: Any, by: Any) -> Any:
        """The number, where both are known."""
        return number // by if number.is_Integer and by.is_Integer and by > 0 else None


class Mod(sympy.Function):  # type: ignore[misc]
    """``x % y``."""

    is_integer = True

    @classmethod
    def eval(cls, number: Any, by: Any) -> Any:
        """The number, where both are known."""
        return number % by if number.is_Integer and by.is_Integer and by > 0 else None


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "+": sympy.Add,
    "*": sympy.Mul,
    "**": sympy.Pow,
    "max": sympy.Max,
    "min": sympy.Min,
    "//": FloorDiv,
    "%": Mod,
    "=": sympy.Eq,
    "!=": sympy.Ne,
    "<=": sympy.Le,
    "<": sympy.Lt,
    ">=": sympy.Ge,
    ">": sympy.Gt,
    "and": sympy.And,
    "or": sympy.Or,
    "not": sympy.Not,
}


def parsed(written: Any) -> Any:
    """An expression from its JSON form: a number, a symbol's name, or ``[operation, …]``."""
    if isinstance(written, str):
        return sympy.Symbol(written, integer=True, nonnegative=True)
    if isinstance(written, bool):
        return sympy.true if written else sympy.false
    if isinstance(written, int):
        return sympy.Integer(written)
    if isinstance(written, float):
        return sympy.Float(written)
    operation, *operands = written
    function = _OPERATIONS.get(operation) or sympy.Function(operation)
    return function(*map(parsed, operands))


class Sizes:
    """What holds of the sizes in a region.

    Args:
        facts: What is known.
        values: Symbols that are other expressions there.
    """

    def __init__(self, facts: list[Any], values: Mapping[Any, Any]) -> None:
        self.values = dict(values)
        self.facts = [self._substituted(fact) for fact in facts]
        self._known: dict[Any, bool] = {}
        self._plain: dict[Any, Any] = {}
        self._forms: dict[Any, list[Any]] = {}
        self._cases = [frozenset[Row]()]
        for fact in self.facts:
            with contextlib.suppress(ValueError, AttributeError):  # to know less is no harm
                more = list(_cases(fact))
                self._cases = [one | other for one in self._cases for other in more]
        self._point = next((point for point in self._points() if self.is_inside(point)), None)

    def holds(self, fact: Any) -> bool:
        """Whether a fact holds at all sizes of the region."""
        fact = self._substituted(sympy.sympify(fact))
        if fact not in self._known:
            self._known[fact] = False
            with contextlib.suppress(ValueError, AttributeError):
                pairs = itertools.product(self._cases, list(_cases(sympy.Not(fact))))
                self._known[fact] = all(_contradict(one | other) for one, other in pairs)
        return self._known[fact]

    def equal(self, one: Any, other: Any) -> bool:
        """Whether two sizes are one number everywhere in the region."""
        return bool(one == other) or self.holds(sympy.Eq(one, other))

    def at_most(self, one: Any, other: Any) -> bool:
        """Whether ``one ≤ other`` everywhere in the region."""
        return self.holds(sympy.Le(one, other))

    def form(self, size: Any) -> Any:
        """One form for all expressions of one number; an int for a number."""
        size = sympy.sympify(size)
        if size not in self._plain:
            plain = sympy.expand(self._substituted(size))
            if not plain.is_number:
                there = self._there(plain)
                alike = self._forms.setdefault(there, [])
                if there is not None and there.is_Integer and self.equal(plain, there):
                    plain = there
                else:
                    found = next((form for form in alike if self.equal(form, plain)), None)
                    alike += [plain] if found is None else []
                    plain = plain if found is None else found
            self._plain[size] = int(plain) if plain.is_Integer else plain
        return self._plain[size]

    def _there(self, size: Any) -> Any:
        """The number that a size is at one point of the region; None where no point is known."""
        if self._point is None:
            return None
        others = size.free_symbols - self._point.keys()
        return size.subs({**self._point, **{s: 17 + sum(map(ord, s.name)) % 83 for s in others}})

    def _substituted(self, expr: Any) -> Any:
        return expr.subs(self.values) if self.values else expr

    def _points(self) -> Iterator[dict[Any, int]]:
        """Sizes to look at before it is asked whether two expressions are one number."""
        names = sorted(set().union(*(f.free_symbols for f in self.facts), ()), key=str)
        for first, step in itertools.product((101, 7, 40, 3, 1, 200), (13, 1, 0)):
            yield {symbol: first + step * place for place, symbol in enumerate(names)}

    def is_inside(self, point: Mapping[Any, int]) -> bool:
        """Whether sizes are in the region."""
        return all(fact.subs(point) == sympy.true for fact in self.facts)


def _cases(fact: Any) -> Iterator[frozenset[Row]]:
    """A fact as alternatives, each a set of inequalities; empty for what is false."""
    if fact == sympy.true or fact == sympy.false:
        yield from [frozenset()] if fact == sympy.true else []
    elif isinstance(fact, sympy.Not):
        inner = fact.args[0]
        if isinstance(inner, (sympy.And, sympy.Or)):
            flipped = sympy.Or if isinstance(inner, sympy.And) else sympy.And
            yield from _cases(flipped(*map(sympy.Not, inner.args)))
        else:
            yield from _cases(inner.negated)
    elif isinstance(fact, sympy.Or):
        for part in fact.args:
            yield from _cases(part)
    elif isinstance(fact, sympy.And):
        for parts in itertools.product(*[list(_cases(part)) for part in fact.args]):
            yield frozenset().union(*parts)
    elif isinstance(fact, sympy.Ne):
        yield from _cases(sympy.Or(fact.lhs < fact.rhs, fact.lhs > fact.rhs, evaluate=False))
    else:
        yield from _relation(fact)


def _relation(fact: Any) -> Iterator[frozenset[Row]]:
    difference = fact.lhs - fact.rhs
    if isinstance(fact, (sympy.Le, sympy.Lt)):
        difference = -difference
    strict = isinstance(fact, (sympy.Lt, sympy.Gt))
    for plain, rows in _linear(difference):
        yield rows | {_row(plain - int(strict))} | (
            {_row(-plain)} if isinstance(fact, sympy.Eq) else set()
        )  # fmt: skip


def _linear(expr: Any) -> Iterator[tuple[Any, frozenset[Row]]]:
    """The expression without maxima, minima and quotients, with what is known in each case."""
    found = next(iter(expr.atoms(sympy.Max, sympy.Min, FloorDiv, Mod)), None)
    if found is None:
        yield sympy.expand(expr), frozenset()
        return
    if isinstance(found, (sympy.Max, sympy.Min)):
        sign = 1 if isinstance(found, sympy.Max) else -1
        for chosen in found.args:
            limits = [sign * (chosen - other) for other in found.args if other is not chosen]
            yield from _with(expr.xreplace({found: chosen}), limits)
        return
    number, by = found.args
    if not (by.is_Integer and by > 0):
        raise ValueError(f"{found} divides by what is no number")
    quotient = sympy.Symbol(f"⌊{number}/{by}⌋", integer=True)
    rest = number - by * quotient
    value = quotient if found.func == FloorDiv else rest
    yield from _with(expr.xreplace({found: value}), [rest, by - 1 - rest])


def _with(expr: Any, limits: list[Any]) -> Iterator[tuple[Any, frozenset[Row]]]:
    for plain, rows in _linear(expr):
        for parts in itertools.product(*[list(_linear(limit)) for limit in limits]):
            known = [{_row(part)} | below for part, below in parts]
            yield plain, frozenset().union(rows, *known)


def _row(expr: Any) -> Row:
    number, coefficients = 0, []
    for variable, coefficient in sympy.expand(expr).as_coefficients_dict().items():
        if not coefficient.is_Integer:
            raise ValueError(f"{expr} has fractions")
        if variable == 1:
            number = int(coefficient)
        elif not variable.is_integer:
            raise ValueError(f"{variable} may be no integer")
        else:
            coefficients.append((variable, int(coefficient)))
    return frozenset(coefficients), number


def _contradict(rows: frozenset[Row]) -> bool:
    """Whether no integers satisfy all inequalities; False where that is not shown."""
    variables = {variable for coefficients, _ in rows for variable, _ in coefficients}
    left = {_tight(row) for row in rows}
    left |= {(frozenset([(v, 1)]), 0) for v in variables if v.is_nonnegative}
    while variables:
        if any(not coefficients and number < 0 for coefficients, number in left):
            return True
        of = {v: [r for r in left if any(w == v for w, _ in r[0])] for v in variables}
        chosen = min(variables, key=lambda v: (len(of[v]), str(v)))
        variables.discard(chosen)
        up = [row for row in of[chosen] if dict(row[0])[chosen] > 0]
        down = [row for row in of[chosen] if dict(row[0])[chosen] < 0]
        left -= set(of[chosen])
        left |= {_combined(a, b, chosen) for a in up for b in down}
        if len(left) > _MOST_ROWS:
            return False
    return any(not coefficients and number < 0 for coefficients, number in left)


def _combined(up: Row, down: Row, variable: Any) -> Row:
    first, second = dict(up[0]), dict(down[0])
    by, times = -second[variable], first[variable]
    total = {v: by * first.get(v, 0) + times * second.get(v, 0) for v in {*first, *second}}
    rest = frozenset((v, c) for v, c in total.items() if c)
    return _tight((rest, by * up[1] + times * down[1]))


def _tight(row: Row) -> Row:
    """Divided by the common divisor; integers let the number be rounded down."""
    coefficients, number = row
    divisor = reduce(math.gcd, (c for _, c in coefficients), 0)
    if divisor < 2:
        return row
    return frozenset((v, c // divisor) for v, c in coefficients), number // divisor
