"""The domain of a graph that takes what stands beside the encoder, and that of the encoder.

Every call of the graph is given what the encoder made of some call, so that what a region asks of
the encoder's inputs alone is asked of the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy

from cachefree.errors import Refusal, UnsupportedBranchError
from cachefree.sizes import size_symbol, substitute, symbols_of
from cachefree.spec import FIRST_CALL, Condition, Domain, InputSpec, Region

__all__ = ["ENCODER", "parted_domain"]

ENCODER = "encoder"
"""The name of the region of an encoder's calls."""


def parted_domain(
    domain: Domain,
    ties: Mapping[sympy.Symbol, Any],
    inputs: tuple[Sequence[InputSpec], Sequence[InputSpec]],
    present: Mapping[str, Any],
) -> tuple[Domain, Domain]:
    """Parts a domain in what the decoder's inputs tell and what the encoder's do.

    Args:
        domain: Of the graph that joins.
        ties: The lengths of what was joined, on later calls; on first calls they are 0.
        inputs: Of the decoder, and of the encoder.
        present: The encoder's lengths by the sizes of what the encoder takes.

    Returns:
        The decoder's domain and the encoder's.

    Raises:
        UnsupportedBranchError: the regions ask the encoder for different sizes, or the inputs of
            neither tell what one asks for.
    """
    told, heard = (symbols_of(size for spec in specs for size in spec.shape) for specs in inputs)
    sizes = {size_symbol(name): size for name, size in present.items()}
    regions, asked = [], set[tuple[Condition, ...]]()
    for region in domain.regions:
        every = _without_joins(region, ties)
        mine = tuple(c for c in every if symbols_of([c.fact]) <= told)
        regions.append(Region(region.name, mine))
        asked.add(tuple(replace(c, fact=substitute(c.fact, sizes)) for c in every if c not in mine))
    if len(asked) > 1 or any(symbols_of([c.fact]) - heard for each in asked for c in each):
        raise UnsupportedBranchError(
            Refusal(
                "The encoder's keys and values cannot be moved beside the encoder.",
                why="Neither it nor the decoder would see alone whether "
                f"{' and '.join(sorted({str(c) for each in asked for c in each}))}.",
                remedy='Use cross_attention="reuse".',
            )
        )
    return Domain(tuple(regions), domain.fixed), Domain((Region(ENCODER, next(iter(asked), ())),))


def _without_joins(region: Region, ties: Mapping[sympy.Symbol, Any]) -> list[Condition]:
    """The conditions of a region without the lengths of what was joined."""
    is_first = region.name == FIRST_CALL
    lengths = dict.fromkeys(ties, sympy.Integer(0)) if is_first else dict(ties)
    moved = (replace(c, fact=substitute(c.fact, lengths)) for c in region.conditions)
    return [c for c in moved if c.fact not in (True, sympy.true)]
