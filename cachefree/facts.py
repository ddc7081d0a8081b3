"""What holds of sizes: decided for every size by a solver, never by trying.

Sizes are nonnegative integers. A `Facts` object knows some facts of them (a region of the domain)
and answers whether another one follows. The answer ``False`` means "not shown", not "false".
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any

import sympy
from torch.utils._sympy.functions import CleanDiv, FloorDiv, Max, Min, Mod, PythonMod

from cachefree.sizes import expression, symbols_of

__all__ = ["Facts", "translate"]

_TIMEOUT_MS = 2000
_LOCK = threading.RLock()  # z3's default context serves one thread at a time


class Facts:
    """A set of facts about sizes, closed under what a solver can show.

    Args:
        known: Boolean sympy expressions that hold.

    Attributes:
        shown: What laws have found out under these facts, by whatever they asked.
    """

    def __init__(self, known: Iterable[Any] = ()) -> None:
        self.known: tuple[Any, ...] = tuple(
            fact for fact in known if fact is not True and fact is not sympy.true
        )
        self._cache: dict[Any, bool] = {}
        self._simple: dict[Any, Any] = {}
        self.shown: dict[Any, bool] = {}

    @property
    def solver_lock(self) -> threading.RLock:
        """To be held while the solver is used."""
        return _LOCK

    def and_also(self, *more: Any) -> Facts:
        """These facts and more."""
        return Facts((*self.known, *more))

    def holds(self, fact: Any) -> bool:
        """Whether ``fact`` follows, for every size."""
        if isinstance(fact, bool):
            return fact
        if fact is sympy.true or fact is sympy.false:
            return fact is sympy.true
        if fact not in self._cache:
            self._cache[fact] = _quickly(fact) or self._solved(fact)
        return self._cache[fact]

    def equal(self, one: Any, other: Any) -> bool:
        """Whether two sizes are the same number."""
        if one is other or one == other:
            return True
        if isinstance(one, int) and isinstance(other, int):
            return False
        difference = sympy.expand(sympy.sympify(one) - sympy.sympify(other))
        if difference.is_Integer:
            return bool(difference == 0)
        return self.holds(sympy.Eq(one, other))

    def at_most(self, one: Any, other: Any) -> bool:
        """Whether ``one <= other``."""
        if isinstance(one, int) and isinstance(other, int):
            return one <= other
        return self.holds(sympy.Le(one, other))

    def is_consistent(self) -> bool:
        """Whether any sizes satisfy the facts."""
        return not self._solved(sympy.false)

    def witness(self, *wanted: Any, hints: Mapping[str, int]) -> dict[str, int] | None:
        """Sizes at which the facts and ``wanted`` hold, near the hints; None if none are found."""
        import z3

        with _LOCK:
            solver = z3.Optimize()
            solver.set("timeout", _TIMEOUT_MS)
            facts = [sympy.sympify(fact) for fact in (*self.known, *wanted)]
            names = {str(symbol) for symbol in symbols_of(facts)} | set(hints)
            try:
                solver.add(*[translate(fact) for fact in facts])
            except NotImplementedError:
                return None
            sizes = {name: z3.Int(name) for name in sorted(names)}
            for name, size in sizes.items():
                solver.add(size >= 0)
                hint = hints.get(name, 5)
                solver.minimize(z3.If(size >= hint, size - hint, hint - size))
            if solver.check() != z3.sat:
                return None
            model = solver.model()
            return {
                name: model.eval(size, model_completion=True).as_long()
                for name, size in sizes.items()
            }

    def simplified(self, expr: Any) -> Any:
        """``expr`` with every maximum, minimum and quotient resolved that the facts decide."""
        if not isinstance(expr, sympy.Basic) or expr.is_Atom:
            return expression(expr)
        if expr not in self._simple:
            self._simple[expr] = self._simplified(expr)
        return self._simple[expr]

    def _simplified(self, expr: sympy.Basic) -> Any:
        if not expr.has(Max, Min, sympy.Max, sympy.Min, FloorDiv, CleanDiv, Mod):
            return expression(sympy.expand(expr))
        parts = [sympy.sympify(self.simplified(part)) for part in expr.args]
        if isinstance(expr, (Max, sympy.Max, Min, sympy.Min)):
            parts = self._extremes(parts, isinstance(expr, (Max, sympy.Max)))
            if len(parts) == 1:
                return expression(parts[0])
        whole = sympy.expand(expr.func(*parts))
        if isinstance(whole, FloorDiv):
            small = (sympy.Integer(number) for number in (0, 1))
            whole = next((n for n in small if self.holds(sympy.Eq(whole, n))), whole)
        return expression(whole)

    def _extremes(self, parts: list[Any], is_maximum: bool) -> list[Any]:
        kept = list(parts)
        for part in parts:
            others = [other for other in kept if other is not part]
            for other in others:
                small, large = (part, other) if is_maximum else (other, part)
                if part in kept and len(kept) > 1 and self.at_most(small, large):
                    kept.remove(part)
                    break
        return kept

    def _solved(self, fact: Any) -> bool:
        import z3

        with _LOCK:
            solver = z3.Solver()
            solver.set("timeout", _TIMEOUT_MS)
            try:
                for known in self.known:
                    solver.add(translate(sympy.sympify(known)))
                goal = translate(sympy.sympify(fact))
            except NotImplementedError:
                return False
            for symbol in symbols_of((*self.known, sympy.sympify(fact))):
                solver.add(translate(symbol) >= 0)
            solver.add(z3.Not(goal))
            return bool(solver.check() == z3.unsat)


def _quickly(fact: Any) -> bool:
    """What sympy's own assumptions show."""
    if isinstance(fact, sympy.core.relational.Relational):
        difference = sympy.expand(fact.lhs - fact.rhs)
        if isinstance(fact, sympy.Eq):
            return bool(difference.is_zero)
        if isinstance(fact, sympy.Ge):
            return bool(difference.is_nonnegative)
        if isinstance(fact, sympy.Le):
            return bool(difference.is_nonpositive)
        if isinstance(fact, sympy.Gt):
            return bool(difference.is_positive)
        if isinstance(fact, sympy.Lt):
            return bool(difference.is_negative)
    return False


