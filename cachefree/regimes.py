"""Which sizes a graph was shown to serve.

Every choice that the model's code makes by sizes is captured on both sides.

A captured path is right where the questions that its code asked have the answers that they had.
Sizes at which another answer is due are captured too, and compared. What is left is outside the
domain, and a call there raises.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch

from cachefree.align import Comparison, compare
from cachefree.calls import Call, SizeSpec, TensorSpec
from cachefree.capture import capture
from cachefree.errors import CacheFreeError, Refusal
from cachefree.facts import Facts
from cachefree.fake_runs import run_on_fakes
from cachefree.laws import ONES_LAWS, Law
from cachefree.loops import TooFewRoundsError, few_rounds_written_out
from cachefree.reading import Program, read
from cachefree.shapes import Signatures
from cachefree.sizes import Question, compiled, size_symbol, substitute, symbols_of
from cachefree.spec import Condition, Region
from cachefree.terms import Table, Term
from cachefree.value_questions import ANSWERS

__all__ = ["Exclusion", "Kind", "Regime", "Survey", "captured_at", "conditions_of", "survey"]

log = logging.getLogger(__name__)
_MOST_CAPTURES = 12
_MOST_COMBINED = 5


@dataclass
class Regime:
    """A region with the path that the model takes there.

    Attributes:
        region: The sizes.
        pinned: Sizes that are fixed there.
        program: The model's own path.
        comparison: How the one graph compares to it there.
    """

    region: Region
    pinned: dict[sympy.Symbol, int]
    program: Program
    comparison: Comparison


@dataclass(frozen=True)
class Exclusion:
    """Sizes that the one graph does not serve, and why."""

    conditions: tuple[Condition, ...]
    refusal: Refusal


@dataclass
class Survey:
    """What was found of one call: the regimes that the one graph serves, and the other sizes."""

    served: list[Regime] = field(default_factory=list)
    unequal: list[Regime] = field(default_factory=list)
    excluded: list[Exclusion] = field(default_factory=list)
    captures: int = 0


@dataclass(frozen=True)
class Kind:
    """First call or later calls.

    Attributes:
        name: ``"first call"`` or ``"later calls"``.
        call: The call, in symbols.
        zero: Symbols of the one graph that are 0 here: the past's lengths on a first call.
        inputs: Inputs of the one graph that are replaced here: the neutral cache.
        ties: Symbols of the one graph that are sizes of the call here.
        uniform: Inputs of the call whose elements are all one number here, as such tensors.
        within: What holds of the calls that are looked at.
    """

    name: str
    call: Call
    zero: tuple[sympy.Symbol, ...] = ()
    inputs: Mapping[str, Term] = field(default_factory=dict)
    ties: Mapping[sympy.Symbol, Any] = field(default_factory=dict)
    uniform: Mapping[str, Term] = field(default_factory=dict)
    within: tuple[Any, ...] = ()

    def values(self, pinned: Mapping[sympy.Symbol, int]) -> dict[sympy.Symbol, Any]:
        """What the one graph's sizes are here."""
        tied = {symbol: substitute(size, pinned) for symbol, size in self.ties.items()}
        return {**dict.fromkeys(self.zero, 0), **tied, **pinned}

    def values_where(
        self, pinned: Mapping[sympy.Symbol, int], conditions: Iterable[Condition]
    ) -> dict[sympy.Symbol, Any]:
        """The same where some conditions hold: of two sizes that are one, one is written."""
        values = self.values(pinned)
        for condition in conditions:
            fact = condition.fact
            if not isinstance(fact, sympy.Eq) or not (fact.lhs.is_Symbol and fact.rhs.is_Symbol):
                continue
            one, other = (values.get(symbol, symbol) for symbol in fact.args)
            if isinstance(one, sympy.Symbol) and isinstance(other, sympy.Symbol) and one != other:
                values = {symbol: substitute(size, {other: one}) for symbol, size in values.items()}
                values[other] = one
        return values

    @property
    def symbols(self) -> tuple[sympy.Symbol, ...]:
        """The size symbols of the call."""
        sizes = [
            size
            for leaf in self.call.leaves
            for size in (leaf.shape if isinstance(leaf, TensorSpec) else (leaf.expr,))
        ]
        return tuple(sorted(symbols_of(sizes), key=str))

    @property
    def basics(self) -> tuple[Any, ...]:
        """What holds of every such call: no size is 0."""
        return (*(sympy.Ge(symbol, 1) for symbol in self.symbols), *self.within)


