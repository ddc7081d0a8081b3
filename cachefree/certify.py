"""The proof that one graph is both of a model's paths, and the sizes at which it is."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from cachefree.align import Comparison, Divergence
from cachefree.beside import with_ways_beside
from cachefree.capture import Captured
from cachefree.common_sizes import with_common_size
from cachefree.discover import Discovery
from cachefree.domains import merged
from cachefree.errors import Refusal, SourceLine, UnsupportedBranchError
from cachefree.facts import Facts
from cachefree.laws import Law
from cachefree.neutral import FirstValues, neutral_words
from cachefree.preconditions import next_values
from cachefree.reading import Program
from cachefree.regimes import Exclusion, Kind, Regime, Survey, conditions_of, survey
from cachefree.report import Verdict
from cachefree.results import refusal_of_result
from cachefree.rules import RULES, Closing, replaced, sites
from cachefree.shapes import Signatures
from cachefree.sizes import size_symbol, symbols_of
from cachefree.spec import FIRST_CALL, LATER_CALLS, Condition, Domain, Region
from cachefree.starts import past_symbols
from cachefree.terms import Table, Term, topological
from cachefree.tested import Tested, accept_unproved, call_sizes
from cachefree.uniform_inputs import refuse_further_questions, uniform_kinds, values_asked
from cachefree.value_questions import ValueQuestion
from cachefree.write_once import OneCall

__all__ = ["Certified", "certify", "least", "unfit_result", "verdict_of"]

log = logging.getLogger(__name__)
_MOST_SIZES_TRIED = 4
_MOST_CLOSINGS = 8


@dataclass
class Certified:
    """The one graph with what was shown of it.

    Attributes:
        outputs: The one graph's outputs, as terms.
        verdict: How equality was shown.
        domain: Where it holds.
        laws: The laws that were used.
        closings: The rules that changed the later path, with what they closed.
        excluded: Sizes outside the domain, with the reason.
        neutrals: The neutral values of cache tensors of fixed size, by path.
        shown: For the first call and for later calls: the call, and the regimes that are served.
        missed: Regimes in which the model runs and the graph computes otherwise.
        values: What the code asks about values; the graph is right whatever the answers are.
        relied_on: Names of buffers whose values random tests relied on.
    """

    outputs: tuple[Term, ...]
    verdict: Verdict
    domain: Domain
    laws: tuple[Law, ...]
    closings: tuple[Closing, ...] = ()
    excluded: tuple[Exclusion, ...] = ()
    neutrals: Mapping[str, Term] = field(default_factory=dict)
    shown: tuple[tuple[Kind, tuple[Regime, ...]], ...] = ()
    missed: tuple[Regime, ...] = ()
    values: tuple[ValueQuestion, ...] = ()
    relied_on: tuple[str, ...] = ()

    def neutral_words(self, path: str) -> str:
        """The neutral element of a cache tensor of fixed size, in words."""
        return neutral_words(self.neutrals[path]) if path in self.neutrals else "zeros"


def certify(
    model: torch.nn.Module,
    table: Table,
    names: dict[int, str],
    discovery: Discovery,
    first: Program,
    later: Program,
    one: OneCall,
    starts: FirstValues,
    check: str,
    pinned: Mapping[sympy.Symbol, int] | None = None,
    general: Program | None = None,
) -> Certified:
    """Finds one graph that is both paths, and shows that it is.

    The later path stands for the sizes in ``pinned`` alone, where there are such. The one graph's
    result is put together as that of ``general`` is; None: as the later path's.

    Raises:
        UnsupportedBranchError: the paths differ in a way that no rule closes; all refusals are
            listed.
    """
    past = past_symbols(discovery, one)
    kinds: tuple[Kind, ...] = (
        Kind(FIRST_CALL, discovery.first, past, {**one.replaced, **starts.terms}, one.present),
        Kind(
            LATER_CALLS,
            discovery.later,
            inputs={} if one.absent else one.replaced,
            ties={**one.ties, **one.absent},
        ),
    )
    outputs = one.outputs
    closings: list[Closing] = []
    given = (general or later).captured
    programs: tuple[Program, ...] = (first, later)
    surveys = _surveys(
        model, table, names, outputs, kinds, programs, discovery, given, pinned=pinned or {}
    )
    further = uniform_kinds(model, table, names, kinds, surveys, discovery, pinned)
    if further:
        their_kinds, their_programs = zip(*further, strict=True)
        surveys += _surveys(
            model, table, names, outputs, their_kinds, their_programs, discovery, given
        )
        kinds, programs = (*kinds, *their_kinds), (*programs, *their_programs)
    while len(closings) < _MOST_CLOSINGS and any(found.unequal for found in surveys):
        improved = None
        for closing in _closings(table, outputs, one.inputs, surveys, kinds, past):
            again = _surveys(
                model,
                table,
                names,
                closing.outputs,
                kinds,
                programs,
                discovery,
                given,
                surveys,
            )
            if _is_better(again, surveys):
                improved = closing, again
                break
        if improved is None:
            break
        closings.append(improved[0])
        outputs, surveys = improved[0].outputs, improved[1]
    tested = Tested()
    if check != "prove":
        tested = accept_unproved(model, outputs, one, surveys, kinds, discovery, check)
    refuse_further_questions(surveys, kinds)
    _refuse_unserved(surveys, kinds, starts.refusals)
    _refuse_broken(outputs, surveys, kinds, past)
    served = [regime for found in surveys for regime in found.served]
    laws = tuple(dict.fromkeys(law for regime in served for law in regime.comparison.laws))
    return Certified(
        outputs,
        _verdict(served, laws, check, tested.count),
        Domain(_regions(surveys, kinds, _told_by_cache(discovery, one)), _fixed(discovery)),
        laws,
        (*one.closings, *closings),
        tuple(exclusion for found in surveys for exclusion in found.excluded),
        starts.terms,
        tuple(
            (kind, tuple(found.served)) for kind, found in zip(kinds[:2], surveys[:2], strict=True)
        ),
        tuple(regime for found in surveys[:2] for regime in found.unequal if not regime.pinned),
        values_asked(surveys),
        tuple(tested.kept),
    )


def _closings(
    table: Table,
    outputs: tuple[Term, ...],
    inputs: tuple[Term, ...],
    surveys: tuple[Survey, ...],
    kinds: tuple[Kind, ...],
    past: tuple[sympy.Symbol, ...],
) -> Iterator[Closing]:
    """Edits to try: a rule's, then sizes in two cases."""
    closing = _closed(table, outputs, inputs, surveys, past)
    if closing is not None:
        yield closing
    yield from itertools.islice(with_common_size(table, outputs, surveys, kinds), _MOST_SIZES_TRIED)
    yield from with_ways_beside(table, outputs, surveys, kinds, past)


