"""What a model remembers of sizes between calls, and that no call depends on it.

A mask or a rotary table that is built at first use and kept, grown where a call needs more rows, is
state: what one call leaves, the next one finds. Yet no result depends on it, since what is found is
a part of what would be built. That is shown, not believed.

A path is captured as the second of two calls in a row, with sizes of its own for each. All that the
first call leaves, as far as the second one reads it, is then a value of the first call's sizes in
the second call's results. These have to be equal to those of the path alone, at every size of both
calls. And what the second call leaves has to be either what it found, or what a first call of some
sizes leaves: so, by induction, the same holds after any number of calls.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
from torch import nn

from cachefree.align import Comparison, compare
from cachefree.calls import Call, TensorSpec
from cachefree.capture import Captured, capture
from cachefree.discover import Discovery
from cachefree.errors import CacheFreeError, CaptureError, Refusal
from cachefree.facts import Facts
from cachefree.in_a_row import (
    EARLIER,
    InARow,
    earlier_symbols,
    in_a_row,
    names_of,
    places_of,
    renamed,
    symbols_of_call,
)
from cachefree.isolation import StateChange
from cachefree.laws import TABLE_LAWS
from cachefree.normal import Normaliser
from cachefree.reading import Program, is_own_buffer, read
from cachefree.regimes import Kind, Regime, Survey, captured_at, conditions_of, survey
from cachefree.results import other_result
from cachefree.sizes import compiled, size_symbol, substitute, symbols_of
from cachefree.spec import FIRST_CALL, LATER_CALLS, Domain
from cachefree.structure import Structure
from cachefree.terms import Table, Term, topological

__all__ = ["StateMattersError", "confirm_remembered"]

log = logging.getLogger(__name__)
_MOST_PATHS = 4


def confirm_remembered(
    model: nn.Module,
    table: Table,
    names: dict[int, str],
    discovery: Discovery,
    paths: tuple[Program, Program],
    domain: Domain,
    changes: Sequence[StateChange],
) -> tuple[Comparison, ...]:
    """Shows that no result depends on what calls leave on the model.

    Args:
        model: Any module.
        table: Of all terms.
        names: ``id`` of a parameter or buffer → its name.
        discovery: How the model is called.
        paths: The first path and the later path.
        domain: The sizes at which it has to be shown.
        changes: What calls leave on the model.

    Returns:
        What it was shown by.

    Raises:
        StateMattersError: some result depends on what an earlier call was given.
        CaptureError: it could not be shown.
    """
    places = places_of(changes)
    if places is None or discovery.asked:
        raise StateMattersError(*_kept(changes).refusals)
    both = InARow(model, places)
    shown = _Shown(both, table, names, discovery.hints, domain)
    first, later = paths
    calls = (first.captured.call, later.captured.call)
    found = [
        shown.after(calls[0], calls[0], first, FIRST_CALL),
        shown.after(calls[0], calls[1], later, LATER_CALLS),
        shown.after(None, calls[1], later, LATER_CALLS),
    ]
    left = found[0]
    if left is None or any(part is None for part in found):
        if shown.is_of_inputs:
            raise StateMattersError(*_kept(changes).refusals)
        raise _unshown(changes)
    for part, call in zip(found, (calls[0], *calls[1:] * 2), strict=True):
        assert part is not None
        if not all(shown.is_known(regime, left, call) for regime in part):
            raise _unshown(changes)
    return tuple(found for found in shown.comparisons if found.is_equal)


def _unshown(changes: Sequence[StateChange]) -> CaptureError:
    names = [repr(name) for name in names_of(changes)]
    told = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
    return CaptureError(
        Refusal(
            f"The model keeps state on itself: forward sets {told}.",
            why="What a call leaves there changes the next call, or could not be shown not to.",
            remedy="Pass it in and return it; or compute it in every call, or once in __init__.",
        )
    )


class StateMattersError(CaptureError):
    """What calls leave on a model changes the results of later ones."""


def _kept(changes: Sequence[StateChange]) -> CaptureError:
    return CaptureError(
        *dict.fromkeys(
            Refusal(
                f"The model keeps state on itself: forward sets {change.path!r}.",
                why="What a call leaves there changes the next call; a graph has no memory.",
                remedy="Pass it in and return it, as an argument of forward.",
            )
            for change in changes
        )
    )


@dataclass(frozen=True)
class _Held:
    """What a model holds: its parts, the tensors among them as terms, the numbers as expressions.

    Attributes:
        structure: How the parts are put together.
        leaves: One term or expression a part.
    """

    structure: Structure
    leaves: tuple[Any, ...]

    @property
    def terms(self) -> list[Term]:
        """The tensors."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Term)]

    @property
    def sizes(self) -> list[Any]:
        """The numbers."""
        return [leaf for leaf in self.leaves if not isinstance(leaf, Term)]

    def is_like(self, other: _Held) -> bool:
        """Whether another one is made of the same parts."""
        mine, others = ([isinstance(leaf, Term) for leaf in held.leaves] for held in (self, other))
        return mine == others and self.structure.difference(other.structure) is None

    def is_of(self, symbols: set[sympy.Symbol]) -> bool:
        """Whether nothing but these sizes, and the model's own tensors, is in it."""
        for term in topological(self.terms):
            if term.op == "input" or not _symbols(term) <= symbols:
                return False
        return symbols_of(self.sizes) <= symbols


