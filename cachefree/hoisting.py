"""What the first call fills for good, moved out of the one graph to stand beside the encoder.

Before: ``join = cat([past, f(states[:, len(past):])])`` at every step, and returned at every step.

After: the encoder gives ``f(states)``; the one graph takes it as an input, and does not return it.

Why equal: every use of ``join`` in the proved graph becomes the new input, so that the two graphs
are one function of it. The certificate has shown what ``join`` is: the graph returns it, and what
it returns is what the first path computes, ``f(states)``, on first calls, and ``past`` on later
ones. These two are what the input is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch

from cachefree.assembly import Assembled
from cachefree.calling import Calling, is_tracing
from cachefree.calls import SizeSpec
from cachefree.certify import Certified
from cachefree.discover import Discovery
from cachefree.encoder_call import EncoderCall
from cachefree.errors import DomainError, Refusal, UnsupportedBranchError
from cachefree.hoisted_domain import ENCODER, parted_domain
from cachefree.reading import Program
from cachefree.rules import replaced
from cachefree.sizes import symbols_of
from cachefree.spec import (
    CacheSlot,
    Domain,
    InputSpec,
    Interface,
    OutputSpec,
    Region,
)
from cachefree.terms import Table, Term, operands, topological
from cachefree.write_once import OneCall

__all__ = ["HoistedCall", "Hoisting", "hoisted"]

Run = Callable[..., Sequence[torch.Tensor]]


@dataclass
class HoistedCall:
    """How a call becomes one of a graph that takes what the encoder projected.

    The call is first that of the graph that joins, whose inputs and outputs are told by place.

    Attributes:
        interface: Of the graph that takes the projected states.
        encoder_interface: Of what gives them.
        kept: For each input of the graph, the place of the joining graph's.
        crossing: Places of the projected slots among the joining graph's inputs.
        returned: Their places among the joining graph's outputs.
        projected: Places, among the joining graph's inputs, of what the projection takes.
        encoded: Places, among the whole call's tensors, of what the encoder takes, where it is
            inside the model.
        states: The place of the encoder's states among the joining graph's inputs; None where the
            encoder is outside.
    """

    interface: Interface
    encoder_interface: Interface
    kept: tuple[int, ...]
    crossing: tuple[int, ...]
    returned: tuple[int, ...]
    projected: tuple[int, ...]
    encoded: tuple[int, ...]
    states: int | None

    def flatten(
        self,
        calling: Calling,
        whole: EncoderCall | None,
        graphs: tuple[Run, Run],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> list[torch.Tensor]:
        """A call of the model as flat inputs of the graph.

        Args:
            calling: Of the graph that joins.
            whole: How the whole model is called, where its encoder is inside.
            graphs: What runs the encoder with the projection, and the projection alone.
            args: Of the call.
            kwargs: Of the call.

        Raises:
            DomainError: the call is outside the domain, or is traced.
        """
        if is_tracing():
            raise DomainError(
                Refusal(
                    "A call that runs the encoder or not, by the cache, cannot be traced.",
                    why='With cross_attention="hoist" the encoder\'s keys and values are inputs of '
                    "the graph.",
                    remedy="Export rewritten.graph_module and rewritten.encoder.",
                )
            )
        encode, project = graphs
        if whole is None:
            flat = calling.flatten(args, kwargs)
            return self._taken(flat, encode)
        if whole.is_decoders(kwargs):
            flat = calling.flatten((), whole.decoders(args, kwargs))
            return self._taken(flat, project)
        own = whole.whole.flatten(args, kwargs)
        nothing = torch.empty(0)  # stands for the states where nothing reads them
        flat = [nothing if place is None else own[place] for place in whole.kept]
        is_read = self.states in self.kept
        if is_read or self._is_first(flat):
            states, *cross = encode(*[own[place] for place in self.encoded])
            assert self.states is not None
            flat[self.states] = states
            return self._with(flat, cross) if self._is_first(flat) else self._of(flat)
        return self._of(flat)

    def full_outputs(
        self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """The outputs of the graph that joins: what was projected is handed on as it is."""
        found = list(outputs)
        places = sorted(zip(self.returned, self.crossing, strict=True))
        for returned, place in places:
            found.insert(returned, inputs[self.kept.index(place)])
        return found

    def sizes_of(self, inputs: Sequence[torch.Tensor]) -> dict[str, int]:
        """The sizes of a call, by symbol, as far as the graph's own inputs tell them."""
        return {
            str(size): tensor.shape[axis]
            for spec, tensor in zip(self.interface.inputs, inputs, strict=True)
            for axis, size in enumerate(spec.shape)
            if isinstance(size, sympy.Symbol)
        }

    def _is_first(self, flat: Sequence[torch.Tensor]) -> bool:
        return flat[self.crossing[0]].numel() == 0

    def _taken(self, flat: list[torch.Tensor], project: Run) -> list[torch.Tensor]:
        if not self._is_first(flat):
            return self._of(flat)
        return self._with(flat, project(*[flat[place] for place in self.projected]))

    def _with(self, flat: list[torch.Tensor], cross: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        for place, value in zip(self.crossing, cross, strict=True):
            flat[place] = value
        return self._of(flat)

    def _of(self, flat: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [flat[place] for place in self.kept]


@dataclass
class Hoisting:
    """A proved graph parted in what runs once and what runs at every step.

    Attributes:
        call: How it is called.
        inputs: The graph's inputs, as terms.
        outputs: Its outputs.
        encoder: Inputs and outputs of the encoder with the projection.
        projection: Inputs and outputs of the projection alone.
    """

    call: HoistedCall
    inputs: tuple[Term, ...]
    outputs: tuple[Term, ...]
    encoder: tuple[tuple[Term, ...], tuple[Term, ...]]
    projection: tuple[tuple[Term, ...], tuple[Term, ...]]


def hoisted(
    table: Table,
    discovery: Discovery,
    first: Program,
    one: OneCall,
    certified: Certified,
    parts: Assembled,
) -> Hoisting:
    """Moves what the first call fills for good out of a proved graph.

    Raises:
        UnsupportedBranchError: there is no such slot, or the graph reads its length otherwise.
    """
    interface = parts.interface
    slots = [slot for slot in interface.cache if symbols_of(slot.past.shape) & set(one.ties)]
    if not slots:
        raise UnsupportedBranchError(
            Refusal(
                "The model has no keys and values of an encoder to move.",
                why="No cache tensor is computed on the first call and handed on by later ones.",
                remedy='Leave cross_attention="hoist" out.',
            )
        )
    returned = tuple(interface.outputs.index(slot.present) for slot in slots)
    joins = [certified.outputs[place] for place in returned]
    cross = {join: _input_for(table, slot, join) for slot, join in zip(slots, joins, strict=True)}
    left = [place for place in range(len(interface.outputs)) if place not in returned]
    outputs = replaced(table, [certified.outputs[place] for place in left], cross)
    crossing = tuple(interface.inputs.index(slot.past) for slot in slots)
    old = {parts.inputs[place] for place in crossing}
    _refuse_other_uses(outputs, old, set(one.ties))
    used, before = set(topological(outputs)), set(topological(certified.outputs))
    inputs = list(parts.inputs)
    for place, join in zip(crossing, joins, strict=True):
        inputs[place] = cross[join]
    kept = tuple(
        place
        for place, term in enumerate(inputs)
        if place in crossing or term in used or term not in before
    )
    values = [_first_value(discovery, first, interface, slot) for slot in slots]
    encoder, projection, encoded, projected = _sources(table, one, parts, values)
    specs = tuple(
        replace(spec, shape=inputs[place].sizes, is_cache=spec.is_cache and place not in crossing)
        for place, spec in enumerate(interface.inputs)
    )
    crossed = tuple(
        CacheSlot(
            specs[place],
            replace(slot.present, shape=value.sizes, is_cache=False),
            slot.growing_axes,
            "",
        )
        for place, slot, value in zip(crossing, slots, values, strict=True)
    )
    _refuse_unknown_sizes(parts.calling, [specs[place] for place in kept])
    taken = tuple(specs[place] for place in kept)
    beside = _encoder_interface(parts, encoded, projected, crossed)
    present = parts.encoder.whole.present if parts.encoder else {}
    domain, encoders = parted_domain(interface.domain, one.ties, (taken, beside.inputs), present)
    own = Interface(
        taken,
        tuple(interface.outputs[place] for place in left),
        tuple(slot for slot in interface.cache if slot not in slots),
        domain,
        crossed,
    )
    call = HoistedCall(
        own,
        replace(beside, domain=encoders),
        kept,
        crossing,
        returned,
        projected,
        encoded,
        _states_place(parts),
    )
    return Hoisting(call, tuple(inputs[place] for place in kept), outputs, encoder, projection)


def _input_for(table: Table, slot: CacheSlot, join: Term) -> Term:
    assert join.dtype is not None
    assert join.device is not None
    return table.input(slot.past.path, join.sizes, join.dtype, join.device)


def _refuse_other_uses(outputs: Sequence[Term], old: set[Term], lengths: set[sympy.Symbol]) -> None:
    """Refuses a graph that reads what is past of a slot other than through the join."""
    for term in topological(outputs):
        is_sized = term.shape is not None and symbols_of(term.sizes) & lengths
        if term in old or is_sized or any(operand in old for operand in operands(term)):
            raise UnsupportedBranchError(
                Refusal(
                    "The encoder's keys and values cannot be moved beside the encoder.",
                    why=f"The decoder reads their past otherwise: {term.text(2)}",
                    remedy='Use cross_attention="reuse".',
                    where=term.line,
                )
            )


def _refuse_unknown_sizes(calling: Calling, specs: Sequence[InputSpec]) -> None:
    """Refuses a result with a number that no size of the graph's inputs tells."""
    told = {size for spec in specs for size in spec.shape if isinstance(size, sympy.Symbol)}
    for leaf in calling.result_leaves:
        if isinstance(leaf, SizeSpec) and symbols_of([leaf.expr]) - told:
            raise UnsupportedBranchError(
                Refusal(
                    "The encoder's keys and values cannot be moved beside the encoder.",
                    why=f"The model returns the number {leaf.expr}, which they do not tell.",
                    remedy='Use cross_attention="reuse".',
                )
            )


def _first_value(
    discovery: Discovery, first: Program, interface: Interface, slot: CacheSlot
) -> Term:
    """What the first path puts into a slot."""
    paths = {
        discovery.later.tensors[place].path: output
        for place, output in zip(discovery.cache_leaves, discovery.carried, strict=True)
    }
    return first.outputs[paths[slot.past.path]]


Graph = tuple[tuple[Term, ...], tuple[Term, ...]]


def _sources(
    table: Table, one: OneCall, parts: Assembled, values: Sequence[Term]
) -> tuple[Graph, Graph, tuple[int, ...], tuple[int, ...]]:
    """The graphs of the encoder and of the projection, and where their inputs are in a call."""
    places = {str(term.args[0]): place for place, term in enumerate(parts.inputs)}
    encoder = one.encoder
    if encoder is None or parts.encoder is None:
        graph = _graph(values)
        taken = tuple(places[str(term.args[0])] for term in graph[0])
        return graph, graph, (), taken
    projection = _graph(replaced(table, list(values), {encoder.output: encoder.states}))
    taken = tuple(places[str(term.args[0])] for term in projection[0])
    whole = {spec.path: place for place, spec in enumerate(parts.encoder.whole.interface.inputs)}
    both = _graph([encoder.output, *values])
    return both, projection, tuple(whole[str(term.args[0])] for term in both[0]), taken


def _graph(values: Sequence[Term]) -> Graph:
    return tuple(term for term in topological(values) if term.op == "input"), tuple(values)


def _encoder_interface(
    parts: Assembled,
    encoded: tuple[int, ...],
    projected: tuple[int, ...],
    crossed: tuple[CacheSlot, ...],
) -> Interface:
    presents = tuple(slot.present for slot in crossed)
    region = Domain((Region(ENCODER),))
    if parts.encoder is None:
        inputs = tuple(parts.interface.inputs[place] for place in projected)
        return Interface(inputs, presents, (), region, crossed)
    inputs = tuple(parts.encoder.whole.interface.inputs[place] for place in encoded)
    states = parts.encoder.states
    output = OutputSpec("last_hidden_state", "last_hidden_state", states.shape, states.dtype)
    return Interface(inputs, (output, *presents), (), region, crossed)


def _states_place(parts: Assembled) -> int | None:
    return None if parts.encoder is None else parts.interface.inputs.index(parts.encoder.states)
