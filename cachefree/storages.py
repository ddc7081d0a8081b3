"""Tensors as their storage and the views that lead to them, and which views share elements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from cachefree.terms import Term

__all__ = ["Base", "Value", "Views", "are_apart", "sharing", "spoil", "storage_of"]

aten = torch.ops.aten
Views = tuple[tuple[fx.Node | None, Any, tuple[Any, ...]], ...]
"""The views that lead from a storage to a tensor: node, operator and its other arguments."""


@dataclass
class Base:
    """Storage: the value that it holds now, and how often it was written.

    A copy such as ``contiguous`` gives its operand itself where sizes of 1 leave nothing to move.
    `perhaps` are parts of this storage that are parts of others at such sizes, `spoiled` are parts
    with the write to what they are then.
    """

    term: Term
    version: int = 0
    perhaps: list[tuple[Views, Base, Views]] = field(default_factory=list)
    spoiled: list[tuple[Views, fx.Node]] = field(default_factory=list)


@dataclass
class Value:
    """A tensor: a base, the views from it, and the term as last read."""

    base: Base
    views: Views = ()
    term: Term | None = None
    version: int = 0
    storage: Any = field(default=None)


def spoil(written: Base, views: Views, node: fx.Node) -> None:
    """Marks what is a part of the written one at other sizes."""
    seen, pending = {id(written)}, [(written, views)]
    while pending:
        base, changed = pending.pop()
        for own, other, part in base.perhaps:
            if id(other) not in seen and not are_apart(own, changed):
                seen.add(id(other))
                other.spoiled.append((part, node))
                pending.append((other, part))


def are_apart(one: Views, other: Views) -> bool:
    """Whether two views of a storage share no element: other parts of one split."""
    for mine, theirs in zip(one, other, strict=False):
        if mine[0] is theirs[0]:
            continue
        if isinstance(mine[1], tuple) and isinstance(theirs[1], tuple):
            is_same_split = mine[1][1] is theirs[1][1]
            return bool(is_same_split and mine[1][3] != theirs[1][3])
        if mine[1] is not theirs[1] or mine[2][:1] != theirs[2][:1]:
            return False
        places = [part[2][1:3] for part in (mine, theirs)]
        if not all(isinstance(number, int) for place in places for number in place):
            return False
        if mine[1] is aten.select.int:
            return places[0] != places[1] and (places[0][0] < 0) == (places[1][0] < 0)
        if mine[1] is aten.slice.Tensor and all(n >= 0 for place in places for n in place):
            (start, end), (first, last) = places
            return bool(end <= first or last <= start)
        return False
    return False


def sharing(results: Sequence[Value], leaves: Mapping[Term, Base]) -> dict[int, list[int | Term]]:
    """What each result may share elements of memory with, where anything: places, and leaves.

    Args:
        results: The results of a path.
        leaves: Its inputs and attributes.
    """
    terms = {id(base): term for term, base in leaves.items()}
    of_base: dict[int, list[int]] = {}
    for place, value in enumerate(results):
        of_base.setdefault(id(value.base), []).append(place)
    found: dict[int, list[int | Term]] = {}
    for place, value in enumerate(results):
        others: list[int | Term] = [
            other
            for other in of_base[id(value.base)]
            if other != place and not are_apart(value.views, results[other].views)
        ]
        if id(value.base) in terms:
            others.append(terms[id(value.base)])
        if others:
            found[place] = others
    return found


def storage_of(example: Any) -> Any:
    """What tells the storage of a fake tensor; None where there is none."""
    return example.untyped_storage()._cdata if isinstance(example, torch.Tensor) else None
