"""Inputs of the first call alone: pictures or sounds before a text, which later calls leave out.

Such an input has a neutral element as the cache has one, on the calls that the cache has none:
no rows. One graph takes it always.

Before: ``x = cat([see(pictures), x], 1) if pictures is not None else x``.

After: ``x = cat([see(pictures), x], 1)``, with no pictures on later calls.

Why equal: the first path is the one graph where nothing is past. The path that later calls take
without the input is compared with the one graph where the input has no rows.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy

from cachefree.calls import Call, SizeSpec, TensorSpec
from cachefree.dimensions import Dimension
from cachefree.errors import Refusal, UnsupportedBranchError
from cachefree.inputs import CACHE_NAMES
from cachefree.sizes import symbols_of
from cachefree.structure import flatten

__all__ = ["absences", "argument_of", "choices", "fixed_inputs", "is_apart", "together", "without"]

_MOST_INPUTS = 4
_MOST_READINGS = 4


def choices(
    signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, ...]]:
    """Arguments of a first call that later calls may leave out, most at once first.

    Args:
        signature: The signature of the model's forward.
        args: Positional arguments of the first call.
        kwargs: Keyword arguments of the first call.
    """
    given = dict(zip(signature.parameters, args, strict=False)) | dict(kwargs)
    names = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.default is None
        and parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL)
        and not CACHE_NAMES.search(name)
        and flatten(given.get(name))[0]
    ]
    for count in range(min(len(names), _MOST_INPUTS), 0, -1):
        yield from itertools.combinations(names, count)


def without(
    args: tuple[Any, ...], kwargs: dict[str, Any], names: Mapping[int, str], absent: Sequence[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call without some arguments; those behind them are given by keyword.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        names: Position → parameter name.
        absent: The arguments that are left out.
    """
    start = next((place for place in range(len(args)) if names.get(place) in absent), len(args))
    named = {names[place]: args[place] for place in range(start, len(args))}
    kept = {**named, **kwargs}
    return args[:start], {name: value for name, value in kept.items() if name not in absent}


def is_apart(call: Call, absent: Sequence[str], dimensions: Sequence[Dimension]) -> bool:
    """Whether none of some dimensions is one of the arguments that are left out."""
    return not any(argument_of(call.leaves[place].path) in absent for place, _ in dimensions)


def argument_of(path: str) -> str:
    """The argument that a leaf is a part of."""
    return re.split(r"\W", path, maxsplit=1)[0]


def together(first: Call, later: Call, names: Mapping[int, str], absent: Sequence[str]) -> Call:
    """A later call that is given what the first one is given besides, behind all else.

    Args:
        first: The first call.
        later: A later call without some of its arguments.
        names: Position → parameter name.
        absent: These arguments.
    """
    args, kwargs = first.structure.rebuild(list(first.leaves))
    given = {names[place]: value for place, value in enumerate(args) if place in names} | kwargs
    args, kwargs = later.structure.rebuild(list(later.leaves))
    kwargs |= {name: given[name] for name in absent}
    leaves, structure = flatten((args, kwargs), _is_spec)
    return Call(structure, tuple(leaves), later.fixed)


def absences(
    call: Call, absent: Sequence[str], hints: Mapping[str, int]
) -> Iterator[dict[sympy.Symbol, int]]:
    """What the sizes of inputs that are left out could be, likeliest first: one of each is 0.

    Args:
        call: A call that is given these inputs.
        absent: The arguments.
        hints: Example sizes; those of other dimensions of such an input stay as they are.
    """
    beside = symbols_of(
        size for leaf in call.tensors if argument_of(leaf.path) not in absent for size in leaf.shape
    )
    rows: list[list[sympy.Symbol]] = []
    own: set[sympy.Symbol] = set()
    for leaf in call.tensors:
        if argument_of(leaf.path) in absent:
            rows.append([s for s in leaf.shape if isinstance(s, sympy.Symbol) and s not in beside])
            own |= symbols_of(leaf.shape) - beside
    for chosen in itertools.islice(itertools.product(*rows), _MOST_READINGS):
        yield {symbol: 0 if symbol in chosen else hints[str(symbol)] for symbol in own}


def fixed_inputs(absent: Sequence[str]) -> UnsupportedBranchError:
    """The refusal of inputs that cannot be empty: each has to have a size of its own."""
    told = " and ".join(absent)
    return UnsupportedBranchError(
        Refusal(
            f"Later calls leave {told} out, which has no size of its own that could be 0.",
            why="One graph takes the same inputs at every call; what a call leaves out has no rows "
            "there.",
            remedy="Let the model take what it computes of it, of any number of rows; or rewrite "
            "with example_inputs without it.",
        )
    )


def _is_spec(value: Any) -> bool:
    return isinstance(value, (TensorSpec, SizeSpec))