def _closed(
    table: Table,
    outputs: tuple[Term, ...],
    inputs: tuple[Term, ...],
    surveys: tuple[Survey, ...],
    past: tuple[sympy.Symbol, ...],
) -> Closing | None:
    """The later path with every divergence edited that the first matching rule closes.

    An edit may read inputs of the one graph alone: one of the first path may have another shape.
    """
    regimes = [regime for found in surveys for regime in found.unequal]
    known = {*inputs, *_inputs_of(*outputs)}
    for rule in RULES:
        for regime in regimes:
            assert regime.comparison.normaliser is not None
            found = sites(
                table, outputs, regime.comparison.divergences, regime.comparison.normaliser, past
            )
            edits = [(site, rule.edit(site)) for site in found]
            edits = [(s, e) for s, e in edits if e is not None and _inputs_of(e.new) <= known]
            matched = {edit.old: edit.new for _, edit in edits if edit is not None}
            if matched:
                closed = tuple(site.divergence for site, _ in edits)
                return Closing(rule, replaced(table, outputs, matched), closed)
    return None


def _inputs_of(*terms: Term) -> set[Term]:
    return {below for below in topological(terms) if below.op == "input"}


def _is_better(again: tuple[Survey, ...], before: tuple[Survey, ...]) -> bool:
    """Whether an edit lost no regime that was served, and brought something."""
    for new, old in zip(again, before, strict=True):
        served = {regime.region for regime in new.served}
        if any(regime.region not in served for regime in old.served):
            return False
    count = [
        sum(len(regime.comparison.divergences) for found in s for regime in found.unequal)
        for s in (again, before)
    ]
    return count[0] < count[1]


def _surveys(
    model: torch.nn.Module,
    table: Table,
    names: dict[int, str],
    outputs: tuple[Term, ...],
    kinds: tuple[Kind, ...],
    programs: tuple[Program, ...],
    discovery: Discovery,
    given: Captured,
    before: tuple[Survey, ...] = (),
    pinned: Mapping[sympy.Symbol, int] | None = None,
) -> tuple[Survey, ...]:
    found = []
    for place, (kind, program) in enumerate(zip(kinds, programs, strict=True)):
        known = (
            [
                (regime.program, regime.pinned, regime.region.conditions)
                for regime in (*before[place].served, *before[place].unequal)
            ]
            if before
            else _as_pinned(program, kind, pinned)
            if pinned and kind.name == LATER_CALLS
            else []
        )
        unfit = functools.partial(unfit_result, kind.name, given, discovery)
        found.append(
            survey(model, table, names, outputs, kind, program, discovery.hints, known, unfit=unfit)
        )
    return tuple(found)


