"""Whether a path returns the same numbers, flags and containers where its sizes are numbers.

``type(n).__name__``, or ``n // 0.1``, may be something else of a symbol than of a number, and no
call of torch shows it where it is only returned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from cachefree.errors import CaptureError, Refusal
from cachefree.sizes import compiled, expression, symbols_of
from cachefree.structure import Structure

__all__ = ["refuse_another_result"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type, torch.dtype)


def refuse_another_result(
    leaves: Sequence[Any], structure: Structure, plain: Structure, sizes: Mapping[str, int]
) -> None:
    """Compares what a path returned while it was captured with what it returns of numbers.

    Args:
        leaves: Tensors and symbolic numbers, as they were captured.
        structure: What they are in.
        plain: The result with numbers; its leaves are tensors.
        sizes: The number that each symbol stands for.

    Raises:
        CaptureError: they differ.
    """
    problem = next(_differences(iter(leaves), structure, plain, sizes, "the result"), None)
    if problem is not None:
        raise CaptureError(
            Refusal(
                f"The model returns something else when its sizes are symbols than when they are "
                f"numbers: {problem}.",
                why="One graph is captured of symbols. Code that asks for the class of a size, or "
                "rounds numbers that are computed of sizes, does this.",
                remedy="Return sizes as they are, or compute them with tensors.",
            )
        )


def _differences(
    leaves: Iterator[Any],
    structure: Structure,
    plain: Structure,
    sizes: Mapping[str, int],
    path: str,
) -> Iterator[str]:
    if structure.kind == "leaf":
        value = next(leaves)
        if isinstance(value, torch.Tensor):
            if plain.kind != "leaf":
                yield f"{path} is {plain.describe()} instead of a tensor"
        elif plain.kind != "constant" or not _is_same_number(value, plain.value, sizes):
            yield f"{path} is {plain.describe()} instead of {value}"
    elif structure.kind == "constant":
        one, other = structure.value, plain.value
        if plain.kind != "constant" or not _is_same_constant(one, other):
            yield f"{path} is {plain.describe()} instead of {structure.describe()}"
    elif (structure.kind, structure.cls, structure.keys) != (plain.kind, plain.cls, plain.keys):
        yield f"{path} is {plain.describe()} instead of {structure.describe()}"
    else:
        for key, child, other in zip(
            structure.keys, structure.children, plain.children, strict=True
        ):
            yield from _differences(leaves, child, other, sizes, f"{path}[{key!r}]")


def _is_same_constant(one: Any, other: Any) -> bool:
    """Whether two constants are the same, as far as they are plain ones."""
    if not isinstance(one, _PLAIN) and not isinstance(other, _PLAIN):
        return True
    return type(one) is type(other) and repr(one) == repr(other)


def _is_same_number(symbolic: Any, plain: Any, sizes: Mapping[str, int]) -> bool:
    expr = expression(symbolic)
    if not {str(symbol) for symbol in symbols_of([expr])} <= sizes.keys():
        return True  # a token's place in a loop
    value = compiled(expr)(sizes)
    if isinstance(value, float) and isinstance(plain, float):
        return math.isclose(value, plain, rel_tol=1e-12)
    return type(value) is type(plain) and bool(value == plain)
