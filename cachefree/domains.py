"""The domain in as few words as hold: regions that cover one another are merged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy

from cachefree.facts import Facts
from cachefree.spec import Condition

__all__ = ["merged"]


def merged(
    regions: Sequence[tuple[Condition, ...]], basics: Sequence[Any]
) -> tuple[tuple[Condition, ...], ...]:
    """The same sizes by fewer regions with fewer conditions.

    A condition goes where, without it, every size is in another region, and a region goes where
    the others cover it.

    Args:
        regions: Of each region, what must hold.
        basics: Facts that hold of every call.
    """
    kept = [tuple(region) for region in regions]

    def covered(region: Sequence[Condition], by: Sequence[tuple[Condition, ...]]) -> bool:
        facts = Facts((*basics, *(condition.fact for condition in region)))
        parts = [sympy.And(*(condition.fact for condition in other)) for other in by]
        return facts.holds(sympy.Or(*parts))

    for place, region in enumerate(kept):
        for condition in region:
            without = tuple(other for other in kept[place] if other is not condition)
            if covered(without, kept):
                kept[place] = without
    for region in sorted(kept, key=len, reverse=True):
        others = list(kept)
        others.remove(region)
        if others and covered(region, others):
            kept = others
    return tuple(kept)