def unfit_result(
    kind: str,
    given: Captured,
    discovery: Discovery,
    own: Program,
    facts: Facts,
    sizes: Mapping[sympy.Symbol, Any],
) -> Refusal | None:
    """Why no graph with a result like the given one serves a path, whatever its tensors are.

    Args:
        kind: Which call it is.
        given: The path whose result the graph has.
        discovery: How the model is called.
        own: The model's own path.
        facts: What holds of the sizes.
        sizes: Sizes to substitute in both.
    """

    def returned(term: Term) -> list[Term]:
        return next_values(discovery, own, term) if kind == LATER_CALLS else []

    return refusal_of_result(kind, given, own, facts, sizes, discovery.carried, returned)


def _as_pinned(
    program: Program, kind: Kind, pinned: Mapping[sympy.Symbol, int]
) -> list[tuple[Program, dict[sympy.Symbol, int], tuple[Condition, ...]]]:
    """A path that was captured at some numbers, with its region."""
    pins = tuple(Condition(sympy.Eq(symbol, value)) for symbol, value in pinned.items())
    left = (
        Condition(fact, condition.where)
        for condition in conditions_of(program, kind)
        if (fact := condition.fact.subs(pinned)) is not sympy.true
    )
    return [(program, dict(pinned), (*pins, *left))]


_MOST_CORNERS = 8


def _corners(surveys: tuple[Survey, ...], kind: Kind) -> Iterator[dict[str, int]]:
    """Small sizes in every combination, and some beyond the numbers that questions name."""
    symbols = [str(symbol) for symbol in kind.symbols]
    for values in itertools.product((1, 3), repeat=min(len(symbols), 4)):
        yield {**dict.fromkeys(symbols, 3), **dict(zip(symbols, values, strict=False))}
    facts = [
        question.fact
        for found in surveys
        for regime in found.served
        for question in (
            *regime.program.captured.questions,
            *regime.program.captured.operator_questions,
        )
    ]
    named = {int(n) for fact in facts for n in fact.atoms(sympy.Integer) if 2 < int(n) < 100}
    beyond = itertools.product(sorted(named), symbols)
    for number, name in itertools.islice(beyond, _MOST_CORNERS):
        yield {**dict.fromkeys(symbols, 3), name: number + 1}


def _refuse_broken(
    outputs: tuple[Term, ...],
    surveys: tuple[Survey, ...],
    kinds: tuple[Kind, ...],
    past: tuple[sympy.Symbol, ...],
) -> None:
    """Refuses a graph whose operators give other sizes, at a corner, than were written down."""
    signatures = Signatures(outputs)
    for found, kind in zip(surveys, kinds, strict=True):
        for sizes in _corners(surveys, kind):
            if not any(regime.region.holds(sizes) for regime in found.served):
                continue
            whole = call_sizes(kind, sizes)
            broken = signatures.wrong(whole)
            if broken is not None:
                given = ", ".join(f"{name} = {size}" for name, size in sizes.items())
                raise UnsupportedBranchError(
                    Refusal(
                        f"The operator {broken.name} does not give at {given} ({kind.name}) "
                        "the size that it gives elsewhere.",
                        why="Its result has another rank or size there, so that one graph is not "
                        "right at both.",
                        remedy="Name the dimension (squeeze(dim)), or keep it.",
                        where=broken.line,
                    )
                )


def verdict_of(comparison: Comparison) -> Verdict:
    """How two programs were shown to be equal."""
    if comparison.checked:
        return Verdict.CHECKED
    is_exact = all(law.kind == "exact" for law in comparison.laws)
    return Verdict.PROVED_EXACT if is_exact else Verdict.PROVED_REAL


def least(verdicts: Iterable[Verdict]) -> Verdict:
    """The weakest of some verdicts."""
    order = list(Verdict)
    return order[max(map(order.index, verdicts))]


def _verdict(served: list[Regime], laws: tuple[Law, ...], check: str, tested: int) -> Verdict:
    if tested:
        return Verdict.TESTED if check == "test" else Verdict.NOT_CHECKED
    if any(regime.comparison.checked for regime in served):
        return Verdict.CHECKED
    is_exact = all(law.kind == "exact" for law in laws) and not any(
        regime.program.captured.stand_ins for regime in served
    )
    return Verdict.PROVED_EXACT if is_exact else Verdict.PROVED_REAL


def _told_by_cache(discovery: Discovery, one: OneCall) -> set[sympy.Symbol]:
    """The sizes of the cache, by which a call that is given one is known to be the first."""
    caches = (one.inputs[place] for place in discovery.cache_leaves)
    return symbols_of(size for term in caches for size in term.sizes)


