"""Sizes that the model's code chooses in two cases, as one size.

Before: ``length = window - 1 + n if past >= window else past + n``.

After: ``length = min(window - 1 + n, past + n)``.

Why equal: the minimum (or the maximum) is shown to be the first size wherever the code takes the
first case, and the second wherever it takes the second. What is computed with it is compared again
in both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy
from torch.utils._sympy.functions import Max, Min

from cachefree.align import Divergence
from cachefree.facts import Facts
from cachefree.regimes import Kind, Regime, Survey
from cachefree.rules import Closing
from cachefree.sizes import expression
from cachefree.terms import Table, Term, replace_operands, topological

__all__ = ["resized", "with_common_size"]


class _CommonSize:
    name = "size in two cases"
    neutral = "the smaller or the larger of both sizes"

    def edit(self, site: Any) -> None:
        """Not asked: a size is replaced wherever it occurs."""


def with_common_size(
    table: Table, outputs: Sequence[Term], surveys: Sequence[Survey], kinds: Sequence[Kind]
) -> Iterator[Closing]:
    """The graph with one size replaced by one that is right in two regimes, likeliest first."""
    tried: set[Any] = set()
    for found, kind in zip(surveys, kinds, strict=True):
        bases = [_facts(kind, regime) for regime in found.served if not regime.pinned]
        for regime in found.unequal:
            facts = _facts(kind, regime)
            for divergence in regime.comparison.divergences:
                for one, other in _size_pairs(divergence):
                    for base in bases:
                        size = _common(one, other, base, facts)
                        if size is not None and (one, size) not in tried:
                            tried.add((one, size))
                            edited = resized(table, outputs, {one: size})
                            yield Closing(_CommonSize(), edited, (divergence,))


def _facts(kind: Kind, regime: Regime) -> Facts:
    return Facts((*kind.basics, *(condition.fact for condition in regime.region.conditions)))


def _size_pairs(divergence: Divergence) -> Iterator[tuple[Any, Any]]:
    """Sizes at the same place of both sides that are not the same; those of the one graph vary."""
    if divergence.one.op != divergence.other.op:
        return
    stack: list[tuple[Any, Any]] = [(divergence.one.args, divergence.other.args)]
    while stack:
        one, other = stack.pop()
        if isinstance(one, tuple) and isinstance(other, tuple):
            stack += zip(one, other, strict=False)
        elif _varies(one) and isinstance(other, (int, sympy.Basic)) and one != other:
            yield one, other


def _varies(size: Any) -> bool:
    """Whether a size is computed: neither a number nor a size of an input."""
    return isinstance(size, sympy.Basic) and not isinstance(size, sympy.Symbol)


def _common(one: Any, other: Any, base: Facts, facts: Facts) -> Any:
    """The minimum or maximum of two sizes that is the one in one region and the other in the other.

    None where neither is.
    """
    for extreme in (Min, Max):
        size = _factored(extreme, one, sympy.sympify(other))
        if base.equal(size, one) and facts.equal(size, other):
            return size
    return None


def _factored(extreme: Any, one: Any, other: Any) -> Any:
    """``min(a + c, b + c)`` as ``min(a, b) + c``."""
    mine, theirs = (set(sympy.Add.make_args(size)) for size in (one, other))
    shared = mine & theirs
    rest = [sympy.Add(*(parts - shared)) for parts in (mine, theirs)]
    return sympy.Add(*shared, extreme(*rest))


def resized(table: Table, outputs: Sequence[Term], sizes: Mapping[Any, Any]) -> tuple[Term, ...]:
    """The outputs with sizes replaced wherever they occur, but for those of inputs."""
    done: dict[Term, Term] = {}
    known: dict[Any, Any] = {}

    def size(value: Any) -> Any:
        if not isinstance(value, sympy.Basic):
            return value
        if value not in known:
            known[value] = expression(value.xreplace(dict(sizes)))
        return known[value]

    def argument(value: Any) -> Any:
        return done[value] if isinstance(value, Term) else size(value)

    for term in topological(outputs):
        if term.op in ("input", "attribute", "constant"):
            done[term] = term
            continue
        args = replace_operands(term.args, argument)
        shape = None if term.shape is None else tuple(map(size, term.shape))
        payload = term.payload
        if term.shape is None and payload is not None:
            payload = tuple(
                (tuple(map(size, part)), dtype, device) for part, dtype, device in payload
            )
        done[term] = (
            term
            if args == term.args and shape == term.shape
            else table.make(term.op, args, shape, term.dtype, term.device, term.line, payload)
        )
    return tuple(done[term] for term in outputs)
