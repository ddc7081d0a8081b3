"""How the results of a first call become inputs of a later one."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import sympy

from cachefree.calls import Call, SizeSpec, TensorSpec
from cachefree.capture import Captured
from cachefree.dimensions import resized
from cachefree.example_sizes import PAST
from cachefree.facts import Facts
from cachefree.first_only import without
from cachefree.places import select
from cachefree.search import Found
from cachefree.sizes import size_symbol, substitute, symbols_of
from cachefree.structure import flatten, leaf_paths

__all__ = ["LaterCall", "Mark", "is_mark", "later_call"]


@dataclasses.dataclass(frozen=True)
class Mark:
    """A leaf of a call or of its result.

    Attributes:
        spec: What it is.
        output: Which tensor of the first call's result it is; None for an input.
    """

    spec: TensorSpec | SizeSpec
    output: int | None = None


@dataclasses.dataclass(frozen=True)
class LaterCall:
    """A later call that is given a first call's cache.

    Attributes:
        call: How the model is called.
        cache_leaves: Which of its tensors are the cache.
        carried: Which tensors of the first call's result they are.
        lengths: The symbol of each length of what is past → what a first call makes it of.
    """

    call: Call
    cache_leaves: tuple[int, ...]
    carried: tuple[int, ...]
    lengths: dict[str, Any]


def later_call(
    names: Mapping[int, str],
    found: Found,
    first: Call,
    path: Captured,
    facts: Facts,
    *,
    has_own_rows: bool = True,
) -> LaterCall:
    """The later call.

    Args:
        names: The model's parameters, by place.
        found: Which argument carries the cache, and what feeds it.
        first: The first call.
        path: The path that it takes.
        facts: What holds of its sizes.
        has_own_rows: Whether rows before those of the tokens are the cache's own, or else the first
            call's.
    """
    tensors = itertools.count()
    marks = [
        Mark(leaf, next(tensors) if isinstance(leaf, TensorSpec) else None)
        for leaf in path.output_leaves
    ]
    result = path.outputs.rebuild(marks)
    total = {
        (place, axis): sympy.sympify(size_symbol("past") + size_symbol("query"))
        for place, axis in found.total
    }
    whole = resized(dataclasses.replace(first, units=found.call.units), total)
    args, kwargs = first.structure.rebuild([Mark(leaf) for leaf in whole.leaves])
    args, kwargs = without(args, kwargs, names, found.absent)
    parts = [flatten(select(result, link.selector), is_mark) for link in found.links]
    cache = _Cache(found, facts, [mark for leaves, _ in parts for mark in leaves], has_own_rows)
    for link, (leaves, structure) in zip(found.links, parts, strict=True):
        paths = leaf_paths(structure, link.place.path)
        given = [cache.given(mark, path_) for mark, path_ in zip(leaves, paths, strict=True)]
        args, kwargs = link.place.put(args, kwargs, structure.rebuild(given))
    for count in found.counts if cache.length is not None else ():
        args, kwargs = count.place.put(args, kwargs, Mark(SizeSpec(count.name, cache.length)))
    later, structure = flatten((args, kwargs), is_mark)
    outputs = [mark.output for mark in later if isinstance(mark.spec, TensorSpec)]
    return LaterCall(
        Call(structure, tuple(mark.spec for mark in later), first.fixed),
        tuple(place for place, output in enumerate(outputs) if output is not None),
        tuple(output for output in outputs if output is not None),
        {str(symbol): expr for expr, symbol in cache.lengths.items()},
    )


class _Cache:
    """How tensors of the result are given to a later call.

    What grew with the call's sizes gets a size of its own; where the cache counts its tokens
    besides, every size follows from the count.

    Attributes:
        lengths: What a first call makes a length of → its symbol.
    """

    def __init__(self, found: Found, facts: Facts, marks: list[Mark], has_own_rows: bool) -> None:
        self.lengths: dict[Any, Any] = {}
        self._found = found
        self._facts = facts
        self._has_own_rows = has_own_rows
        self._places = itertools.count()
        query = size_symbol("query")
        counts = [mark.spec.expr for mark in marks if isinstance(mark.spec, SizeSpec)]
        self._is_counted = query in counts or bool(
            found.counts and all(_is_told_by(mark.spec) for mark in marks)
        )
        if self._is_counted:
            self.lengths[query] = size_symbol("past")

    @property
    def length(self) -> Any:
        """How much is past; None where no size tells."""
        return self.lengths.get(size_symbol("query"), self.lengths.get(sympy.Integer(PAST)))

    def given(self, mark: Mark, path: str) -> Mark:
        """A leaf of the cache as an input."""
        if isinstance(mark.spec, SizeSpec):
            return Mark(SizeSpec(path, self._past(mark.spec.expr)), mark.output)
        place = next(self._places)
        axes = {axis for grown, axis in self._found.grown if grown == place}
        # the last row of at least one is one row: sizes as they are where none is 0
        shape = [self._past(self._facts.simplified(size)) for size in mark.spec.shape]
        for axis in axes:  # a row for each call
            shape[axis] = self.lengths.setdefault(sympy.Integer(PAST), size_symbol("past"))
        spec = TensorSpec(path, tuple(shape), mark.spec.dtype, mark.spec.device)
        return Mark(spec, mark.output)

    def _past(self, size: Any) -> Any:
        """The length of what is past, for a size that a first call makes of its tokens."""
        if self._is_counted:
            return substitute(size, self.lengths)
        query = size_symbol("query")
        if not isinstance(size, sympy.Basic) or query not in size.free_symbols:
            return size
        if size in self.lengths:
            return self.lengths[size]
        rows = size - query
        if self._has_own_rows and rows.is_Integer and rows > 0:
            return self._past(query) + rows
        if size != query and size.has(size_symbol("batch")):
            # a product with the batch, such as B·P rows: rename inside
            return substitute(size, {query: self._past(query)})
        self.lengths[size] = size_symbol(self._name(size == query))
        return self.lengths[size]

    def _name(self, is_of_tokens: bool) -> str:
        taken = {str(symbol) for symbol in self.lengths.values()}
        name = "past" if is_of_tokens or "past" not in taken else "past_window"
        while name in taken:
            name += "_"
        return name


def is_mark(value: Any) -> bool:
    """Whether a value is a `Mark`."""
    return isinstance(value, Mark)


def _is_told_by(spec: TensorSpec | SizeSpec) -> bool:
    """Whether each size that the tokens have a part in tells how many they are: 3n, n + 4."""
    query = size_symbol("query")
    sizes = spec.shape if isinstance(spec, TensorSpec) else (spec.expr,)
    own = [size for size in sizes if query in symbols_of([size])]
    return all(sympy.diff(size, query).is_Integer for size in own)
