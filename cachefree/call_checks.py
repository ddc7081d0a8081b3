"""What a call's tensors have to be, and how a call that does not fit is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from cachefree.calls import TensorSpec
from cachefree.errors import DomainError, Refusal
from cachefree.sizes import preimage
from cachefree.structure import MismatchError

__all__ = [
    "Check",
    "check_numbers",
    "check_type",
    "is_told_twice",
    "mismatch",
    "mismatch_of",
    "missing",
    "missing_flag",
    "refuse_no_batch",
    "solved",
    "unlike",
    "wrong_count",
    "wrong_size",
]


@dataclass(slots=True)
class Check:
    """What one tensor of a call has to be.

    Attributes:
        place: Among the leaves.
        spec: As it was captured.
        numbers: Axes of a constant size.
        symbols: Axes whose size is a symbol.
        expressions: Axes whose size is made of symbols.
        kind: Equal for tensors of one argument that have to be alike.
    """

    place: int
    spec: TensorSpec
    numbers: list[tuple[int, int]]
    symbols: list[tuple[int, str]]
    expressions: list[tuple[int, Any]]
    kind: int = 0

    @classmethod
    def of(cls, place: int, spec: TensorSpec) -> Check:
        """What the tensor at a place among the leaves has to be."""
        sizes = list(enumerate(spec.shape))
        return cls(
            place,
            spec,
            [(axis, size) for axis, size in sizes if isinstance(size, int)],
            [(axis, size.name) for axis, size in sizes if isinstance(size, sympy.Symbol)],
            [(axis, s) for axis, s in sizes if not isinstance(s, (int, sympy.Symbol))],
        )


def unlike(pairs: Sequence[tuple[Check, Any]]) -> list[tuple[Check, Any]]:
    """The tensors of a call without those that are like an earlier one of their kind."""
    found = []
    first: dict[int, torch.Tensor] = {}
    for check, leaf in pairs:
        like = first.get(check.kind)
        if (
            like is not None
            and isinstance(leaf, torch.Tensor)
            and leaf.shape == like.shape
            and leaf.dtype is like.dtype
            and leaf.device == like.device
        ):
            continue
        if like is None and isinstance(leaf, torch.Tensor):
            first[check.kind] = leaf
        found.append((check, leaf))
    return found


def is_told_twice(pairs: Sequence[tuple[Check, Any]], symbol: sympy.Symbol) -> bool:
    """Whether several expressions hold a symbol, so that one alone does not settle it."""
    held = {expr for check, _ in pairs for _, expr in check.expressions}
    return sum(symbol in expr.free_symbols for expr in held) > 1


def solved(expr: Any, symbol: sympy.Symbol, sizes: Mapping[str, int], size: int) -> int | None:
    """The symbol's value where the expression is a size, with the others known."""
    if not sympy.diff(expr, symbol).is_Integer:
        return preimage(expr, symbol, sizes, size)
    known = {s: sizes[str(s)] for s in expr.free_symbols - {symbol}}
    rest = size - expr.subs({**known, symbol: 0})
    return max(0, int(rest // sympy.diff(expr, symbol)))


def check_type(leaf: Any, spec: TensorSpec) -> None:
    """Refuses what is no tensor of the rank and dtype.

    Raises:
        DomainError: it is not.
    """
    if not isinstance(leaf, torch.Tensor):
        kind = f"{type(leaf).__name__} {leaf!r}"
        raise DomainError(mismatch(f"{spec.path} is {kind} where a tensor is expected"))
    if leaf.dim() != len(spec.shape):
        shape = ", ".join(map(str, spec.shape))
        raise DomainError(
            mismatch(f"{spec.path} has rank {leaf.dim()} where ({shape}) is expected")
        )
    if leaf.dtype != spec.dtype:
        raise DomainError(mismatch(f"{spec.path} is {leaf.dtype} where {spec.dtype} is expected"))


def check_numbers(check: Check, shape: torch.Size) -> None:
    """Refuses a tensor whose constant sizes are others.

    Raises:
        DomainError: they are.
    """
    for axis, size in check.numbers:
        if shape[axis] != size:
            raise DomainError(wrong_size(check.spec, axis, shape[axis], str(size)))


def wrong_size(spec: TensorSpec, axis: int, size: int, expected: str) -> Refusal:
    """The refusal of a tensor of another size."""
    shape = ", ".join(map(str, spec.shape))
    return mismatch(
        f"{spec.path} has size {size} on axis {axis} where {expected} is expected; its shape is "
        f"({shape})"
    )


def missing(name: str) -> Refusal:
    """The refusal of a call without an argument."""
    return Refusal(
        f"The argument {name!r} is missing.",
        why="The graph was captured with it: whether it is given chooses a path of the "
        "model's code.",
        remedy=f"Give {name!r}, or rewrite again with example_inputs that leave it out.",
    )


def missing_flag(name: str, value: Any) -> Refusal:
    """The refusal of a call without a flag that is another one than the model's default."""
    return Refusal(
        f"The argument {name!r} is missing.",
        why=f"The graph was captured with {name}={value!r}, which is not what the model takes "
        "where it is left out.",
        remedy=f"Give {name}={value!r}, or rewrite again with example_inputs that leave it out.",
    )


def refuse_no_batch(size: object) -> None:
    """Refuses what is no size of a batch.

    Raises:
        DomainError: it is none.
    """
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise DomainError(
            Refusal(f"batch_size={size!r} is no size of a batch.", remedy="Give 0 or more.")
        )


def wrong_count(name: str, given: Any, due: int) -> Refusal:
    """The refusal of a number of past tokens that is another one than the cache holds."""
    return Refusal(
        f"{name} is {given!r} where the cache holds {due!r}.",
        why="The model was rewritten as one whose calls follow one another.",
        remedy=f"Pass {name}={due!r}; for a new sequence, leave the cache out.",
    )


def mismatch(what: str) -> Refusal:
    """The refusal of a call that does not fit."""
    text = what.replace("['", "", 1).replace("']", "", 1) if what.startswith("['") else what
    return Refusal(
        f"{text}.",
        why="The graph was captured for arguments of one structure, and was shown to equal the "
        "model for these.",
        remedy="Call it as the model was called in example_inputs, or rewrite again with such "
        "inputs.",
    )


def mismatch_of(error: MismatchError) -> Refusal:
    """Of an object of another class, such as a cache that holds its tensors in another way."""
    if error.classes is None:
        return mismatch(str(error))
    given, expected = (cls.__name__ for cls in error.classes)
    where = str(error).split(" is ", 1)[0].replace("['", "", 1).replace("']", "", 1)
    return Refusal(
        f"{where} is a {given} where a {expected} is expected.",
        why=f"The graph takes what the model gave when it was captured. A {given} may hold its "
        "tensors, or count them, in another way: a preallocated one does not tell by its size how "
        "much of it is filled.",
        remedy="Leave the cache out of the first call, or start from rewritten.empty_cache(); or "
        f"rewrite with example_inputs of a later call that hold a {given}, if the model returns "
        "one.",
    )
