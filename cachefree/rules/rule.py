"""What a rule is: one family of cache branches, closed by an edit of the later path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import sympy

from cachefree.align import Divergence
from cachefree.normal import Normaliser
from cachefree.terms import Table, Term, replace_operands, topological

__all__ = ["Closing", "Edit", "Rule", "Site", "replaced"]


@dataclass(frozen=True)
class Edit:
    """A value of the later path and what takes its place."""

    old: Term
    new: Term


@dataclass(frozen=True)
class Site:
    """A divergence with what a rule may look at.

    Attributes:
        table: Where new terms are made.
        divergence: The two values, in normal form.
        sources: Values of the later path whose normal form is the divergence's one side, latest
            first.
        past: The symbols of the past's lengths.
    """

    table: Table
    divergence: Divergence
    sources: tuple[Term, ...]
    past: tuple[sympy.Symbol, ...]


class Rule(Protocol):
    """One family of cache branches.

    Attributes:
        name: As reports call it, a noun.
        neutral: What makes the branch vanish, in words.
    """

    name: str
    neutral: str

    def edit(self, site: Site) -> Edit | None:
        """The edit that makes both sides equal, or None where the rule does not match.

        The edit is proved afterwards.
        """
        ...


@dataclass(frozen=True)
class Closing:
    """Edits of the later path that closed divergences.

    Attributes:
        rule: The rule.
        outputs: The edited outputs.
        divergences: What was closed.
    """

    rule: Rule
    outputs: tuple[Term, ...]
    divergences: tuple[Divergence, ...]


def sites(
    table: Table,
    outputs: Sequence[Term],
    divergences: Sequence[Divergence],
    normaliser: Normaliser,
    past: tuple[sympy.Symbol, ...],
) -> list[Site]:
    """The divergences with the values of the later path that they come from."""
    sources: dict[Term, list[Term]] = {}
    for term in topological(outputs):
        if term.shape is not None:
            sources.setdefault(normaliser.of(term), []).append(term)
    return [
        Site(table, divergence, tuple(reversed(sources.get(divergence.one, []))), past)
        for divergence in divergences
    ]


def replaced(table: Table, outputs: Sequence[Term], edits: Mapping[Term, Term]) -> tuple[Term, ...]:
    """The outputs with values replaced, below every use of them.

    What takes a value's place may contain that value; it then contains it with the edits below it
    made.
    """
    done: dict[Term, Term] = {}
    for term in topological(outputs):
        again = _rebuilt(table, term, done)
        if term in edits:
            inner = {**done, term: again}
            for below in topological([edits[term]]):
                if below not in inner:
                    inner[below] = _rebuilt(table, below, inner)
            again = inner[edits[term]]
        done[term] = again
    return tuple(done[term] for term in outputs)


def _rebuilt(table: Table, term: Term, done: Mapping[Term, Term]) -> Term:
    args = replace_operands(
        term.args, lambda arg: done.get(arg, arg) if isinstance(arg, Term) else arg
    )
    return term if args == term.args else table.like(term, term.op, args)


def at_first_call(value: Any, past: Sequence[sympy.Symbol]) -> Any:
    """A size where nothing is past."""
    return sympy.expand(sympy.sympify(value).subs(dict.fromkeys(past, 0)))
