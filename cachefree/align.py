"""Two programs walked together from their outputs: they agree, or there is a divergence."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy

from cachefree.facts import Facts
from cachefree.laws import COMMUTATIVE, Law
from cachefree.laws.elementwise import ELEMENTWISE_SIGNLESS, equal_elementwise
from cachefree.laws.evaluation import equal_at_every_size, is_of_sizes_alone
from cachefree.laws.zero_signs import is_sign_of_zero_lost
from cachefree.normal import Normaliser, Step
from cachefree.terms import Table, Term, operands

__all__ = ["Comparison", "Divergence", "compare"]


@dataclass(frozen=True)
class Divergence:
    """A place where two programs differ.

    Attributes:
        one: The value in the one graph.
        other: The value in the model's own path.
    """

    one: Term
    other: Term


@dataclass
class Comparison:
    """What comparing two programs showed.

    Attributes:
        divergences: Where they differ; empty where they were shown to be equal.
        laws: The laws that were used.
        checked: Values that depend on sizes alone and were compared at every size up to a bound,
            not proved.
        normaliser: What brought the one graph into normal form.
        steps: Every application of a law to either side.
        pairs: Values that were shown to be equal by their elements, with the law; None where they
            were compared at every size up to a bound.
    """

    divergences: tuple[Divergence, ...]
    laws: tuple[Law, ...] = ()
    checked: tuple[Divergence, ...] = ()
    normaliser: Normaliser | None = None
    steps: tuple[Step, ...] = ()
    pairs: tuple[tuple[Law | None, Term, Term], ...] = ()

    @property
    def is_equal(self) -> bool:
        """Whether the programs were shown to be equal."""
        return not self.divergences

    @property
    def is_exact(self) -> bool:
        """Whether every law that was used holds bit for bit."""
        return all(law.kind == "exact" for law in self.laws)


def compare(
    table: Table,
    one: Sequence[Term],
    other: Sequence[Term],
    facts: Facts,
    sizes: Mapping[sympy.Symbol, Any] | None = None,
    inputs: Mapping[str, Term] | None = None,
    more: Sequence[Law] = (),
    given: Mapping[str, Term] | None = None,
) -> Comparison:
    """Compares two programs over the same inputs.

    Args:
        table: Of both programs' terms.
        one: Outputs of the one graph.
        other: Outputs of the model's own path.
        facts: What holds of the sizes.
        sizes: Sizes to substitute in both.
        inputs: Inputs of the one graph to replace: the neutral cache.
        more: Laws to be tried too, after the others.
        given: Inputs to replace in both: what their values are known to be.
    """
    exact = _compare(table, one, other, facts, sizes, inputs, more, given, is_exact=True)
    if exact.is_equal:
        return exact
    real = _compare(table, one, other, facts, sizes, inputs, more, given, is_exact=False)
    return real if real.is_equal else exact


def _compare(
    table: Table,
    one: Sequence[Term],
    other: Sequence[Term],
    facts: Facts,
    sizes: Mapping[sympy.Symbol, Any] | None,
    inputs: Mapping[str, Term] | None,
    more: Sequence[Law],
    given: Mapping[str, Term] | None,
    *,
    is_exact: bool,
) -> Comparison:
    both = {**(given or {}), **(inputs or {})}  # what is given comes first: others may read it
    mine = Normaliser(table, facts, sizes, both, is_exact=is_exact, more=more)
    theirs = Normaliser(table, facts, sizes, given, is_exact=is_exact, more=more)
    left, right = mine.normal(one), theirs.normal(other)
    walk = _Walk(facts, is_exact, left, right)
    for a, b in zip(left, right, strict=True):
        walk.pair(a, b)
    laws = {step.law: None for step in (*mine.steps, *theirs.steps)}
    laws.update(dict.fromkeys(walk.laws))
    misnoted = [Divergence(term, term) for term in (*mine.misnoted, *theirs.misnoted)]
    return Comparison(
        tuple(dict.fromkeys([*walk.divergences, *misnoted])),
        tuple(laws),
        tuple(dict.fromkeys(walk.checked)),
        mine,
        (*mine.steps, *theirs.steps),
        tuple(walk.pairs),
    )


@dataclass
class _Walk:
    """Pairs of terms, compared from the outputs down."""

    facts: Facts
    is_exact: bool
    left: tuple[Term, ...]
    right: tuple[Term, ...]
    known: dict[tuple[Term, Term], bool] = field(default_factory=dict)
    divergences: list[Divergence] = field(default_factory=list)
    checked: list[Divergence] = field(default_factory=list)
    laws: list[Law] = field(default_factory=list)
    pairs: list[tuple[Law | None, Term, Term]] = field(default_factory=list)

    def pair(self, one: Term, other: Term) -> bool:
        """Whether two terms are equal; else the deepest divergences are noted."""
        self._settle(one, other)
        is_equal = self.equal(one, other)
        if not is_equal:
            self._note(one, other)
        return is_equal

    def _settle(self, one: Term, other: Term) -> None:
        """Decides a pair, after all pairs below it."""
        stack = [((one, other), False)]
        seen: set[tuple[Term, Term]] = set()
        while stack:
            pair, are_all_below_known = stack.pop()
            if are_all_below_known:
                self.known.setdefault(pair, False)  # while it is being decided
                self.known[pair] = self._decide(*pair)
            elif pair[0] is not pair[1] and pair not in seen and pair not in self.known:
                seen.add(pair)
                stack.append((pair, True))
                stack.extend((below, False) for below in _operand_pairs(*pair) or ())

    def equal(self, one: Term, other: Term) -> bool:
        """Whether two terms are equal: known, or found now."""
        if one is other:
            return True
        if (one, other) not in self.known:
            if one.op != other.op or not _same_type(one, other, self.facts):
                return False
            self._settle(one, other)
        return self.known[one, other]

    def _decide(self, one: Term, other: Term) -> bool:
        pairs = _operand_pairs(one, other)
        if pairs is not None and all(self.equal(*pair) for pair in pairs):
            return True
        if not _same_type(one, other, self.facts):
            return False
        law = equal_elementwise(one, other, self.facts, self.equal)
        if law is ELEMENTWISE_SIGNLESS and not (
            is_sign_of_zero_lost(one, self.left) and is_sign_of_zero_lost(other, self.right)
        ):
            law = None
        if law is not None and (law.kind == "exact" or not self.is_exact):
            self.laws.append(law)
            self.pairs.append((law, one, other))
            return True
        if (
            is_of_sizes_alone(one)
            and is_of_sizes_alone(other)
            and equal_at_every_size(one, other, self.facts)
        ):
            self.checked.append(Divergence(one, other))
            self.pairs.append((None, one, other))
            return True
        return False

    def _note(self, one: Term, other: Term) -> None:
        """The deepest unequal pairs below an unequal pair."""
        stack, seen = [(one, other)], set()
        while stack:
            pair = stack.pop()
            if pair in seen:
                continue
            seen.add(pair)
            below = [p for p in _operand_pairs(*pair) or () if not self.equal(*p)]
            if below and not self._is_insertion(*pair) and not self._are_parts(*pair):
                stack.extend(below)
            else:
                self.divergences.append(Divergence(*pair))

    def _are_parts(self, one: Term, other: Term) -> bool:
        """Whether both sides are the same part of what is not alike as a whole.

        The part of an input is then what differs, and tells what the input is there.
        """
        return (
            one.op == "slice"
            and one.args[0].op == "input"
            and not _same_type(one.args[0], other.args[0], self.facts)
        )

    def _is_insertion(self, one: Term, other: Term) -> bool:
        """Whether one side is an operator more on what the other is.

        The operands of the two do not correspond then.
        """
        return any(
            self.equal(operand, other) for operand in operands(one) if operand.op == other.op
        ) or any(self.equal(one, operand) for operand in operands(other) if operand.op == one.op)


def _same_type(one: Term, other: Term, facts: Facts) -> bool:
    if (
        one.shape is None
        or other.shape is None
        or one.dtype != other.dtype
        or len(one.shape) != len(other.shape)
    ):
        return False
    return all(map(facts.equal, one.shape, other.shape))


def _operand_pairs(one: Term, other: Term) -> list[tuple[Term, Term]] | None:
    """The operands of two terms side by side; None where anything else of the terms differs."""
    if one.op != other.op or one.op in ("input", "attribute", "constant"):
        return None
    if not _same_but_terms(one.args, other.args):
        return None
    mine, theirs = list(operands(one)), list(operands(other))
    if one.op in COMMUTATIVE and len(mine) == 2 and _is_crossed(mine, theirs):
        theirs.reverse()
    return list(zip(mine, theirs, strict=True)) if mine else None


def _is_crossed(mine: list[Term], theirs: list[Term]) -> bool:
    """Whether the operands of a commutative operator correspond crosswise."""
    straight = sum(_likeness(*pair) for pair in zip(mine, theirs, strict=True))
    crossed = sum(_likeness(*pair) for pair in zip(mine, reversed(theirs), strict=True))
    return crossed > straight


def _likeness(one: Term, other: Term) -> int:
    is_same_op = bool(one.op == other.op)
    shared = map(operator.is_, operands(one), operands(other)) if is_same_op else ()
    return 4 * (one is other) + 2 * is_same_op + bool(one.shape == other.shape) + sum(shared)


def _same_but_terms(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same_but_terms, one, other))
    if isinstance(one, Term) and isinstance(other, Term):
        return True
    if isinstance(one, float) and isinstance(other, float):
        return repr(one) == repr(other)
    return type(one) is type(other) and bool(one == other)
