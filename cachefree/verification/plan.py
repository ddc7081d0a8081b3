"""A whole generation as a few numbers: sizes, the new tokens of each call, padding, and a seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import sympy
import torch

from cachefree.onnx.domain import concrete
from cachefree.spec import Interface

__all__ = ["PADDINGS", "Plan", "draw_plan", "length_of", "next_sizes"]

Padding = Literal["none", "holes", "left"]
PADDINGS: tuple[Padding, ...] = ("none", "holes", "left")
LONGEST_CHUNK = 7
MOST_CALLS = 6
MOST_ROWS = 4


@dataclass(frozen=True)
class Plan:
    """A generation to run.

    Attributes:
        queries: The new tokens of each call; the first call has no cache.
        sizes: The other sizes, which stay: batch, encoder …
        padding: What masks drop: nothing, single positions, or the start of all rows but the first.
        seed: Of all values.
        dtype: That the model is cast to; None for its own.
    """

    queries: tuple[int, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)
    padding: Padding = "none"
    seed: int = 0
    dtype: torch.dtype | None = None

    def __repr__(self) -> str:
        said = {part.name: getattr(self, part.name) for part in fields(self)}
        if self.dtype is None:
            del said["dtype"]
        return f"Plan({', '.join(f'{name}={value!r}' for name, value in said.items())})"

    @property
    def total(self) -> int:
        """All tokens of the generation."""
        return sum(self.queries)


def draw_plan(
    choose: Callable[[list[Any]], Any],
    interface: Interface,
    has_masks: bool,
    seed: int,
    dtype: torch.dtype | None = None,
) -> Plan | None:
    """Draws a generation whose every call is inside the domain.

    Args:
        choose: Picks one of a list; simpler choices stand first.
        interface: Of the model.
        has_masks: Whether there are masks to pad.
        seed: Of all values.
        dtype: That the model is cast to; None for its own.

    Returns:
        The plan; None where no first call fits into the domain at these sizes.
    """
    pasts = set(interface.past_symbols)
    fixed = {
        name: choose(list(range(1, MOST_ROWS + 1)))
        for name in interface.symbols
        if name not in pasts | {"query"}
    }
    sizes = {**fixed, **dict.fromkeys(pasts, 0)}
    queries: list[int] = []
    for _ in range(choose(list(range(1, MOST_CALLS + 1)))):
        fitting = [
            query
            for query in range(1, LONGEST_CHUNK + 1)
            if interface.domain.holds(
                interface.of_call({**sizes, "query": query}, is_first=not queries),
                is_first=not queries,
            )
        ]
        if not fitting:
            break
        is_first = not queries
        queries.append(choose(fitting))
        sizes = interface.of_call({**sizes, "query": queries[-1]}, is_first=is_first)
        sizes = next_sizes(interface, sizes)
    if not queries:
        return None
    padding: Padding = choose(list(PADDINGS)) if has_masks else "none"
    return Plan(tuple(queries), fixed, padding, seed, dtype)


def length_of(size: Any) -> tuple[str, int]:
    """The symbol of a growing size, and how many rows there are where it is 0."""
    symbols = sorted(sympy.sympify(size).free_symbols, key=str)
    rows = sympy.expand(size - symbols[0]) if len(symbols) == 1 else None
    return (str(symbols[0]), int(rows)) if rows is not None and rows.is_Integer else (str(size), 0)


def next_sizes(interface: Interface, sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes after a call: each past is as long as what came out."""
    later = dict(sizes)
    for slot in interface.cache:
        for axis in slot.growing_axes:
            symbol, rows = length_of(slot.past.shape[axis])
            if symbol in later:
                later[symbol] = concrete(slot.present.shape, sizes)[axis] - rows
    return later
