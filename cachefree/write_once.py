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

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch

from cachefree.align import Divergence
from cachefree.calls import Call, TensorSpec
from cachefree.discover import Discovery
from cachefree.encoder import STATES, Encoder, bottleneck, is_needed_whole
from cachefree.facts import Facts
from cachefree.reading import Program
from cachefree.rules import Closing, replaced
from cachefree.shapes import Signatures
from cachefree.sizes import size_symbol, substitute, symbols_of
from cachefree.terms import SCAN, Table, Term, operands, topological

__all__ = [
    "OneCall",
    "Slot",
    "length_symbol",
    "past_input",
    "with_slots_joined",
]

aten = torch.ops.aten
_TO_A_SHAPE = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class OneCall:
    """What the one graph is made from: the later path, its write-once slots joined.

    Attributes:
        call: How the one graph is called.
        inputs: Its inputs.
        outputs: Its outputs.
        ties: Sizes of the one graph's inputs that are, on later calls, sizes of other inputs.
        closings: What was joined.
        encoder: The encoder's part, where the model has one inside.
        absent: Sizes of inputs that later calls leave out, as these calls have them.
        present: Those of what is computed of such inputs, as first calls have them.
    """

    call: Call
    inputs: tuple[Term, ...]
    outputs: tuple[Term, ...]
    ties: Mapping[sympy.Symbol, Any]
    closings: tuple[Closing, ...] = ()
    encoder: Encoder | None = None
    absent: Mapping[sympy.Symbol, int] = field(default_factory=dict)
    present: Mapping[sympy.Symbol, Any] = field(default_factory=dict)

    @property
    def replaced(self) -> dict[str, Term]:
        """Inputs of the one graph that are values of the model's own path."""
        encoder = self.encoder
        return {str(encoder.states.args[0]): encoder.output} if encoder is not None else {}


class _WriteOnce:
    name = "cross-attention reuse"
    neutral = "zero length on the encoder's axis"

    def edit(self, site: Any) -> None:
        """Not asked: the slots are found by what the later path returns."""


@dataclass(frozen=True)
class Slot:
    """A cache tensor that is empty on the first call.

    Attributes:
        past: The input.
        value: What stands there on the first call.
        axis: Along which the two are joined.
        length: How many rows are past.
    """

    past: Term
    value: Term
    axis: int
    length: sympy.Symbol

    @property
    def rows(self) -> Any:
        """How many rows it has when it is full."""
        return self.past.sizes[self.axis]


def with_slots_joined(
    table: Table,
    discovery: Discovery,
    first: Program,
    later: Program,
    *,
    is_parted: bool = True,
) -> OneCall:
    """The later path with every slot joined that the first call fills for good.

    Args:
        table: Of all terms.
        discovery: How the model is called.
        first: The first path.
        later: The later path.
        is_parted: Whether an encoder inside becomes a graph of its own.
    """
    slots = list(_slots(discovery, first, later))
    if not slots:
        return OneCall(discovery.later, later.inputs, later.outputs, {})
    ties = {slot.length: slot.rows for slot in slots}
    past = {slot.past: past_input(table, slot) for slot in slots}
    start = _encoders_end(table, discovery, later, slots) if is_parted else {}
    joined = {
        slot.past: _joined(table, slot, past[slot.past], _of_rows_left(table, slot, start))
        for slot in slots
    }
    outputs = replaced(table, later.outputs, joined)
    encoder = None
    if start:
        outputs = replaced(table, outputs, start)
        encoder = _encoder(later, outputs, *next(iter(start.items())), ties)
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
        encoder,
    )


def _encoders_end(
    table: Table, discovery: Discovery, later: Program, slots: list[Slot]
) -> dict[Term, Term]:
    """The value at which the encoder ends, with the input that stands for it."""
    query = size_symbol("query")
    caches = {later.inputs[place] for place in discovery.cache_leaves}
    tokens = [term for term in later.inputs if query in symbols_of(term.sizes) or term in caches]
    end = bottleneck([slot.value for slot in slots], tokens)
    if end is None:
        return {}
    assert end.dtype is not None
    assert end.device is not None
    name = STATES
    while any(re.match(rf"{name}\b", str(term.args[0])) for term in later.inputs):
        name += "_"
    facts = Facts(())
    alike = {slot.value.sizes[slot.axis]: slot.rows for slot in slots}
    sizes = tuple(alike.get(size, facts.simplified(size)) for size in end.sizes)
    return {end: table.input(name, sizes, end.dtype, end.device)}


def _encoder(
    later: Program,
    outputs: tuple[Term, ...],
    end: Term,
    states: Term,
    ties: Mapping[sympy.Symbol, Any],
) -> Encoder:
    used = set(topological([end]))
    left = set(topological(outputs))
    inputs = tuple(term for term in later.inputs if term in used)
    return Encoder(
        inputs,
        end,
        states,
        tuple(term for term in inputs if term not in left),
        is_needed_whole(states, outputs, ties.keys()),
    )


def _slots(discovery: Discovery, first: Program, later: Program) -> Iterator[Slot]:
    lengths: dict[Any, sympy.Symbol] = {}
    for place, output in zip(discovery.cache_leaves, discovery.carried, strict=True):
        past, value = later.inputs[place], first.outputs[output]
        if later.outputs[output] is not past or not _is_as_large(past, value):
            continue
        axis = _axis(value)
        if axis is None:
            continue
        size = past.sizes[axis]
        if size not in lengths:
            lengths[size] = length_symbol(size, lengths)
        yield Slot(past, value, axis, lengths[size])