def _regions(
    surveys: tuple[Survey, ...], kinds: tuple[Kind, ...], told: set[sympy.Symbol]
) -> tuple[Region, ...]:
    """The served regions, with what their names imply made explicit."""
    regions = []
    for found, kind in zip(surveys, kinds, strict=True):
        if kind.uniform:
            continue
        nothing = [Condition(sympy.Eq(s, 0), is_implied=s in told) for s in kind.zero]
        implied = tuple(Condition(fact, is_implied=True) for fact in kind.basics)
        implied += (*nothing, *(Condition(sympy.Eq(*tie)) for tie in kind.ties.items()))
        facts = (*kind.basics, *(condition.fact for condition in nothing))
        served = merged(_conditions(found, kind, surveys, kinds), facts)
        regions += [Region(kind.name, (*implied, *conditions)) for conditions in served]
    return tuple(regions)


def _conditions(
    found: Survey, kind: Kind, surveys: tuple[Survey, ...], kinds: tuple[Kind, ...]
) -> list[tuple[Condition, ...]]:
    """What holds where a call is served, whatever the values are that its code asks for."""
    parts = [[regime.region.conditions for regime in found.served]]
    parts += [
        [regime.region.conditions for regime in other.served]
        for other, its in zip(surveys, kinds, strict=True)
        if its.uniform and its.name == kind.name
    ]
    together = [
        tuple(dict.fromkeys(itertools.chain(*several))) for several in itertools.product(*parts)
    ]
    return [
        conditions
        for conditions in together
        if len(parts) == 1
        or Facts((*kind.basics, *(condition.fact for condition in conditions))).is_consistent()
    ]


def _fixed(discovery: Discovery) -> tuple[str, ...]:
    """What a call may not change, in words: flags, and inputs that were not given."""
    _, kwargs = discovery.later.structure.rebuild([None] * len(discovery.later.leaves))
    flags = [
        f"{name} is {value!r}"
        for name, value in kwargs.items()
        if isinstance(value, (bool, int, float, str))
    ]
    return (*flags, *(f"{name} is not given" for name in discovery.absent))


def _refuse_unserved(
    surveys: tuple[Survey, ...], kinds: tuple[Kind, ...], known: tuple[Refusal, ...]
) -> None:
    """Refuses a graph that serves no ordinary first call, or no later call of one token."""
    query = size_symbol("query")
    refusals: list[Refusal] = []
    for found, kind in zip(surveys, kinds, strict=True):
        if kind.name == FIRST_CALL:
            is_served = any(not regime.pinned for regime in found.served)
            unequal = found.unequal
        else:
            is_served = any(
                set(regime.pinned) <= {query} and _holds_somewhere(kind, regime, sympy.Eq(query, 1))
                for regime in found.served
            )
            unequal = [
                regime for regime in found.unequal if query in regime.pinned
            ] or found.unequal
        if is_served:
            continue
        asked = _asked(found)
        refusals += [
            _refusal(kind, regime, d, asked)
            for regime in unequal[:1]
            for d in regime.comparison.divergences[:5]
        ]
        refusals += [exclusion.refusal for exclusion in found.excluded[:1] if not unequal]
    if refusals:
        raise UnsupportedBranchError(*dict.fromkeys((*known, *refusals)))


def _holds_somewhere(kind: Kind, regime: Regime, fact: Any) -> bool:
    """Whether a fact holds at any of the sizes of a regime."""
    conditions = [condition.fact for condition in regime.region.conditions]
    return Facts((*kind.basics, *conditions, fact)).is_consistent()


def _asked(found: Survey) -> list[SourceLine]:
    """The lines whose questions part the regimes."""
    lines = [
        c.where
        for regime in (*found.served, *found.unequal)
        for c in regime.region.conditions
        if c.where is not None
    ]
    return list(dict.fromkeys(lines))


def _refusal(
    kind: Kind, regime: Regime, divergence: Divergence, asked: list[SourceLine]
) -> Refusal:
    one, other = divergence.one, divergence.other
    where = other.line or one.line
    there = (
        f" where {' and '.join(map(str, regime.region.conditions))}"
        if regime.region.conditions
        else ""
    )
    against = "later calls" if kind.name == FIRST_CALL else "the general path"
    detail = f"{kind.name}{there}: {other.text(3)}\n         {against}: {one.text(3)}"
    if one.line is not None and one.line != where:
        detail += f"\n         at {one.line}: {one.line.text}"
    for line in asked[:3]:
        detail += f"\n         the size is asked for at {line}: {line.text}"
    return Refusal(
        f"The {kind.name} and {against} compute different things.",
        why=detail,
        remedy="Make the two paths compute the same where the cache is empty; or accept random "
        'tests with check="test".'
        + (_STEP_ONLY if any("Eq(query, 1)" in str(c) for c in regime.region.conditions) else ""),
        where=where,
        also=tuple(asked),
    )


_STEP_ONLY = (
    " Where the first call computes all tokens at once and later calls step a state, rewrite the "
    "stepping method alone (method=), and give it the first tokens one by one."
)
