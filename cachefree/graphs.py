"""The one graph, those beside it, and how they are called."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx, nn

from cachefree.assembly import Assembled, assembled
from cachefree.encoder_argument import states_argument
from cachefree.graph import emit
from cachefree.hoisting import Hoisting, hoisted
from cachefree.left_out import arguments_left_out, flags_needed
from cachefree.paths import Paths
from cachefree.rowless import inputs_without_rows
from cachefree.spec import Interface
from cachefree.terms import Term

__all__ = ["Graphs", "graphs_of"]


@dataclass
class Graphs:
    """What comes out of a proof.

    Attributes:
        one: The one graph.
        interface: Its inputs and outputs.
        parts: How it is called.
        rowless: Arguments that may be left out, which then have no rows.
        encoder: The encoder's graph, where there is one.
        projection: The graph of the encoder's keys and values, where they stand beside it.
        moved: How the one graph is called then.
    """

    one: fx.GraphModule = field(init=False)
    interface: Interface
    parts: Assembled
    rowless: tuple[str, ...]
    encoder: fx.GraphModule | None = None
    projection: fx.GraphModule | None = None
    moved: Hoisting | None = None


def graphs_of(paths: Paths, model: nn.Module, *, check: str, cross_attention: str) -> Graphs:
    """Writes the graphs.

    Args:
        paths: Both paths, and the proof.
        model: What the graphs' parameters are those of.
        check: As `cachefree.rewrite` has it.
        cross_attention: Likewise.

    Raises:
        UnsupportedBranchError: the encoder's keys and values cannot stand beside it.
    """
    parts, rowless = _assembled(paths, check)
    graphs = Graphs(parts.interface, parts, rowless)
    inputs, outputs = parts.inputs, paths.certified.outputs
    encoder = paths.one.encoder
    if encoder is not None:
        graphs.encoder = _emitted(model, encoder.inputs, (encoder.output,))
    if cross_attention == "hoist":
        graphs.moved = moved = hoisted(
            paths.table, paths.discovery, paths.first, paths.one, paths.certified, parts
        )
        graphs.interface, inputs, outputs = moved.call.interface, moved.inputs, moved.outputs
        graphs.encoder = _emitted(model, *moved.encoder)
        graphs.projection = _emitted(model, *moved.projection)
    graphs.one = emit(
        model,
        [(spec.name, term) for spec, term in zip(graphs.interface.inputs, inputs, strict=True)],
        [(spec.name, term) for spec, term in zip(graphs.interface.outputs, outputs, strict=True)],
    )
    return graphs


def _assembled(paths: Paths, check: str) -> tuple[Assembled, tuple[str, ...]]:
    """How the one graph is called, and the arguments that have no rows where they are left out."""
    subject, table, names = paths.subject, paths.table, paths.names
    discovery, later, one, certified = paths.discovery, paths.later, paths.one, paths.certified
    spare = arguments_left_out(subject, table, names, discovery, later, len(certified.shown[-1][1]))
    needed = flags_needed(subject, discovery)
    parts = assembled(subject, discovery, later, one, certified, spare, needed)
    rowless = inputs_without_rows(
        subject, table, names, discovery, one, certified, later.captured, check
    )
    parts.calling.leave_out(*rowless)
    if one.encoder is not None and parts.encoder is not None and not one.absent:
        parts.encoder.argument = states_argument(
            subject,
            table,
            names,
            discovery,
            (paths.first, later),
            one.encoder,
            parts.encoder.dropped,
        )
    return parts, tuple(rowless[0])


def _emitted(model: nn.Module, inputs: Sequence[Term], outputs: Sequence[Term]) -> fx.GraphModule:
    """A graph beside the one graph: its inputs by their paths, its outputs in order."""
    return emit(
        model,
        [(_name_of(term), term) for term in inputs],
        [(f"output_{place}", term) for place, term in enumerate(outputs)],
    )


def _name_of(term: Term) -> str:
    """The path of an input as a name."""
    return re.sub(r"\W+", "_", str(term.args[0])).strip("_")
