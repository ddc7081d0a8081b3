"""Cache slots that the first call fills for good: an encoder's keys and values.

The first path computes such a slot, the later path takes it and hands it on as it is. One graph
joins what is past with what the first path computes of the rows that are not in it yet.

Before: ``k = past if past is not None else project(states)``.

After: ``k = cat([past, project(states[:, len(past):])])``.

Why equal: the slot is empty on the first call, so that all rows are projected and the join is
``project(states)``; it holds all rows on later calls, so that none is projected and the join is
``past``. Other lengths do not occur: they are outside the domain. So nothing is asked of
``project``, not even that its rows are independent of one another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch

from cachefree.align import Divergence
from cachefree.capture import Call, TensorSpec
from cachefree.discover import Discovery
from cachefree.reading import Program
from cachefree.rules import Closing, replaced
from cachefree.shapes import Signatures
from cachefree.sizes import size_symbol, substitute, symbols_of
from cachefree.terms import Table, Term, replace_operands, topological

__all__ = ["OneCall", "with_slots_joined"]

aten = torch.ops.aten


@dataclass(frozen=True)
class OneCall:
    """What the one graph is made from: the later path, its write-once slots joined.

    Attributes:
        call: How the one graph is called.
        inputs: Its inputs.
        outputs: Its outputs.
        ties: Sizes of the one graph's inputs that are, on later calls, sizes of other inputs.
        closings: What was joined.
    """

    call: Call
    inputs: tuple[Term, ...]
    outputs: tuple[Term, ...]
    ties: Mapping[sympy.Symbol, Any]
    closings: tuple[Closing, ...] = ()


class _WriteOnce:
    name = "cross-attention reuse"
    neutral = "zero length on the encoder's axis"

    def edit(self, site: Any) -> None:
        """Not asked: the slots are found by what the later path returns."""


@dataclass(frozen=True)
class _Slot:
    past: Term
    value: Term  # what the first call puts there
    axis: int
    length: sympy.Symbol


def with_slots_joined(
    table: Table, discovery: Discovery, first: Program, later: Program
) -> OneCall:
    """The later path with every slot joined that the first call fills for good."""
    slots = list(_slots(discovery, first, later))
    if not slots:
        return OneCall(discovery.later, later.inputs, later.outputs, {})
    ties = {slot.length: slot.value.sizes[slot.axis] for slot in slots}
    past = {slot.past: _past_input(table, slot) for slot in slots}
    joined = {slot.past: _joined(table, slot, past[slot.past]) for slot in slots}
    outputs = replaced(table, later.outputs, joined)
    shapes = {str(old.args[0]): new.sizes for old, new in past.items()}
    call = Call(
        discovery.later.structure,
        tuple(
            replace(leaf, shape=shapes[leaf.path])
            if isinstance(leaf, TensorSpec) and leaf.path in shapes
            else leaf
            for leaf in discovery.later.leaves
        ),
    )
    closed = tuple(Divergence(slot.past, slot.value) for slot in slots)
    return OneCall(
        call,
        tuple(past.get(term, term) for term in later.inputs),
        outputs,
        ties,
        (Closing(_WriteOnce(), outputs, closed),),
    )


def _slots(discovery: Discovery, first: Program, later: Program) -> Iterator[_Slot]:
    lengths: dict[Any, sympy.Symbol] = {}
    for place, output in zip(discovery.cache_leaves, discovery.carried, strict=True):
        past, value = later.inputs[place], first.outputs[output]
        if later.outputs[output] is not past or past.shape != value.shape:
            continue
        axis = _axis(value)
        if axis is None:
            continue
        size = value.sizes[axis]
        if size not in lengths:
            lengths[size] = _length_symbol(size, lengths)
        yield _Slot(past, value, axis, lengths[size])


def _axis(value: Term) -> int | None:
    """The axis to join along: one that varies with the encoder's length; else one of its rows."""
    batch = size_symbol("batch")
    varying = [
        axis
        for axis, size in enumerate(value.sizes)
        if isinstance(size, sympy.Basic) and size.free_symbols - {batch}
    ]
    if varying:
        return varying[0]
    rows = {
        size
        for term in topological([value])
        if term.op == "input"
        for size in term.sizes[1:-1]
        if isinstance(size, int)
    }
    fixed = [axis for axis, size in enumerate(value.sizes) if isinstance(size, int) and size > 0]
    return next((axis for axis in fixed if value.sizes[axis] in rows), None)


