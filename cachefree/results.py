"""What a call gives and leaves besides the values of tensors: containers, numbers, writes.

Terms stand for the tensors of a result. All else that a caller sees is compared here: how the
result is put together, its flags, texts and sizes, the dtype of its tensors, and that a call leaves
nothing behind.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import sympy
from sympy.logic.boolalg import Boolean

from cachefree.calls import SizeSpec, TensorSpec
from cachefree.capture import Captured
from cachefree.errors import Refusal, SourceLine
from cachefree.facts import Facts
from cachefree.reading import Program
from cachefree.sizes import substitute
from cachefree.structure import Structure
from cachefree.terms import Term

__all__ = ["is_same_result", "other_result", "refusal_of_result", "writes_of"]

Known = Mapping[sympy.Symbol, Any]
_SEQUENCES = ("tuple", "list")


def is_same_result(one: Program, other: Program) -> bool:
    """Whether two paths give the same, value for value, and the other one leaves nothing behind."""
    return (
        one.outputs == other.outputs
        and other_result(one.captured, other.captured, Facts(()), {}) is None
        and not other.captured.changes
        and one.written == other.written
    )


def other_result(
    one: Captured,
    own: Captured,
    facts: Facts,
    sizes: Known,
    cache: Collection[int] = (),
) -> str | None:
    """Where the results of two paths differ in what is no value of a tensor; None where nowhere.

    Lists and tuples stand for one another in the cache, which the caller hands on as it is.

    Args:
        one: The path whose result is given.
        own: The path whose result is due.
        facts: What holds of the sizes.
        sizes: Sizes to substitute in both.
        cache: Places of the cache's tensors among those of the result.
    """
    # a part that differs ends the walk, so that both go through the same places
    for (path, given), (_, due) in zip(_parts(one, cache), _parts(own, cache), strict=False):
        if not _is_same(given, due, facts, sizes):
            return f"{path} is {_words(due, sizes)} where {_words(given, sizes)} is expected"
    return None


def writes_of(
    program: Program, returned: Callable[[Term], list[Term]]
) -> list[tuple[Term, SourceLine | None]]:
    """What a path writes to, with its line, other than to give the next value of a cache tensor.

    Args:
        program: The path.
        returned: The values that a path returns as the next ones of an input.
    """
    return [
        (term, value.line) for term, value in program.written.items() if value not in returned(term)
    ]


def refusal_of_result(
    kind: str,
    one: Captured,
    own: Program,
    facts: Facts,
    sizes: Known,
    cache: Collection[int],
    returned: Callable[[Term], list[Term]],
) -> Refusal | None:
    """Why a path of the model is not served by a graph with this result; None where it may be.

    Args:
        kind: Which call it is, in words.
        one: The path whose result the graph has.
        own: The model's own path.
        facts: What holds of the sizes.
        sizes: Sizes to substitute in both.
        cache: Places of the cache's tensors among those of the result.
        returned: The values that the path returns as the next ones of an input.
    """
    problem = other_result(one, own.captured, facts, sizes, cache)
    if problem is not None:
        return Refusal(
            f"The {kind} returns something else at some sizes: {problem}.",
            why="One graph has one result: its containers, numbers and flags are the same at "
            "every call, and its sizes one expression of those of the inputs.",
            remedy="Return the same structure, and the same sizes and flags, from all paths.",
        )
    for change in own.captured.changes:
        return Refusal(
            f"The model keeps state on itself at some sizes: forward sets {change.path!r}.",
            why="What a call leaves on the module changes the next call; a graph has no memory.",
            remedy="Pass it in and return it, as an argument of forward.",
        )
    for term, line in writes_of(own, returned):
        return Refusal(
            f"The model writes in place to {term.args[0]!r} at some sizes.",
            why="A graph neither changes its inputs nor its buffers.",
            remedy="Return the new value instead.",
            where=line,
        )
    return None


class _Container:
    """A tuple, list, mapping or object, by what has to be the same of it."""

    def __init__(self, structure: Structure, *, is_cache: bool) -> None:
        is_sequence = is_cache and structure.kind in _SEQUENCES
        self.mark = (
            "sequence" if is_sequence else structure.kind,
            None if is_sequence else structure.cls,
            structure.keys,
        )
        self.words = structure.describe()


def _parts(captured: Captured, cache: Collection[int]) -> Iterator[tuple[str, Any]]:
    """Every container, constant, tensor and size of a result, with its path, from the outside."""
    places = itertools.count()
    are_cache = [
        isinstance(leaf, SizeSpec) or next(places) in cache for leaf in captured.output_leaves
    ]

    def below(structure: Structure, path: str, start: int) -> Iterator[tuple[str, Any]]:
        if structure.kind == "leaf":
            yield path, captured.output_leaves[start]
        elif structure.kind == "constant":
            yield path, structure
        else:
            is_cache = all(are_cache[start : start + structure.leaf_count])
            yield path, _Container(structure, is_cache=is_cache)
            for key, child in zip(structure.keys, structure.children, strict=True):
                yield from below(child, f"{path}[{key!r}]", start)
                start += child.leaf_count

    return below(captured.outputs, "the result", 0)


def _is_same(given: Any, due: Any, facts: Facts, sizes: Known) -> bool:
    if isinstance(given, _Container) and isinstance(due, _Container):
        return given.mark == due.mark
    if isinstance(given, TensorSpec) and isinstance(due, TensorSpec):
        return given.dtype == due.dtype and len(given.shape) == len(due.shape)
    if isinstance(given, Structure) and isinstance(due, Structure):
        return given.difference(due) is None
    if isinstance(given, (SizeSpec, Structure)) and isinstance(due, (SizeSpec, Structure)):
        return _is_same_number(_number(given, sizes), _number(due, sizes), facts)
    return False


def _number(part: SizeSpec | Structure, sizes: Known) -> Any:
    return substitute(part.expr, sizes) if isinstance(part, SizeSpec) else part.value


def _is_same_number(one: Any, other: Any, facts: Facts) -> bool:
    """Whether two numbers or flags, of which one at least follows from sizes, are the same."""
    kinds = {_kind(value) for value in (one, other)}
    if len(kinds) != 1 or None in kinds:
        return False
    if kinds == {"flag"}:
        one, other = sympy.sympify(one), sympy.sympify(other)
        return bool(
            one == other
            or facts.holds(sympy.And(sympy.Or(one, sympy.Not(other)), sympy.Or(other, ~one)))
        )
    if kinds == {"integer"}:
        return facts.equal(one, other)
    return bool(sympy.sympify(one) == sympy.sympify(other))


def _kind(value: Any) -> str | None:
    if isinstance(value, (bool, Boolean)):
        return "flag"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "fraction"
    if isinstance(value, sympy.Basic):
        return "integer" if value.is_integer else "fraction"
    return None


def _words(part: Any, sizes: Known) -> str:
    if isinstance(part, TensorSpec):
        return f"a tensor of {part.dtype} and rank {len(part.shape)}"
    if isinstance(part, SizeSpec):
        return str(_number(part, sizes))
    return str(part.words) if isinstance(part, _Container) else str(part.describe())