def _symbols(term: Term) -> set[sympy.Symbol]:
    found: list[Any] = []

    def look(value: Any) -> None:
        if isinstance(value, (tuple, list)):
            for part in value:
                look(part)
        else:
            found.append(value)

    look(term.args)
    look(term.shape or ())
    return symbols_of(found)


class _Shown:
    """The two calls in a row, captured at all their sizes.

    Args:
        both: The model, called in a row.
        table: Of all terms.
        names: ``id`` of a parameter or buffer → its name.
        hints: Example sizes.
        domain: The sizes at which it has to be shown.
    """

    def __init__(
        self,
        both: InARow,
        table: Table,
        names: dict[int, str],
        hints: Mapping[str, int],
        domain: Domain,
    ) -> None:
        self.both = both
        self.table = table
        self.names = names
        self.hints = hints
        self.domain = domain
        self.comparisons: list[Comparison] = []
        self.alone: dict[Any, list[tuple[Program, list[Any]]]] = {}
        self.is_of_inputs = False  # whether a result was seen to depend on an earlier call's inputs

    def after(
        self, earlier: Call | None, call: Call, alone: Program, name: str
    ) -> list[Regime] | None:
        """A call after an earlier one, at all sizes of both; None where a result differs.

        Args:
            earlier: The call before; None where there is none.
            call: The call.
            alone: The path that it takes alone.
            name: Which call it is.
        """
        calls = [call] if earlier is None else [renamed(earlier), call]
        kind = Kind(name, in_a_row(calls))
        regions = [
            self._regions(FIRST_CALL, kind, is_earlier=True),
            self._regions(name, kind, is_earlier=False),
        ]
        known = [fact for found in regions if len(found) == 1 for fact in found[0]]
        kind = replace(kind, within=tuple(known))
        hints = {str(symbol): self._hint(symbol) for symbol in kind.symbols}
        program = read(capture(self.both, kind.call, hints), self.table, self.names)
        if program.captured.values:
            raise StateMattersError(
                Refusal("The model keeps what may depend on the values of its inputs.")
            )
        kept, _ = _held(program)
        if earlier is not None and not kept.is_of(set(kind.symbols)):
            raise StateMattersError(
                Refusal("The model keeps what it computes of its inputs from call to call.")
            )
        count = len(alone.outputs)
        found = survey(
            self.both,
            self.table,
            self.names,
            alone.outputs,
            kind,
            program,
            hints,
            results=lambda path: path.outputs[:count],
            more=TABLE_LAWS,
            unfit=functools.partial(_other_result, alone.captured),
        )
        self._serve_other_paths(found, Kind(name, call), count)
        left = [change for path in found.served for change in path.program.captured.changes]
        written = {name for path in found.served for name in _written(path.program)}
        if self.both.has_left_more(left) or not written <= self.both.known_buffers:
            return None
        served = sympy.Or(*[_holding(regime) for regime in found.served])
        for of_earlier, of_call in itertools.product(*regions):
            if not Facts((*kind.basics, *of_earlier, *of_call)).holds(served):
                self._note(found, count)
                return None
        self.comparisons += [regime.comparison for regime in found.served]
        return found.served

    def _serve_other_paths(self, found: Survey, kind: Kind, count: int) -> None:
        """Compares what is unequal to the path that was given with the one that is taken alone.

        Args:
            found: Where both calls in a row were compared with that path; changed in place.
            kind: The second call alone.
            count: How many tensors a call returns.
        """
        for regime in list(found.unequal):
            compared = self._with_each_alone(regime, kind, count)
            if compared:
                found.unequal.remove(regime)
                found.served.append(replace(regime, comparison=compared[0]))
                self.comparisons += compared[1:]

    def _with_each_alone(self, regime: Regime, kind: Kind, count: int) -> list[Comparison]:
        """Compares a regime with every path that the call takes alone; nothing where one differs.

        Args:
            regime: Two calls in a row.
            kind: The second call alone.
            count: How many tensors a call returns.
        """
        own = [symbol for symbol in kind.symbols if symbol not in regime.pinned]
        pinned = {symbol: n for symbol, n in regime.pinned.items() if symbol in kind.symbols}
        left = Facts((*_basics(regime.program), _holding(regime)))
        compared: list[Comparison] = []
        for _ in range(_MOST_PATHS):
            if not left.is_consistent():
                return compared
            sizes = left.witness(*[sympy.Ge(symbol, 2) for symbol in own], hints=self.hints)
            if sizes is None:
                return []
            try:
                alone = self._alone_at(kind, sizes, pinned)
            except CacheFreeError:
                return []
            due = [condition.fact for condition in conditions_of(alone, kind)]
            facts, values = left.and_also(*due), dict(regime.pinned)
            if _other_result(alone.captured, regime.program, facts, values) is not None:
                return []
            after = regime.program.outputs[:count]
            compared.append(
                compare(self.table, alone.outputs, after, facts, values, None, TABLE_LAWS)
            )
            if not compared[-1].is_equal:
                return []
            left = left.and_also(sympy.Not(sympy.And(*due)))
        return []

    def _alone_at(
        self, kind: Kind, sizes: Mapping[str, int], pinned: dict[sympy.Symbol, int]
    ) -> Program:
        """The path that a call takes alone at some sizes, captured once for all that take it."""
        for path, conditions in self.alone.get((kind.name, *pinned.items()), []):
            if all(compiled(fact)(sizes) for fact in conditions):
                return path
        own = {str(size): sizes[str(size)] for size in kind.symbols}
        path = captured_at(self.both.model, self.table, self.names, kind, own, pinned)
        conditions = [condition.fact for condition in conditions_of(path, kind)]
        self.alone.setdefault((kind.name, *pinned.items()), []).append((path, conditions))
        return path

    def _note(self, found: Survey, count: int) -> None:
        for regime in found.unequal:
            log.debug("%s: %s", regime.region, regime.comparison.divergences)
            for term in topological(regime.program.outputs[:count]):
                is_input = term.op == "input" and str(term.args[0]).startswith(EARLIER)
                self.is_of_inputs = self.is_of_inputs or is_input
        for exclusion in found.excluded:
            log.debug("%s: %s", exclusion.conditions, exclusion.refusal)

    def _hint(self, symbol: sympy.Symbol) -> int:
        name = str(symbol)
        if name.startswith(EARLIER):
            return self.hints.get(name.removeprefix(EARLIER), 5) + 4
        return self.hints.get(name, 5)

    def _regions(self, name: str, kind: Kind, *, is_earlier: bool) -> list[list[Any]]:
        """The conditions of each region of the domain, in the symbols of two calls in a row."""
        own = set(kind.symbols)
        found = []
        for region in self.domain.regions:
            if not region.name.startswith(name):
                continue
            facts = [condition.fact for condition in region.conditions]
            if is_earlier:
                facts = [substitute(fact, earlier_symbols(symbols_of([fact]))) for fact in facts]
            found.append([fact for fact in facts if symbols_of([fact]) <= own])
        return found or [[]]

    def is_known(self, regime: Regime, left: Sequence[Regime], call: Call) -> bool:
        """Whether what a call leaves is what it found, or what a first call of some sizes leaves.

        Args:
            regime: Two calls in a row.
            left: All that a first call leaves, as what the second of two calls finds.
            call: The second call.
        """
        facts = Facts(
            (*_basics(regime.program), *(condition.fact for condition in regime.region.conditions))
        )
        before, after = _held(regime.program)
        if after.is_like(before) and self._are_equal(after, before, facts, {}):
            return True
        own = set(symbols_of_call(call))
        if not after.is_of(own):
            after = self._without_overwritten(after, facts)
        if not after.is_of(own):
            return False
        for other in left:
            found, _ = _held(other.program)
            if not found.is_like(after):
                continue
            earlier = {size_symbol(f"{EARLIER}{symbol}"): symbol for symbol in own}
            for sizes in _readings(earlier, own):
                due = [
                    substitute(condition.fact, sizes)
                    for condition in other.region.conditions
                    if symbols_of([condition.fact]) <= earlier.keys()
                ]
                if all(map(facts.holds, due)) and self._are_equal(after, found, facts, sizes):
                    return True
        return False

    def _without_overwritten(self, held: _Held, facts: Facts) -> _Held:
        """What is held, without what an earlier call left and a later one has written over."""
        normaliser = Normaliser(self.table, facts, more=TABLE_LAWS)
        normal = iter(normaliser.normal(held.terms))
        if normaliser.misnoted:
            return held
        leaves = [next(normal) if isinstance(leaf, Term) else leaf for leaf in held.leaves]
        return replace(held, leaves=tuple(leaves))

    def _are_equal(
        self, one: _Held, other: _Held, facts: Facts, sizes: Mapping[sympy.Symbol, Any]
    ) -> bool:
        pairs = zip(one.sizes, other.sizes, strict=True)
        if not all(facts.equal(a, substitute(b, sizes)) for a, b in pairs):
            return False
        terms = other.terms, one.terms
        found = compare(self.table, *terms, facts, dict(sizes), None, TABLE_LAWS)
        self.comparisons.append(found)
        return found.is_equal


