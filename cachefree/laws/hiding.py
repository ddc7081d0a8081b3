"""Masks that are added to scores, as masks that say which keys are seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from cachefree.facts import Facts
from cachefree.laws.elements import Constant, Elements, UnknownElementError
from cachefree.laws.elementwise import is_small_and_of_sizes
from cachefree.laws.law import Law, Rewriter
from cachefree.laws.readers import READERS
from cachefree.terms import Term

__all__ = ["HIDING_LAWS"]

aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default


def _seen(term: Term, rewriter: Rewriter) -> Term | None:
    """Attention with a mask of truths in place of one that is added.

    A row in which every key has the lowest number weighs all keys alike, one in which every key is
    hidden gives zeros: so every row has to see one. A hidden score then is the lowest number, give
    or take the score, below one that is seen, and its weight is 0 unless a score is larger than
    half of the largest number.
    """
    query, key, value, mask, *rest = term.args
    if not isinstance(mask, Term) or mask.dtype is None or not mask.dtype.is_floating_point:
        return None
    if len(mask.sizes) < 2 or not is_small_and_of_sizes(mask):
        return None
    shown, asked = rewriter.facts.shown, (_hides_or_adds_nothing, mask)
    if asked not in shown:  # every layer has the same mask
        lowest = torch.finfo(mask.dtype).min
        shown[asked] = _hides_or_adds_nothing(mask, lowest, rewriter.facts)
    if not shown[asked]:
        return None
    seen = rewriter.build(aten.eq.Scalar, (mask, 0), mask.shape, mask, torch.bool)
    return rewriter.build(_SDPA, (query, key, value, seen, *rest), term.shape, term)


def _hides_or_adds_nothing(mask: Term, lowest: float, facts: Facts) -> bool:
    """Whether every element is 0 or as low as can be, and every row has a 0."""
    with facts.solver_lock:
        elements = Elements(facts, lambda one, other: one is other, READERS)
        try:
            index = elements.indices(mask)
            if any(
                not (isinstance(leaf, Constant) and _is_either(float(leaf.text), lowest))
                and not elements.never(condition)
                for condition, leaf in elements.at(mask, index)
            ):
                return False
            return any(
                _is_seen(elements, mask, (*index[:-1], column))
                for column in _columns(elements, mask, index[-2])
            )
        except (UnknownElementError, NotImplementedError):
            return False


def _is_either(number: float, lowest: float) -> bool:
    return number == 0 or number <= lowest


def _columns(elements: Elements, mask: Term, row: Any) -> Iterator[Any]:
    """Where a row is likely to see a key: its own token's, the first one, the last one."""
    rows, columns = (elements.size(size) for size in mask.sizes[-2:])
    yield from (row + columns - rows, row, elements.z3.IntVal(0), columns - 1)


def _is_seen(elements: Elements, mask: Term, index: tuple[Any, ...]) -> bool:
    """Whether the element is there and 0, whatever the row."""
    z3, column = elements.z3, index[-1]
    others = [
        condition
        for condition, leaf in elements.at(mask, index)
        if not (isinstance(leaf, Constant) and float(leaf.text) == 0)
    ]
    outside = z3.Or(column < 0, column >= elements.size(mask.sizes[-1]))
    return elements.never(z3.Or(outside, *others))


HIDING_LAWS: tuple[Law, ...] = (
    Law(
        "lowest-hides",
        "sdpa(q, k, v, m) = sdpa(q, k, v, m = 0)  if every m[i] is 0 or at most the lowest number, "
        "a 0 in every row, and no score exceeds half of the largest number",
        "real",
        (_SDPA,),
        _seen,
    ),
)