def _is_as_large(past: Term, value: Term) -> bool:
    """Whether two tensors have the same sizes, however these are written."""
    facts = Facts(())
    return len(past.sizes) == len(value.sizes) and all(
        one == other or facts.equal(one, other)
        for one, other in zip(past.sizes, value.sizes, strict=True)
    )


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
    rows = {term.sizes[1] for term in topological([value]) if _has_rows(term)}
    fixed = [axis for axis, size in enumerate(value.sizes) if isinstance(size, int) and size > 0]
    return next((axis for axis in fixed if value.sizes[axis] in rows), None)


def _has_rows(term: Term) -> bool:
    return term.op != "attribute" and term.shape is not None and len(term.sizes) == 3


def length_symbol(
    size: Any, taken: Mapping[Any, sympy.Symbol], rows: str = "memory"
) -> sympy.Symbol:
    """A new symbol for how many rows of a size are past.

    Args:
        size: The size.
        taken: The symbols that there are.
        rows: What the rows are, where the size has no name.
    """
    name = f"past_{size}" if isinstance(size, sympy.Symbol) else f"past_{rows}"
    while size_symbol(name) in taken.values():
        name += "_"
    return size_symbol(name)


def past_input(table: Table, slot: Slot) -> Term:
    """The input with as many rows as are past."""
    old = slot.past
    shape = (*old.sizes[: slot.axis], slot.length, *old.sizes[slot.axis + 1 :])
    assert old.dtype is not None
    assert old.device is not None
    return table.input(str(old.args[0]), shape, old.dtype, old.device)


def _joined(table: Table, slot: Slot, past: Term, new: Term) -> Term:
    """What is past, joined with the rows that are not."""
    shape = list(past.sizes)
    left = new.sizes[slot.axis]
    whole = sympy.expand(slot.length + left)
    is_whole = whole == slot.rows or Facts((slot.length <= slot.rows,)).equal(whole, slot.rows)
    shape[slot.axis] = slot.rows if is_whole else whole
    return table.like(slot.value, aten.cat.default, ((past, new), slot.axis), shape)


def _of_rows_left(table: Table, slot: Slot, start: Mapping[Term, Term]) -> Term:
    """What the first path computes of the encoder's rows that are not past yet.

    Where it does not run on no rows, or where its length is not theirs, all of it is computed and
    then cut.
    """
    rows = slot.rows
    if isinstance(rows, (int, sympy.Symbol)):
        value = _of_fewer(table, slot.value, rows, slot.length, start)
        if value is not None and _runs_on_no_rows(value):
            return value
    return _cut(table, replaced(table, [slot.value], start)[0], slot.axis, slot.length, rows)


def _runs_on_no_rows(value: Term) -> bool:
    if any(term.op == SCAN for term in topological([value])):
        return False  # a loop over the rows needs one
    symbols = symbols_of(size for term in topological([value]) for size in term.shape or ())
    return Signatures([value]).hold({str(symbol): 3 for symbol in symbols})


def _cut(table: Table, term: Term, axis: int, start: Any, end: Any) -> Term:
    shape = list(term.sizes)
    shape[axis] = sympy.expand(end - start)
    return table.like(term, aten.slice.Tensor, (term, axis, start, end, 1), shape)


def _of_fewer(
    table: Table, value: Term, rows: Any, past: sympy.Symbol, start: Mapping[Term, Term]
) -> Term | None:
    """The value with the first rows left out of all that has them; None if nothing has."""
    done: dict[Term, Term] = {}
    for term in _above(value, start):
        if term.op == "input" or term in start:
            axes = [axis for axis, size in enumerate(term.sizes) if size == rows and axis]
            if len(axes) > 1 or (not axes and _has(term.sizes, rows)):
                return None
            source = start.get(term, term)
            done[term] = _cut(table, source, axes[0], past, rows) if axes else source
        else:
            done[term] = _with_rows(table, term, rows, past, done)
    return done[value] if done[value] is not value else None


def _above(value: Term, start: Mapping[Term, Term]) -> list[Term]:
    """The terms below a value, down to where it starts."""
    order = topological([value])
    needed, pending = {value}, [value]
    while pending:
        term = pending.pop()
        if term not in start:
            fresh = [operand for operand in operands(term) if operand not in needed]
            needed.update(fresh)
            pending += fresh
    return [term for term in order if term in needed]


def _has(sizes: tuple[Any, ...], rows: Any) -> bool:
    return isinstance(rows, sympy.Symbol) and rows in symbols_of(sizes)


def _with_rows(
    table: Table, term: Term, rows: Any, past: sympy.Symbol, done: Mapping[Term, Term]
) -> Term:
    """A term of fewer rows: the rows' number, or the symbol, goes out of its sizes."""

    def fewer(size: Any) -> Any:
        if isinstance(rows, sympy.Symbol):
            return substitute(size, {rows: rows - past})
        return rows - past if type(size) is int and size == rows else size

    def of(arg: Any, is_shape: bool) -> Any:
        if isinstance(arg, Term):
            return done[arg]
        if isinstance(arg, tuple):
            return tuple(of(part, True) for part in arg)
        return fewer(arg) if is_shape or isinstance(rows, sympy.Symbol) else arg

    if term.op in ("attribute", "constant"):
        return term
    payload = term.payload
    if term.shape is None and payload is not None:
        payload = tuple((tuple(map(fewer, shape)), dtype, dev) for shape, dtype, dev in payload)
    shape = None if term.shape is None else tuple(map(fewer, term.shape))
    args = tuple(of(arg, False) for arg in term.args)
    if shape is not None and term.op in _TO_A_SHAPE:
        args = (args[0], shape)  # where there are no rows, -1 would be any number
    return table.make(term.op, args, shape, term.dtype, term.device, term.line, payload)
