"""Equality of tensors element by element, decided by a solver for every index and every size.

A mask may be cut out of a triangle, compared from two ranges, or joined from pieces. Here a tensor
is the function from an index to its element: two tensors are equal if no index and no sizes tell
them apart.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from cachefree.facts import Facts
from cachefree.laws.elements import Elements, UnknownElementError
from cachefree.laws.law import Law
from cachefree.laws.readers import READERS
from cachefree.terms import Term, operands

__all__ = [
    "ELEMENTWISE",
    "ELEMENTWISE_REAL",
    "ELEMENTWISE_SIGNLESS",
    "equal_elementwise",
    "is_small_and_of_sizes",
    "uniform",
]

_MOST_TERMS = 60

ELEMENTWISE = Law(
    "elementwise",
    "x = y  if x[i] = y[i] for every index i and all sizes",
    "exact",
    (),
    lambda term, rewriter: None,
)

ELEMENTWISE_REAL = Law(
    "elementwise-real",
    "x = y  if x[i] = y[i] over the reals for every index i and all sizes, where z + 0.0 = z",
    "real",
    (),
    lambda term, rewriter: None,
)

ELEMENTWISE_SIGNLESS = Law(
    "elementwise-signless",
    "x = y  if x[i] = y[i] over the reals for every index i and all sizes, where z + 0.0 = z and "
    "−0.0 = 0.0, and nothing reads x or y that tells these apart",
    "real",
    (),
    lambda term, rewriter: None,
)


def equal_elementwise(
    one: Term, other: Term, facts: Facts, equal: Callable[[Term, Term], bool]
) -> Law | None:
    """The law by which two tensors of one type are shown to be equal, else None.

    That nothing reads them which tells −0.0 from 0.0 is for the caller to show.

    Args:
        one: A tensor.
        other: A tensor of the same shape and dtype.
        facts: What holds of the sizes.
        equal: Which other terms are already known to be equal.
    """
    if one.op not in READERS and other.op not in READERS:
        return None
    if one.dtype is None or one.dtype.is_complex:
        return None
    with facts.solver_lock:
        try:
            elements = Elements(facts, equal, READERS)
            if not elements.same(one, other):
                return None
            if elements.is_signless:
                return ELEMENTWISE_SIGNLESS
            return ELEMENTWISE_REAL if elements.is_real else ELEMENTWISE
        except (UnknownElementError, NotImplementedError):
            return None


def uniform(term: Term, facts: Facts) -> bool | float | None:
    """The number or truth that every element of a tensor is, where it depends on sizes alone.

    Args:
        term: A tensor.
        facts: What holds of the sizes.
    """
    if term.op not in READERS or term.dtype is None or not is_small_and_of_sizes(term):
        return None
    if term.dtype != torch.bool and not term.dtype.is_floating_point:
        return None
    with facts.solver_lock:
        try:
            return Elements(facts, lambda one, other: one is other, READERS).uniform(term)
        except (UnknownElementError, NotImplementedError):
            return None


def is_small_and_of_sizes(term: Term) -> bool:
    """Whether a term is made of few operators, and of sizes alone."""
    seen, pending = {term}, [term]
    while pending:
        below = pending.pop()
        if below.op in ("input", "attribute", "constant") or len(seen) > _MOST_TERMS:
            return False
        for operand in operands(below):
            if operand not in seen:
                seen.add(operand)
                pending.append(operand)
    return True
