"""Regimes that no proof serves, and that random tests accept, where the user asked for tests.

Each is tried at many sizes: small ones in every combination, one after the other, and with more
tokens than any number in the model's code.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from cachefree.discover import Discovery
from cachefree.facts import Facts
from cachefree.other_sizes import many_rounds
from cachefree.regimes import Kind, Regime, Survey
from cachefree.sampling import agree_on_samples
from cachefree.sizes import compiled, size_symbol, symbols_of
from cachefree.spec import FIRST_CALL
from cachefree.terms import Term, operands, topological
from cachefree.write_once import OneCall

__all__ = ["Tested", "accept_unproved", "call_sizes"]

log = logging.getLogger(__name__)
_SMALL = (1, 2, 3)
_LENGTHS = (4, 5, 6, 7, 8, 9, 12, 16, 17)
_MOST_COMBINED = 2
_QUERY = "query"
_LARGEST = 1024
_MOST_ELEMENTS = 2**26  # half a gigabyte in float64


class Tested:
    """What was accepted without a proof.

    Attributes:
        count: How many regimes.
        kept: Names of buffers whose values the tests relied on.
    """

    def __init__(self) -> None:
        self.count = 0
        self.kept: dict[str, None] = {}


def accept_unproved(
    model: torch.nn.Module,
    outputs: tuple[Term, ...],
    one: OneCall,
    surveys: Sequence[Survey],
    kinds: Sequence[Kind],
    discovery: Discovery,
    check: str,
) -> Tested:
    """Serves the regimes that random tests accept (``"test"``), or all (``"off"``)."""
    tested = Tested()
    caches = [one.inputs[place] for place in discovery.cache_leaves]
    for found, kind in zip(surveys, kinds, strict=True):
        neutral = {
            str(term.args[0]): kind.inputs[str(term.args[0])]
            for term in caches
            if kind.name == FIRST_CALL and str(term.args[0]) in kind.inputs
        }
        for regime in list(found.unequal):
            if check != "off":
                both = (*outputs, *regime.program.outputs)
                sizes = _sizes(model, both, kind, regime, discovery)
                points = [call_sizes(kind, point) for point in sizes]
                points = [point for point in points if _fits(both, point)] or points[:1]
                samples = agree_on_samples(
                    model, outputs, regime.program.outputs, one.inputs, points, neutral
                )
                if samples is None:
                    continue
                tested.kept.update(dict.fromkeys(samples.kept))
            found.unequal.remove(regime)
            found.served.append(regime)
            tested.count += 1
    return tested


def call_sizes(kind: Kind, sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes of a call with those of the one graph."""
    symbols = {size_symbol(name): size for name, size in sizes.items()}
    known = {symbol: size for symbol, size in symbols.items() if symbol not in kind.zero}
    values = {str(symbol): int(size) for symbol, size in kind.values(known).items()}
    return {**sizes, **values}


def _sizes(
    model: torch.nn.Module,
    outputs: Sequence[Term],
    kind: Kind,
    regime: Regime,
    discovery: Discovery,
) -> list[dict[str, int]]:
    """Sizes of a regime: small ones in every combination, and then more and more tokens."""
    facts = Facts((*kind.basics, *(c.fact for c in regime.region.conditions)))
    hints = dict(discovery.hints)
    base = facts.witness(hints=hints) or hints
    many = max(many_rounds(model), *(number + 3 for number in _numbers(outputs)))
    found: dict[tuple[tuple[str, int], ...], dict[str, int]] = {}
    for point in itertools.chain([base], _points(kind, base, many)):
        if regime.region.holds(point) and all(point[str(symbol)] for symbol in kind.symbols):
            found.setdefault(tuple(sorted(point.items())), point)
    return list(found.values()) or [base]


def _fits(outputs: Sequence[Term], sizes: Mapping[str, int]) -> bool:
    """Whether no value is so large that a test should not compute it."""
    known = set(map(size_symbol, sizes))
    return all(
        math.prod(int(compiled(size)(sizes)) for size in term.shape or ()) <= _MOST_ELEMENTS
        for term in topological(outputs)
        if term.op != "attribute" and symbols_of(term.shape or ()) <= known
    )


def _numbers(outputs: Sequence[Term]) -> list[int]:
    """Numbers that places may be compared with: those beside integers."""
    found = [0]
    for term in topological(outputs):
        is_of_integers = any(
            below.dtype is not None and not below.dtype.is_floating_point
            for below in operands(term)
        )
        numbers = term.args if is_of_integers or term.op == "full" else ()
        if term.op == "constant" and term.payload.numel() == 1 and not term.payload.is_complex():
            numbers = (term.payload.item(),)
        found += [
            math.ceil(abs(number))
            for number in numbers
            if type(number) in (int, float) and 2 <= abs(number) <= _LARGEST
        ]
    return found


def _points(kind: Kind, base: Mapping[str, int], many: int) -> Iterator[dict[str, int]]:
    names = [str(symbol) for symbol in kind.symbols]
    names.sort(key=lambda name: name not in (_QUERY, "batch"))
    few = names[:_MOST_COMBINED]
    for values in itertools.product(_SMALL, repeat=len(few)):
        yield {**base, **dict(zip(few, values, strict=True))}
    for name in names:
        for size in (*_SMALL, *(_LENGTHS if name == _QUERY else ())):
            yield {**base, name: size}
    for name in names:
        for size in (many, many // 2, many // 4, many // 8) if name == _QUERY else (many,):
            yield {**base, **({"batch": 1} if "batch" in base else {}), name: size}
