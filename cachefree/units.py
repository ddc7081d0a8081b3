"""How many rows of an input are one: samples of a patch, frames that a stride takes together.

A dimension whose size has to be a multiple, or of which a result keeps a fraction, is told by calls
on fake tensors that are longer by numbers with many divisors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import torch
from torch import nn

from cachefree.calls import Call, TensorSpec
from cachefree.dimensions import Dimension, resized
from cachefree.fake_runs import run_on_fakes

__all__ = ["with_units"]

_STEPS = (48, 60, 112, 960)
_Shapes = list[torch.Size] | None


def with_units(
    model: nn.Module, call: Call, groups: list[list[Dimension]]
) -> tuple[Call, list[list[Dimension]]]:
    """The call with the units of its dimensions, and the groups with those that vary in units.

    Args:
        model: Any module.
        call: A call that runs, with sizes that are numbers.
        groups: The dimensions that vary together.
    """
    grouped = {dim for group in groups for dim in group}
    alike: dict[tuple[int, int], list[Dimension]] = {}
    for place, leaf in enumerate(call.leaves):
        if isinstance(leaf, TensorSpec):
            for axis, size in enumerate(leaf.shape):
                if (place, axis) not in grouped and size > 1:
                    alike.setdefault((axis, size), []).append((place, axis))
    units: dict[Dimension, int] = {}
    more = []
    for group in (*groups, *alike.values()):
        unit = _unit(model, call, group)
        if unit is not None and unit > 1:
            units |= dict.fromkeys(group, unit)
            more += [group] if group[0] not in grouped else []
    return replace(call, units=units), [*groups, *more]


def _unit(model: nn.Module, call: Call, group: Sequence[Dimension]) -> int | None:
    """The fewest rows more that make every result longer by whole rows; None for no number."""
    start = {dim: _size(call, dim) for dim in group}

    def sizes(more: int) -> _Shapes:
        try:
            longer = resized(call, {dim: size + more for dim, size in start.items()})
            leaves, _ = run_on_fakes(model, longer, {})
        except Exception:  # noqa: BLE001 - a size that the model does not take is what is asked
            return None
        return [leaf.shape for leaf in leaves if isinstance(leaf, torch.Tensor)]

    own = sizes(0)
    for step in _STEPS if own is not None else ():
        grown = _grown(own, sizes(step), sizes(2 * step), step)
        if not grown:
            continue
        least = math.lcm(*(rate.denominator for rate in grown))
        return next(
            unit
            for unit in range(least, step + 1, least)
            if step % unit == 0 and _grown(own, sizes(unit), sizes(2 * unit), unit) == grown
        )
    return None


def _grown(one: _Shapes, two: _Shapes, three: _Shapes, rows: int) -> list[Fraction] | None:
    """By how much the results grow with each row of the input; None where steps differ."""
    if two is None or three is None or one is None:
        return None
    if not [*map(len, one)] == [*map(len, two)] == [*map(len, three)]:
        return None
    before, now, then = (list(itertools.chain(*shapes)) for shapes in (one, two, three))
    grown = [size - other for other, size in zip(before, now, strict=True)]
    again = [size - other for other, size in zip(now, then, strict=True)]
    return [Fraction(size, rows) for size in grown if size] if grown == again else None


def _size(call: Call, dim: Dimension) -> int:
    leaf = call.leaves[dim[0]]
    assert isinstance(leaf, TensorSpec)
    return int(leaf.shape[dim[1]])
