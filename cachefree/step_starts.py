"""What steps that are scanned over the tokens start from: found where there is one token.

One step from the value that is sought is a first call of one token.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import sympy
from torch import nn

from cachefree.discover import Discovery
from cachefree.facts import Facts
from cachefree.neutral import FirstValues, find_neutrals
from cachefree.one_token import ONE_TOKEN
from cachefree.reading import Program
from cachefree.regimes import Kind
from cachefree.sampling import agree_on_samples
from cachefree.sizes import size_symbol
from cachefree.spec import FIRST_CALL
from cachefree.terms import Table, Term, topological

__all__ = ["first_values"]

_QUERY = size_symbol("query")
_MOST_TRIED = 12


def first_values(
    model: nn.Module, table: Table, discovery: Discovery, first: Program, step: Program
) -> FirstValues:
    """What the steps start from: what makes one step a first call of one token.

    It is a proposal: the steps from there are compared with first calls of any length.
    """
    basics = Kind(FIRST_CALL, discovery.first).basics
    asked = [question.fact for question in first.captured.questions]
    one = sympy.Eq(_QUERY, 1)
    facts = Facts((*basics, *asked, one))
    if not facts.is_consistent():
        facts = Facts((*basics, one))
    unknown = [step.inputs[place] for place in discovery.cache_leaves]
    found = find_neutrals(table, step.outputs, first.outputs, unknown, facts, ONE_TOKEN, {})
    points = [{**discovery.hints, "batch": batch, "query": 1} for batch in (2, 3)]

    def agrees(values: Mapping[str, Term]) -> bool:
        return bool(
            agree_on_samples(model, step.outputs, first.outputs, step.inputs, points, values)
        )

    for values in _likely(table, first, unknown, found.terms):
        if agrees(values):
            return replace(found, terms=values)
    return found


def _likely(
    table: Table, first: Program, unknown: Sequence[Term], found: Mapping[str, Term]
) -> Iterator[dict[str, Term]]:
    """The values that were found, then parameters of the first path in place of mere numbers."""
    yield dict(found)
    attributes = [term for term in topological(first.outputs) if term.op == "attribute"]
    choices: dict[str, list[Term]] = {}
    for past in unknown:
        path = str(past.args[0])
        fitting = [term for term in attributes if _is_row_of(term, past)]
        if found[path].op == "full" and fitting:
            choices[path] = [
                table.like(past, "expand", (term, past.sizes), past.sizes) for term in fitting
            ]
    counts: Counter[tuple[Term, ...]] = Counter()
    in_order = {}
    for path, several in choices.items():
        key = tuple(value.args[0] for value in several)
        in_order[path] = several[counts[key] % len(several)]
        counts[key] += 1
    if choices:
        yield {**found, **in_order}
    combined = itertools.product(*([found[path], *values] for path, values in choices.items()))
    for values in itertools.islice(combined, 1, _MOST_TRIED):
        yield {**found, **dict(zip(choices, values, strict=True))}


def _is_row_of(term: Term, past: Term) -> bool:
    """Whether a parameter is what every row of a batch may start from."""
    sizes, whole = term.sizes, past.sizes
    return (
        term.dtype == past.dtype
        and 0 < len(sizes) <= len(whole)
        and tuple(sizes)[-len(whole[1:]) :] == tuple(whole[1:])
        and all(size == 1 for size in sizes[: -len(whole[1:])])
    )
