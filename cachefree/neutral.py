"""The value that a cache tensor of fixed size has before the first call.

It is not chosen: it is what the first path starts from. The first path is compared with the later
one while these tensors are unknown; where the one has such a tensor and the other has a constant, a
parameter or a buffer, that is its value. It is then put in, and the comparison is the proof.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy

from cachefree.align import Comparison, Divergence, compare
from cachefree.errors import Refusal
from cachefree.facts import Facts
from cachefree.sizes import symbols_of
from cachefree.terms import Table, Term, replace_operands, topological

__all__ = ["FirstValues", "find_neutrals", "neutral_words"]

_MOST_ROUNDS = 6
_MOST_GUESSES = 12
_VIEWS = ("reshape", "permute", "slice", "cast")


@dataclass(frozen=True)
class FirstValues:
    """What cache tensors of fixed size start from.

    Attributes:
        terms: The values, by the paths of their inputs.
        refusals: Why there is none for a tensor, to be told if the two paths then differ.
        computed: The values that are computed from the inputs.
    """

    terms: Mapping[str, Term]
    refusals: tuple[Refusal, ...] = ()
    computed: Mapping[str, Term] = field(default_factory=dict)


def find_neutrals(
    table: Table,
    one: Sequence[Term],
    other: Sequence[Term],
    unknown: Sequence[Term],
    facts: Facts,
    sizes: Mapping[sympy.Symbol, Any],
    known: Mapping[str, Term],
) -> FirstValues:
    """The neutral values of cache tensors of fixed size.

    Args:
        table: Of all terms.
        one: The outputs of the later path.
        other: The outputs of the first path.
        unknown: The inputs of the later path that the values are sought of.
        facts: What holds of the sizes on the first path.
        sizes: Sizes to substitute: nothing is past.
        known: Other inputs of the later path with what stands in their place.
    """
    given = functools.partial(_compared, table, one, other, facts, sizes, known)
    names = {str(term.args[0]): term for term in unknown}
    found: dict[str, Term] = {}
    refusals: dict[str, Refusal] = {}
    computed: dict[str, Term] = {}
    for _ in range(_MOST_ROUNDS if unknown else 0):
        comparison = given(found)
        solver = _Solver(table, names, facts)
        solved = solver.run(comparison.divergences)
        refusals.update(solver.refusals)
        computed.update(solver.computed)
        new = {path: term for path, term in solved.items() if path not in found}
        if not new:
            break
        found.update(new)
    guessed = {path: _filled(table, term, 0) for path, term in names.items() if path not in found}
    if not guessed:
        return FirstValues(found, tuple(refusals.values()), computed)
    found = {**found, **guessed}
    values = _better_guesses(table, other, given, found, list(guessed))
    return FirstValues(values, tuple(refusals.values()), computed)


def _compared(
    table: Table,
    one: Sequence[Term],
    other: Sequence[Term],
    facts: Facts,
    sizes: Mapping[sympy.Symbol, Any],
    known: Mapping[str, Term],
    values: Mapping[str, Term],
) -> Comparison:
    return compare(table, one, other, facts, sizes, {**known, **values})


def _filled(table: Table, like: Term, number: float) -> Term:
    value: Any = number
    if like.dtype is not None and like.dtype.is_floating_point:
        value = float(number)
    elif str(like.dtype) == "torch.bool":
        value = bool(number)
    return table.like(like, "full", (like.sizes, value, like.dtype, like.device))


def _better_guesses(
    table: Table,
    other: Sequence[Term],
    given: Callable[[Mapping[str, Term]], Comparison],
    found: dict[str, Term],
    guessed: list[str],
) -> dict[str, Term]:
    """Other numbers than 0 where no value was found and they bring the paths closer.

    A guess is as good as a find: what is put in is proved.
    """
    comparison = given(found)
    numbers = [-float("inf"), 1.0, *_numbers(other)]  # of a maximum, of a product
    tried = 0
    for path, number in itertools.product(guessed, numbers):
        like = found[path]
        if comparison.is_equal or tried == _MOST_GUESSES:
            break
        if like.dtype is None or not like.dtype.is_floating_point:
            continue
        tried += 1
        attempt = {**found, path: _filled(table, like, number)}
        again = given(attempt)
        if _distance(again) < _distance(comparison):
            found, comparison = attempt, again
    return found


def _distance(comparison: Comparison) -> int:
    return len(comparison.divergences)


def _numbers(outputs: Sequence[Term]) -> list[float]:
    """The large numbers that the first path fills tensors with."""
    found: dict[float, None] = {}
    for term in topological(outputs):
        for arg in term.args if isinstance(term.op, str) or "full" in term.name else ():
            if isinstance(arg, float) and abs(arg) > 1e3:
                found[arg] = None
    return list(found)


@dataclass
class _Solver:
    """Equations ``view(unknown) = value``, solved for the unknowns.

    A value that is known of every slice along one axis is the join of them.
    """

    table: Table
    unknown: Mapping[str, Term]
    facts: Facts
    found: dict[str, Term] = field(default_factory=dict)
    parts: dict[tuple[Term, int], list[tuple[Any, Any, Term]]] = field(default_factory=dict)
    refusals: dict[str, Refusal] = field(default_factory=dict)
    computed: dict[str, Term] = field(default_factory=dict)

    def run(self, divergences: Sequence[Divergence]) -> dict[str, Term]:
        for divergence in divergences:
            self._unify(divergence.one, divergence.other)
        while self.parts:
            (whole, dim) = max(self.parts, key=lambda key: _depth(key[0]))
            slices = self.parts.pop((whole, dim))
            value = self._joined(whole, dim, slices)
            if value is not None:
                self._unify(whole, value)
        return self.found

    def _unify(self, one: Term, value: Term) -> None:
        if one.shape is None or value.shape is None:
            return
        if len(one.sizes) != len(value.sizes) or one.dtype != value.dtype:
            return
        if not all(map(self.facts.equal, one.sizes, value.sizes)):
            return
        if one.op == "cat":
            self._unify_parts(one, value)
        if not self._is_known(one):
            return
        if one.op == "input":
            self._solve(one, value)
            return
        source = one.args[0]
        if one.op == "reshape":
            self._unify(source, self._like(source, "reshape", (value, source.sizes)))
        elif one.op == "permute":
            inverse = tuple(one.args[1].index(dim) for dim in range(len(one.args[1])))
            self._unify(source, self._like(source, "permute", (value, inverse)))
        elif one.op == "slice":
            _, dim, start, end, _ = one.args
            self.parts.setdefault((source, dim), []).append((start, end, value))

    def _unify_parts(self, one: Term, value: Term) -> None:
        """Each part of a join is the part of the value that lies where it does."""
        parts, dim = one.args
        at: Any = 0
        for part in parts:
            end = sympy.expand(at + part.sizes[dim])
            if self._is_known(part):
                self._unify(part, self._like(part, "slice", (value, dim, at, end, 1)))
            at = end

    def _solve(self, one: Term, value: Term) -> None:
        path = str(one.args[0])
        if not self._is_constant(one, value):
            self.computed.setdefault(path, value)
            self.refusals[path] = Refusal(
                f"The cache {path} starts from a value that is computed from the inputs.",
                why=f"The first call takes {value.text(3)} for it, so that no constant, parameter "
                "or buffer can be passed in its place.",
                remedy="Compute the first value outside and pass it as the cache; or start from a "
                "constant, with torch.where on a flag tensor that says that the call is the first.",
                where=value.line or one.line,
            )
            return
        before = self.found.setdefault(path, value)
        if before is not value:
            self.refusals[path] = Refusal(
                f"The cache {path} has no neutral value: it would have to be two at once.",
                why=f"The first call takes {before.text(3)} for it in one place and "
                f"{value.text(3)} in another.",
                remedy="Start both from the same value, or keep two tensors in the cache.",
                where=value.line or before.line,
            )

    def _is_known(self, term: Term) -> bool:
        """Whether a term is a view of an unknown."""
        while term.op in ("reshape", "permute", "slice"):
            term = term.args[0]
        return term.op == "input" and term.args[0] in self.unknown

    def _like(self, like: Term, op: str, args: tuple[Any, ...]) -> Term:
        if op == "reshape" and args[0].op == "full":
            return self.table.like(like, "full", (like.sizes, *args[0].args[1:]))
        return self.table.like(like, op, args)

    def _is_constant(self, one: Term, value: Term) -> bool:
        """Whether a value is known before the call: from parameters and the own sizes."""
        own = symbols_of(one.sizes)
        return all(
            term.op not in ("input", "bound") and symbols_of(_sizes_in(term)) <= own
            for term in topological([value])
        )

    def _joined(self, whole: Term, dim: int, slices: list[tuple[Any, Any, Term]]) -> Term | None:
        """The value of a tensor whose slices are known; where a part is open, a guess."""
        kept: list[Term] = []
        at: Any = 0
        has_gap = False
        for start, end, value in sorted(
            slices, key=lambda part: (str(type(part[0])), str(part[0]).zfill(9))
        ):
            if self.facts.holds(sympy.Gt(start, at)):
                kept.append(self._open(whole, dim, start - at, value, 0))
                at, has_gap = start, True
            if self.facts.equal(start, at):
                kept.append(value)
                at = end
        size = whole.sizes[dim]
        if not self.facts.equal(at, size):
            if not self.facts.holds(sympy.Gt(size, at)):
                return None
            last = kept[-1] if kept else slices[0][2]
            kept.append(self._open(whole, dim, size - at, last, last.sizes[dim] - 1))
            has_gap = True
        if len(kept) == 1:
            return kept[0]
        known = [value for _, _, value in slices] if has_gap else kept
        return self._uniform(whole, known) or self._like(whole, "cat", (tuple(kept), dim))

    def _open(self, whole: Term, dim: int, rows: Any, known: Term, at: Any) -> Term:
        """What stands for rows that no comparison tells: the nearest known row; it is a guess."""
        one, several = ((*whole.sizes[:dim], count, *whole.sizes[dim + 1 :]) for count in (1, rows))
        row = self.table.like(known, "slice", (known, dim, at, at + 1, 1), one)
        return self.table.like(known, "expand", (row, several), several)

    def _uniform(self, whole: Term, values: list[Term]) -> Term | None:
        """One number everywhere, where all known parts have it."""
        if all(value.op == "full" for value in values):
            numbers = {repr(value.args[1:]) for value in values}
            if len(numbers) == 1:
                return self.table.like(whole, "full", (whole.sizes, *values[0].args[1:]))
        return None


def _depth(term: Term) -> int:
    depth = 0
    while term.op in _VIEWS:
        term, depth = term.args[0], depth + 1
    return depth


def _sizes_in(term: Term) -> Iterator[Any]:
    found: list[Any] = list(term.shape or ())

    def keep(arg: Any) -> Any:
        if isinstance(arg, sympy.Basic):
            found.append(arg)
        return arg

    replace_operands(term.args, keep)
    return iter(found)


def neutral_words(term: Term) -> str:
    """The value in words."""
    if term.op == "full":
        number = term.args[1]
        return "zeros" if number == 0 else f"{number} everywhere"
    source = term
    while source.op in ("expand", "reshape", "permute", "cast"):
        source = source.args[0]
    if source.op == "attribute":
        return f"{source.args[0]}, expanded over the batch"
    names = [below.args[0] for below in topological([term]) if below.op == "attribute"]
    return f"computed from {', '.join(names)}" if names else f"the constant {term.text(2)}"