def _length_symbol(size: Any, taken: Mapping[Any, sympy.Symbol]) -> sympy.Symbol:
    name = f"past_{size}" if isinstance(size, sympy.Symbol) else "past_memory"
    while size_symbol(name) in taken.values():
        name += "_"
    return size_symbol(name)


def _past_input(table: Table, slot: _Slot) -> Term:
    old = slot.past
    shape = (*old.sizes[: slot.axis], slot.length, *old.sizes[slot.axis + 1 :])
    assert old.dtype is not None
    assert old.device is not None
    return table.input(str(old.args[0]), shape, old.dtype, old.device)


def _joined(table: Table, slot: _Slot, past: Term) -> Term:
    new = _of_rows_left(table, slot)
    shape = list(past.sizes)
    shape[slot.axis] = sympy.expand(slot.length + new.sizes[slot.axis])
    return table.like(slot.value, aten.cat.default, ((past, new), slot.axis), shape)


def _of_rows_left(table: Table, slot: _Slot) -> Term:
    """What the first path computes of the encoder's rows that are not past yet.

    Where it does not run on no rows, or where its length is not theirs, all of it is computed and
    then cut.
    """
    rows = slot.value.sizes[slot.axis]
    if isinstance(rows, sympy.Symbol):
        value = _of_fewer(table, slot.value, rows, slot.length)
        if value is not None:
            none = {
                str(s): 3 for term in topological([value]) for s in symbols_of(term.shape or ())
            }
            none |= {str(rows): 3, str(slot.length): 3}
            if Signatures([value]).hold(none):
                return value
    return _cut(table, slot.value, slot.axis, slot.length, rows)


def _runs_on_no_rows(value: Term) -> bool:
    symbols = symbols_of(size for term in topological([value]) for size in term.shape or ())
    return Signatures([value]).hold({str(symbol): 3 for symbol in symbols})


def _cut(table: Table, term: Term, axis: int, start: Any, end: Any) -> Term:
    shape = list(term.sizes)
    shape[axis] = sympy.expand(end - start)
    return table.like(term, aten.slice.Tensor, (term, axis, start, end, 1), shape)


def _of_fewer(table: Table, value: Term, rows: sympy.Symbol, past: sympy.Symbol) -> Term | None:
    """The value with the first rows left out of every input that has them; None if none has."""
    fewer = {rows: rows - past}
    done: dict[Term, Term] = {}
    for term in topological([value]):
        if term.op == "input":
            axes = [axis for axis, size in enumerate(term.sizes) if size == rows]
            if len(axes) > 1 or (not axes and rows in symbols_of(term.sizes)):
                return None
            done[term] = _cut(table, term, axes[0], past, rows) if axes else term
        else:
            done[term] = _with_sizes(table, term, fewer, done)
    return done[value] if done[value] is not value else None


def _with_sizes(
    table: Table, term: Term, sizes: Mapping[sympy.Symbol, Any], done: Mapping[Term, Term]
) -> Term:
    def of(arg: Any) -> Any:
        return done[arg] if isinstance(arg, Term) else substitute(arg, sizes)

    payload = term.payload
    if term.shape is None and payload is not None:
        payload = tuple(
            (tuple(substitute(size, sizes) for size in shape), dtype, device)
            for shape, dtype, device in payload
        )
    shape = None if term.shape is None else [substitute(size, sizes) for size in term.shape]
    args = replace_operands(term.args, of)
    return table.make(term.op, args, shape, term.dtype, term.device, term.line, payload)