def conditions_of(program: Program, kind: Kind) -> tuple[Condition, ...]:
    """The facts that a captured path needs and that do not hold of every call.

    Questions of Python code count, whatever they are. A question that an operator asked counts if,
    at sizes where its answer is another one, some operator of the path does not run or gives
    another size than was written down (`cachefree.shapes`).
    """
    captured, outputs = program.captured, program.outputs
    kept: list[Condition] = []
    facts = Facts(kind.basics)
    for question in captured.questions:
        if not _follows(facts, question.fact):
            kept.append(Condition(question.fact, question.where))
            facts = facts.and_also(question.fact)
    points = _points(kind, captured.operator_questions, captured.sizes, kept)
    signatures = Signatures(outputs)
    for question in sorted(captured.operator_questions, key=lambda q: sympy.count_ops(q.fact)):
        holds = compiled(question.fact)
        others = [point for point in points if not holds(point)]
        if not others and any(_numbers_in(question)):  # false only where several are large
            due = [sympy.Not(question.fact), *(condition.fact for condition in kept)]
            far = Facts(kind.basics).witness(*due, hints=captured.sizes)
            others = [] if far is None else [{**captured.sizes, **far}]
        if others and not all(signatures.hold(point) for point in _tried(others, signatures)):
            kept.append(Condition(question.fact, question.where))
            points = [point for point in points if holds(point)]
    return tuple(kept)


_MOST_TRIED = 2


def _tried(points: Sequence[dict[str, int]], signatures: Signatures) -> list[dict[str, int]]:
    """A few of the points, those first for which the answer is known."""
    return sorted(points, key=lambda point: not signatures.is_known(point))[:_MOST_TRIED]


def _points(
    kind: Kind,
    questions: Sequence[Question],
    hints: Mapping[str, int],
    conditions: Sequence[Condition],
) -> list[dict[str, int]]:
    """Sizes to try: small ones in every combination, and those near numbers in questions.

    Of many symbols, those of any few that follow one another are combined.
    """
    names = [str(symbol) for symbol in kind.symbols]
    base = {name: hints.get(name, 5) for name in names}
    base |= {
        str(condition.fact.lhs): int(condition.fact.rhs)
        for condition in conditions
        if isinstance(condition.fact, sympy.Eq)
        and condition.fact.lhs.is_Symbol
        and condition.fact.rhs.is_Integer
    }
    few = [names[at : at + _MOST_COMBINED] for at in range(max(1, len(names) - _MOST_COMBINED + 1))]
    points = [
        {**base, **dict(zip(some, values, strict=True))}
        for some in few
        for values in itertools.product((1, 2, 3), repeat=len(some))
    ]
    numbers = {number for question in questions for number in _numbers_in(question)}
    for name in names:
        values = {2, 7, *(abs(number) + delta for number in numbers for delta in (-1, 0, 1))}
        points += [{**base, name: value} for value in sorted(values)]
    points.append({**base, **{name: 4 * size for name, size in base.items()}})
    checks = [compiled(condition.fact) for condition in conditions]
    return [point for point in points if all(check(point) for check in checks)]


def _numbers_in(question: Question) -> Iterator[int]:
    """The numbers that a question names, but for small ones and those that stand for no end."""
    return (n for n in map(int, question.fact.atoms(sympy.Integer)) if 3 < abs(n) < 10**6)


def _follows(facts: Facts, fact: Any) -> bool:
    if isinstance(fact, sympy.core.relational.Relational):
        difference = facts.simplified(sympy.expand(fact.lhs - fact.rhs))
        fact = fact.func(difference, 0)
        if fact is sympy.true or fact is True:
            return True
    return facts.holds(fact)


def survey(
    model: torch.nn.Module,
    table: Table,
    names: dict[int, str],
    one: Sequence[Term],
    kind: Kind,
    base: Program,
    hints: Mapping[str, int],
    known: Sequence[tuple[Program, dict[sympy.Symbol, int], tuple[Condition, ...]]] = (),
    results: Callable[[Program], Sequence[Term]] | None = None,
    more: Sequence[Law] = (),
    unfit: Callable[[Program, Facts, dict[sympy.Symbol, Any]], Refusal | None] | None = None,
) -> Survey:
    """Finds the sizes at which the one graph equals the model's own path.

    Args:
        model: The model.
        table: Of all terms.
        names: ``id`` of a parameter or buffer → its name.
        one: The outputs of the one graph.
        kind: Which call.
        base: The path that was captured first.
        hints: Example sizes.
        known: Regimes that were captured before, so that they need not be again.
        results: What of a path the one graph is compared with; None for all that it returns.
        more: Laws to be tried too, after the others.
        unfit: Why a path is none that the one graph can serve, whatever its tensors are.
    """
    result = Survey()
    paths = list(known) or [(base, {}, conditions_of(base, kind))]
    covered: list[tuple[Condition, ...]] = []

    def judge(
        program: Program, pinned: dict[sympy.Symbol, int], conditions: tuple[Condition, ...]
    ) -> None:
        covered.append(conditions)
        facts = Facts((*kind.basics, *(condition.fact for condition in conditions)))
        values = kind.values_where(pinned, conditions)
        refusal = None if unfit is None else unfit(program, facts, values)
        if refusal is not None:
            result.excluded.append(Exclusion(conditions, refusal))
            return
        own = program.outputs if results is None else results(program)
        comparison = compare(table, one, own, facts, values, kind.inputs, more, kind.uniform)
        if 1 in pinned.values() and _differs_by_ones(comparison):
            laws = (*more, *ONES_LAWS)
            again = compare(table, one, own, facts, values, kind.inputs, laws, kind.uniform)
            comparison = again if again.is_equal else comparison
        regime = Regime(Region(kind.name, conditions), pinned, program, comparison)
        (result.served if comparison.is_equal else result.unequal).append(regime)

    for path in paths:
        judge(*path)
    while result.captures < _MOST_CAPTURES:
        found = _uncovered(kind, covered, hints)
        if found is None:
            break
        sizes, pinned = found
        result.captures += 1
        pins = tuple(Condition(sympy.Eq(symbol, value)) for symbol, value in pinned.items())
        try:
            program = captured_at(model, table, names, kind, sizes, pinned)
        except CacheFreeError as error:
            conditions = pins or tuple(
                Condition(sympy.Eq(size_symbol(name), value)) for name, value in sizes.items()
            )
            conditions = _outside(kind, covered, conditions, pins)
            covered.append(conditions)
            result.excluded.append(Exclusion(conditions, error.refusals[0]))
            continue
        judge(program, pinned, (*pins, *_unpinned(conditions_of(program, kind), pinned)))
    return result