def _readings(
    earlier: Mapping[sympy.Symbol, sympy.Symbol], own: set[sympy.Symbol]
) -> list[dict[sympy.Symbol, Any]]:
    """What an earlier first call's sizes may be, to leave the same: its own, or all tokens."""
    query, past = size_symbol("query"), size_symbol("past")
    plain: dict[sympy.Symbol, Any] = dict(earlier)
    total = {**plain, size_symbol(f"{EARLIER}query"): past + query}
    return [total, plain] if {query, past} <= own else [plain]


def _other_result(
    alone: Captured, program: Program, facts: Facts, sizes: Mapping[sympy.Symbol, Any]
) -> Refusal | None:
    """The refusal of a call that returns something else after another one than alone."""
    own = program.captured
    result = own.outputs.children[0]
    after = replace(own, outputs=result, output_leaves=own.output_leaves[: result.leaf_count])
    problem = other_result(alone, after, facts, sizes)
    return None if problem is None else Refusal(f"A call after another one differs: {problem}.")


def _written(program: Program) -> set[Any]:
    """What a path writes to, other than its inputs: buffers of their own memory by their names."""
    return {
        term.args[0] if is_own_buffer(term, program.captured) else term
        for term in program.written
        if term.op != "input"
    }


def _basics(program: Program) -> tuple[Any, ...]:
    return tuple(sympy.Ge(symbol, 1) for symbol in symbols_of_call(program.captured.call))


def _holding(regime: Regime) -> Any:
    return sympy.And(*[condition.fact for condition in regime.region.conditions])


def _held(program: Program) -> tuple[_Held, _Held]:
    """What is held before and after the last call."""
    captured = program.captured
    terms = iter(program.outputs)
    leaves = [
        next(terms) if isinstance(leaf, TensorSpec) else leaf.expr
        for leaf in captured.output_leaves
    ]
    found = []
    place = captured.outputs.children[0].leaf_count
    for structure in captured.outputs.children[1:]:
        found.append(_Held(structure, tuple(leaves[place : place + structure.leaf_count])))
        place += structure.leaf_count
    before, after = found
    return before, after
