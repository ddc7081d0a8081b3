"""What cache tensors of fixed size start from, and the one graph where that is no constant.

A first value that is computed from the inputs cannot be passed in. It is computed in the graph, at
every call: the slot is empty on the first call, and the first value stands behind what is past.

Before: ``window = x[:, :1].expand(-1, 3, -1) if window is None else window``.

After: ``window = cat([window, x[:, :1].expand(-1, 3, -1)], 1)[:, :3]``.

Why equal: the slot has no rows on the first call, and all of them later, so that none of the first
value is left; other lengths do not occur and are outside the domain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch

from cachefree.align import Divergence
from cachefree.calls import Call, TensorSpec
from cachefree.discover import Discovery
from cachefree.facts import Facts
from cachefree.neutral import FirstValues, find_neutrals
from cachefree.reading import Program
from cachefree.regimes import Kind
from cachefree.rules import Closing, replaced
from cachefree.sizes import substitute, symbols_of
from cachefree.spec import FIRST_CALL
from cachefree.terms import Table, Term, topological
from cachefree.write_once import OneCall, Slot, length_symbol, past_input

__all__ = ["past_symbols", "started", "telling_slot", "with_slot_emptied"]

aten = torch.ops.aten


class _FirstValue:
    name = "first value from the inputs"
    neutral = "zero length; what is not past is computed"

    def edit(self, site: Any) -> None:
        """Not asked: the values are found while the first path is compared."""


def started(
    table: Table, discovery: Discovery, first: Program, one: OneCall
) -> tuple[OneCall, FirstValues]:
    """The one call with every first value, and the values that are passed in.

    Args:
        table: Of all terms.
        discovery: How the model is called.
        first: The first path.
        one: What the one graph is made from.
    """
    values = _first_values(table, discovery, first, one)
    inputs = set(one.inputs)
    computed = {
        path: value
        for path, value in values.computed.items()
        if all(term in inputs for term in topological([value]) if term.op == "input")
    }
    slots = _slots(one, computed)
    if not slots:
        return one, values
    one = _with_slots(table, one, slots)
    return one, _first_values(table, discovery, first, one)


def telling_slot(discovery: Discovery, one: OneCall) -> Slot | None:
    """A slot of fixed size whose length could tell whether a call is the first; None if none can.

    Its value is the slot itself, until the first one is known.

    Args:
        discovery: How the model is called.
        one: What the one graph is made from.
    """
    for place in discovery.cache_leaves:
        past = one.inputs[place]
        slots = _slots(one, {str(past.args[0]): past})
        if slots:
            return slots[0]
    return None


def with_slot_emptied(
    table: Table, discovery: Discovery, first: Program, one: OneCall, slot: Slot
) -> OneCall:
    """The one call with a slot that is empty on the first call, whatever it starts from.

    Args:
        table: Of all terms.
        discovery: How the model is called.
        first: The first path.
        one: What the one graph is made from; its outputs may have the slot's length.
        slot: As `telling_slot` gives it.
    """
    values = _first_values(table, discovery, first, one, (slot.length,))
    path = str(slot.past.args[0])
    value = values.computed.get(path, values.terms[path])
    return _with_slots(table, one, [replace(slot, value=value)])


def past_symbols(discovery: Discovery, one: OneCall) -> tuple[sympy.Symbol, ...]:
    """The symbols that are 0 on a first call."""

    def symbols(leaves: Any) -> set[sympy.Symbol]:
        return symbols_of(
            size for leaf in leaves if isinstance(leaf, TensorSpec) for size in leaf.shape
        )

    return tuple(sorted(symbols(one.call.leaves) - symbols(discovery.first.leaves), key=str))


def _first_values(
    table: Table,
    discovery: Discovery,
    first: Program,
    one: OneCall,
    also_past: Sequence[sympy.Symbol] = (),
) -> FirstValues:
    past = (*past_symbols(discovery, one), *also_past)
    nothing = dict.fromkeys(past, 0)
    unknown = [
        term
        for term in (one.inputs[place] for place in discovery.cache_leaves)
        if all(
            substitute(size, nothing) != 0 for size in term.sizes if symbols_of([size]) & set(past)
        )
    ]
    facts = Facts(
        (
            *Kind(FIRST_CALL, discovery.first).basics,
            *(question.fact for question in first.captured.questions),
        )
    )
    return find_neutrals(
        table,
        one.outputs,
        first.outputs,
        unknown,
        facts,
        nothing,
        one.replaced,
    )


def _slots(one: OneCall, computed: Mapping[str, Term]) -> list[Slot]:
    """The slots that are joined with their first values, along an axis of fixed size each."""
    taken: dict[Any, sympy.Symbol] = dict(enumerate(one.ties))
    slots = []
    for past in one.inputs:
        value = computed.get(str(past.args[0]))
        axes = [a for a, size in enumerate(past.sizes) if isinstance(size, int) and size > 0]
        if value is None or not axes:
            continue
        axis = min(axes, key=lambda place: past.sizes[place])
        length = length_symbol(past.sizes[axis], taken, "rows")
        taken[len(taken)] = length
        slots.append(Slot(past, value, axis, length))
    return slots


def _with_slots(table: Table, one: OneCall, slots: list[Slot]) -> OneCall:
    past = {slot.past: past_input(table, slot) for slot in slots}
    edits = {slot.past: _behind(table, slot, past[slot.past]) for slot in slots}
    outputs = replaced(table, one.outputs, edits)
    shapes = {str(term.args[0]): term.sizes for term in past.values()}
    leaves = tuple(
        replace(leaf, shape=shapes[leaf.path])
        if isinstance(leaf, TensorSpec) and leaf.path in shapes
        else leaf
        for leaf in one.call.leaves
    )
    closed = tuple(Divergence(slot.past, slot.value) for slot in slots)
    return replace(
        one,
        call=Call(one.call.structure, leaves, one.call.fixed),
        inputs=tuple(past.get(term, term) for term in one.inputs),
        outputs=outputs,
        ties={**one.ties, **{slot.length: slot.rows for slot in slots}},
        closings=(*one.closings, Closing(_FirstValue(), outputs, closed)),
    )


def _behind(table: Table, slot: Slot, past: Term) -> Term:
    """The first value behind what is past, as many rows of both as the slot has."""
    shape = list(past.sizes)
    shape[slot.axis] = slot.length + slot.rows
    whole = table.like(slot.value, aten.cat.default, ((past, slot.value), slot.axis), shape)
    return table.like(
        slot.value, aten.slice.Tensor, (whole, slot.axis, 0, slot.rows, 1), slot.past.sizes
    )
