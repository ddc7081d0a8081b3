"""Whether any element of a tensor of sizes alone is so and so, as a fact about sizes.

A guess is a fact that is right at the sizes that were tried. It is shown for all sizes: where an
element is so, the fact holds; and where the fact holds, an element at some corner is so.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from cachefree.facts import Facts
from cachefree.laws.elements import Constant, Elements, UnknownElementError, is_float
from cachefree.laws.readers import READERS
from cachefree.terms import Term

__all__ = ["Wanted", "is_any", "is_each"]

_MOST_CORNERS = 64
Wanted = Callable[[Any], Any]
"""What is asked of an element, in the solver's words."""


def is_any(source: Term, wanted: Wanted | None, fact: Any, facts: Facts) -> bool:
    """Whether an element is as wanted at just the sizes at which a fact holds.

    Args:
        source: A tensor.
        wanted: What is asked of an element; None: that it is not zero.
        fact: About sizes.
        facts: What holds of the sizes.
    """

    def shown(elements: Elements) -> bool:
        index, holds = elements.indices(source), elements.size(fact)
        inside = list(elements.assumptions)
        z3 = elements.z3
        if not elements.never(z3.And(_element(elements, source, index, wanted), z3.Not(holds))):
            return False
        elements.assumptions = [elements.size(known) for known in facts.known]
        corners = list(itertools.product(*[_ends(elements, size) for size in source.sizes]))
        limits = z3.And(*inside)
        nowhere = [
            z3.Not(
                z3.And(
                    z3.substitute(limits, *zip(index, corner, strict=True)),
                    _element(elements, source, corner, wanted),
                )
            )
            for corner in corners[:_MOST_CORNERS]
        ]
        return elements.never(z3.And(holds, *nowhere))

    return _asked(shown, facts)


def is_each(source: Term, wanted: Wanted, facts: Facts) -> bool:
    """Whether all elements are as wanted, at all sizes."""

    def shown(elements: Elements) -> bool:
        value = elements.at(source, elements.indices(source))
        if not is_float(source):
            return elements.never(elements.z3.Not(wanted(value)))
        return all(
            elements.never(here) or (isinstance(leaf, Constant) and wanted(float(leaf.text)))
            for here, leaf in value
        )

    return _asked(shown, facts)


def _asked(shown: Callable[[Elements], bool], facts: Facts) -> bool:
    with facts.solver_lock:
        try:
            return shown(Elements(facts, lambda one, other: one is other, READERS))
        except (UnknownElementError, NotImplementedError):
            return False


def _element(elements: Elements, source: Term, index: Any, wanted: Wanted | None) -> Any:
    value = elements.at(source, tuple(index))
    if wanted is not None:
        if is_float(source):
            raise UnknownElementError
        return wanted(value)
    return elements.converted(value, source.dtype, torch.bool)


def _ends(elements: Elements, size: Any) -> list[Any]:
    zero = elements.z3.IntVal(0)
    return [zero] if size == 1 else [zero, elements.size(size) - 1]