def _differs_by_ones(comparison: Comparison) -> bool:
    """Whether two sides that differ have one shape but for dimensions of size 1."""
    pairs = [(pair.one.shape, pair.other.shape) for pair in comparison.divergences]
    bare = [[[size for size in shape or () if size != 1] for shape in pair] for pair in pairs]
    return any(
        pair[0] != pair[1] and sizes[0] == sizes[1] for pair, sizes in zip(pairs, bare, strict=True)
    )


def _unpinned(
    conditions: tuple[Condition, ...], pinned: Mapping[sympy.Symbol, int]
) -> Iterator[Condition]:
    for condition in conditions:
        fact = condition.fact.subs(pinned)
        if fact is not sympy.true:
            yield Condition(fact, condition.where)


def _outside(
    kind: Kind,
    covered: list[tuple[Condition, ...]],
    exact: tuple[Condition, ...],
    pins: tuple[Condition, ...],
) -> tuple[Condition, ...]:
    """All sizes that break one condition of the first regime.

    Where one such size does not run, none is served.
    """
    if pins or not covered or not covered[0]:
        return exact
    broken = next(
        (
            condition
            for condition in covered[0]
            if condition.fact.subs({c.fact.lhs: c.fact.rhs for c in exact}) == sympy.false
        ),
        None,
    )
    return (Condition(sympy.Not(broken.fact), broken.where),) if broken is not None else exact


def _uncovered(
    kind: Kind, covered: Sequence[tuple[Condition, ...]], hints: Mapping[str, int]
) -> tuple[dict[str, int], dict[sympy.Symbol, int]] | None:
    """Sizes in no regime yet, with as few of them below 2 as can be."""
    left = [sympy.Or(*[sympy.Not(c.fact) for c in conditions]) for conditions in covered]
    if any(fact is sympy.false for fact in left):
        return None
    facts = Facts((*kind.basics, *left))
    own = {str(symbol): hints.get(str(symbol), 5) for symbol in kind.symbols}
    for count in range(len(kind.symbols) + 1):
        for small in itertools.combinations(kind.symbols, count):
            others = [sympy.Ge(symbol, 2) for symbol in kind.symbols if symbol not in small]
            ones = [sympy.Le(symbol, 1) for symbol in small]
            sizes = facts.witness(*others, *ones, hints=own)
            if sizes is not None:
                return sizes, {symbol: sizes[str(symbol)] for symbol in small}
    return None


def captured_at(
    model: torch.nn.Module,
    table: Table,
    names: dict[int, str],
    kind: Kind,
    sizes: Mapping[str, int],
    pinned: Mapping[sympy.Symbol, int],
) -> Program:
    """The path that a call takes at some sizes.

    Args:
        model: The model.
        table: Of all terms.
        names: ``id`` of a parameter or buffer → its name.
        kind: Which call.
        sizes: The size of each symbol.
        pinned: Those that are plain numbers while it is captured.

    Raises:
        CaptureError: the model does not run there, or cannot be captured.
    """
    leaves = tuple(
        replace(leaf, shape=tuple(substitute(size, pinned) for size in leaf.shape))
        if isinstance(leaf, TensorSpec)
        else SizeSpec(leaf.path, substitute(leaf.expr, pinned))
        for leaf in kind.call.leaves
    )
    call = replace(kind.call, leaves=leaves)
    hints = {name: size for name, size in sizes.items() if size_symbol(name) not in pinned}
    with ANSWERS.of(frozenset(kind.uniform)):
        try:
            run_on_fakes(model, call, hints)
        except Exception as error:
            from cachefree.explaining import explained

            raise explained(error, "The model itself does not run at these sizes.") from error
        try:
            captured = capture(model, call, hints)
        except TooFewRoundsError:
            with few_rounds_written_out():
                captured = capture(model, call, hints)
        return read(captured, table, names)
