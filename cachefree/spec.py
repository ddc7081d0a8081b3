"""The interface of a rewritten model: flat inputs and outputs, cache slots, and domain."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from cachefree.errors import SourceLine
from cachefree.sizes import compiled

__all__ = [
    "AXIS_NAMES",
    "FIRST_CALL",
    "LATER_CALLS",
    "CacheSlot",
    "Condition",
    "Domain",
    "InputSpec",
    "Interface",
    "OutputSpec",
    "Region",
]

AXIS_NAMES: dict[str, str] = {
    "batch": "B, the batch",
    "query": "S, the new tokens",
    "past": "P, what the cache holds",
    "encoder": "E, the encoder's length",
}


FIRST_CALL = "first call"
LATER_CALLS = "later calls"


@dataclass(frozen=True)
class InputSpec:
    """A flat input of the one graph.

    Attributes:
        name: The placeholder's name.
        path: Where it stands in the model's call, such as ``past_key_values[0][1]``.
        shape: Its sizes: ints, or sympy expressions in the symbols ``batch``, ``query``, ``past`` …
        dtype: Its dtype.
        is_cache: Whether it belongs to the cache.
    """

    name: str
    path: str
    shape: tuple[Any, ...]
    dtype: torch.dtype
    is_cache: bool = False


@dataclass(frozen=True)
class OutputSpec:
    """A flat output of the one graph; the fields are those of `InputSpec`."""

    name: str
    path: str
    shape: tuple[Any, ...]
    dtype: torch.dtype
    is_cache: bool = False


@dataclass(frozen=True)
class CacheSlot:
    """One tensor of the cache.

    Attributes:
        past: The input that takes it.
        present: The output that gives its next value.
        growing_axes: The axes of ``past`` whose size is the past's length; empty for a state of
            fixed size.
        neutral: In words: the value with which the later path is the first.
    """

    past: InputSpec
    present: OutputSpec
    growing_axes: tuple[int, ...]
    neutral: str


@dataclass(frozen=True)
class Condition:
    """A fact about sizes that a verdict needs, and the line that asked for it.

    Attributes:
        fact: A sympy Boolean in the size symbols.
        where: The user's line; None where no line asked.
        is_implied: Whether the region's name says it already: nothing is past on a first call, and
            no size is 0.
    """

    fact: Any
    where: SourceLine | None = None
    is_implied: bool = False

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether the fact holds at these sizes."""
        return bool(compiled(self.fact)(sizes))

    def __str__(self) -> str:
        return str(self.fact)


@dataclass(frozen=True)
class Region:
    """A part of the domain: all sizes at which its conditions hold.

    Attributes:
        name: ``"first call"`` or ``"later calls"``, with what singles it out.
        conditions: What must hold.
    """

    name: str
    conditions: tuple[Condition, ...] = ()

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether a call of these sizes is in the region."""
        return all(condition.holds(sizes) for condition in self.conditions)

    def __str__(self) -> str:
        told = [str(condition) for condition in self.conditions if not condition.is_implied]
        return f"{self.name}: {' and '.join(told) or 'every size'}"


@dataclass(frozen=True)
class Domain:
    """Where the verdict holds: the union of its regions, with what was fixed in all of them.

    Attributes:
        regions: The regions.
        fixed: What a call may not change, in words: flags, absent optional inputs, the mode.
    """

    regions: tuple[Region, ...]
    fixed: tuple[str, ...] = ()

    def holds(self, sizes: Mapping[str, int], *, is_first: bool | None = None) -> bool:
        """Whether a call of these sizes is inside.

        Args:
            sizes: The size of each symbol.
            is_first: Whether the cache is the neutral one; None where that is not known.
        """
        return any(region.holds(sizes) for region in self.regions_of(is_first))

    def regions_of(self, is_first: bool | None) -> tuple[Region, ...]:
        """The regions that a call may be in.

        A cache that grows tells by its length whether a call is the first one. One of fixed size
        does not; so a call that is given one is a later call.
        """
        return self.regions if is_first is None else self._regions[is_first]

    @functools.cached_property
    def _regions(self) -> tuple[tuple[Region, ...], tuple[Region, ...]]:
        """Those of later calls and of first ones."""
        is_told = any(
            isinstance(condition.fact, sympy.Eq) and condition.is_implied
            for region in self.regions
            for condition in region.conditions
        )
        if is_told:
            return self.regions, self.regions
        first = tuple(region for region in self.regions if region.name == FIRST_CALL)
        return tuple(region for region in self.regions if region.name != FIRST_CALL), first

    def __str__(self) -> str:
        return "\n".join([*map(str, self.regions), *self.fixed])


@dataclass(frozen=True)
class Interface:
    """What goes into the one graph and what comes out, flat and in order.

    Attributes:
        inputs: The placeholders of the graph.
        outputs: The tensors that the graph returns.
        cache: The cache slots, in the order of the inputs.
        domain: Where the verdict holds.
        crossing: Slots that one graph gives and another takes: an encoder's keys and values, which
            the encoder returns (``present``) and the decoder reads (``past``) and does not return.
        absent: Sizes of inputs that later calls leave out, as these calls have them.
        present: Sizes of what is computed of such inputs, as first calls have them.
    """

    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
    cache: tuple[CacheSlot, ...]
    domain: Domain
    crossing: tuple[CacheSlot, ...] = ()
    absent: Mapping[str, int] = field(default_factory=dict)
    present: Mapping[str, Any] = field(default_factory=dict)

    def of_call(self, sizes: Mapping[str, int], *, is_first: bool) -> dict[str, int]:
        """The sizes of a call, where later calls leave out what the first one is given."""
        if not is_first:
            return {**sizes, **self.absent}
        made = {name: int(compiled(size)(sizes)) for name, size in self.present.items()}
        return {**sizes, **made}

    @property
    def symbols(self) -> tuple[str, ...]:
        """The names of all size symbols, in order of first use."""
        found: dict[str, None] = {}
        for spec in self.inputs:
            for size in spec.shape:
                if isinstance(size, sympy.Basic):
                    found.update(dict.fromkeys(sorted(str(symbol) for symbol in size.free_symbols)))
        return tuple(found)

    @property
    def past_symbols(self) -> tuple[str, ...]:
        """The names of the symbols that measure what the cache holds."""
        found: dict[str, None] = {}
        for slot in self.cache:
            for axis in slot.growing_axes:
                found.update(
                    dict.fromkeys(
                        sorted(
                            str(symbol)
                            for symbol in sympy.sympify(slot.past.shape[axis]).free_symbols
                        )
                    )
                )
        return tuple(found)