def translate(expr: Any) -> Any:
    """A sympy expression of integers as a z3 expression.

    Raises:
        NotImplementedError: an operation that the solver is not asked about.
    """
    import z3

    if expr is sympy.true or expr is sympy.false:
        return z3.BoolVal(expr is sympy.true)
    if expr.is_Integer:
        return z3.IntVal(int(expr))
    if isinstance(expr, sympy.Symbol):
        return z3.Int(expr.name)
    parts = [translate(part) for part in expr.args]
    combine = next((rule for cls, rule in _rules() if isinstance(expr, cls)), None)
    if combine is None:
        raise NotImplementedError(type(expr).__name__)
    return combine(z3, expr, parts)


def _extremum(is_maximum: bool) -> Any:
    def combine(z3: Any, expr: Any, parts: list[Any]) -> Any:
        best = parts[0]
        for part in parts[1:]:
            best = (
                z3.If(best >= part, best, part) if is_maximum else z3.If(best <= part, best, part)
            )
        return best

    return combine


def _power(z3: Any, expr: Any, parts: list[Any]) -> Any:
    if not (expr.exp.is_Integer and 0 < expr.exp < 5):
        raise NotImplementedError("power")
    total = parts[0]
    for _ in range(int(expr.exp) - 1):
        total = total * parts[0]
    return total


def _quotient(z3: Any, expr: Any, parts: list[Any]) -> Any:
    if not (expr.args[1].is_Integer and expr.args[1] > 0):
        raise NotImplementedError("division by a size")
    return parts[0] / parts[1] if isinstance(expr, (FloorDiv, CleanDiv)) else parts[0] % parts[1]


def _product(z3: Any, expr: Any, parts: list[Any]) -> Any:
    total = parts[0]
    for part in parts[1:]:
        total = total * part
    return total


def _rules() -> tuple[tuple[Any, Any], ...]:
    return (
        (sympy.Add, lambda z3, expr, parts: z3.Sum(parts)),
        (sympy.Mul, _product),
        (sympy.Pow, _power),
        ((Max, sympy.Max), _extremum(True)),
        ((Min, sympy.Min), _extremum(False)),
        ((FloorDiv, CleanDiv, Mod, PythonMod), _quotient),
        (sympy.Eq, lambda z3, expr, parts: parts[0] == parts[1]),
        (sympy.Ne, lambda z3, expr, parts: parts[0] != parts[1]),
        (sympy.Le, lambda z3, expr, parts: parts[0] <= parts[1]),
        (sympy.Lt, lambda z3, expr, parts: parts[0] < parts[1]),
        (sympy.Ge, lambda z3, expr, parts: parts[0] >= parts[1]),
        (sympy.Gt, lambda z3, expr, parts: parts[0] > parts[1]),
        (sympy.And, lambda z3, expr, parts: z3.And(*parts)),
        (sympy.Or, lambda z3, expr, parts: z3.Or(*parts)),
        (sympy.Not, lambda z3, expr, parts: z3.Not(parts[0])),
    )
