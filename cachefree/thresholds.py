"""Values at which a program may do something else: zeros, and the numbers that it compares with.

Random numbers of about the size of 1 meet neither a row of zeros, which code takes for padding,
nor ``x > 25``, ``x.clamp(max=60)`` or ``ids == 50256``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from cachefree.terms import Term, topological

__all__ = ["enlarged", "named_numbers", "varied"]

_COMPARES = (
    *("gt", "lt", "ge", "le", "eq", "ne", "clamp", "clamp_min", "clamp_max", "clip"),
    *("hardtanh", "hardshrink", "softshrink", "threshold", "relu6", "maximum", "minimum", "where"),
    *("isin", "bucketize", "searchsorted"),
)
_LARGEST = 1e6
_RARE = 4
_Values = Mapping[str, torch.Tensor]


def named_numbers(outputs: Sequence[Term]) -> tuple[float, ...]:
    """The numbers that some programs compare values with.

    Args:
        outputs: Of the programs.
    """
    found: dict[float, None] = {}
    for term in topological(outputs):
        if term.name.split(".")[0] in _COMPARES:
            for arg in term.args:
                for number in _numbers_of(arg):
                    if math.isfinite(number) and 0 < abs(number) <= _LARGEST:
                        found[number] = None
    return tuple(found)


def _numbers_of(arg: Any) -> tuple[float, ...]:
    if isinstance(arg, Term):
        if arg.op == "constant" and arg.payload.numel() <= _RARE and not arg.payload.is_complex():
            return tuple(map(float, arg.payload.flatten().tolist()))
        arg = arg.args[1] if arg.op == "full" else None
    is_number = isinstance(arg, (int, float)) and not isinstance(arg, bool)
    return (float(arg),) if is_number else ()


def varied(
    values: _Values,
    numbers: Sequence[float],
    rows: Mapping[str, int],
    generator: torch.Generator,
) -> Iterator[dict[str, torch.Tensor]]:
    """The inputs of a program once more: with rows of zeros, and about as large as some numbers.

    Args:
        values: The inputs, by path.
        numbers: The numbers.
        rows: How many integers an input may hold, where a table tells.
        generator: Of the random numbers.
    """
    yield {path: _with_zeros(value, generator) for path, value in values.items()}
    for number in numbers:
        yield {
            path: _near(value, number, rows.get(path), generator) for path, value in values.items()
        }


def enlarged(
    weights: _Values, number: float, kept: Collection[str], generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Weights of which some elements are a number of times as large.

    Args:
        weights: By name.
        number: The number.
        kept: Names of those that keep their values, as integers do.
        generator: Of the random numbers.
    """
    return {
        name: value
        if name in kept or not value.is_floating_point()
        else _near(value, number, None, generator)
        for name, value in weights.items()
    }


def _with_zeros(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    chosen = _chosen(value.shape[:-1] if value.is_floating_point() else value.shape, generator)
    return torch.where(chosen[..., None] if value.is_floating_point() else chosen, 0, value).to(
        value.dtype
    )


def _near(
    value: torch.Tensor, number: float, rows: int | None, generator: torch.Generator
) -> torch.Tensor:
    """With some elements about as large as a number; of integers, the number itself and beside."""
    if value.is_floating_point():
        return torch.where(_chosen(value.shape, generator), value * number, value).to(value.dtype)
    if value.dtype == torch.bool or value.is_complex() or number % 1:
        return value
    beside = torch.randint(-1, 2, value.shape, generator=generator) + int(number)
    is_fit = (beside >= 0) & (beside < (rows or torch.iinfo(value.dtype).max))
    return torch.where(_chosen(value.shape, generator) & is_fit, beside, value).to(value.dtype)


def _chosen(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, _RARE, tuple(shape), generator=generator) == 0
