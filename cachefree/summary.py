"""What the report says of a rewritten model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from cachefree.branches import removed_branches
from cachefree.certify import least, verdict_of
from cachefree.graphs import Graphs
from cachefree.in_a_row import names_of
from cachefree.isolation import StateChange
from cachefree.lifting.subject import assumed_of
from cachefree.outlines import outline
from cachefree.paths import Paths
from cachefree.reading import Program
from cachefree.report import Report
from cachefree.scans import loops_in
from cachefree.steps import steps_of
from cachefree.value_questions import ValueQuestion

__all__ = ["report_of"]


def report_of(
    model: nn.Module, paths: Paths, graphs: Graphs, left_alone: Sequence[str], seconds: float
) -> Report:
    """The report.

    Args:
        model: What was rewritten.
        paths: Its paths, and the proof.
        graphs: What came out of it.
        left_alone: What is said of containers that the one graph does not fill.
        seconds: How long it took.
    """
    first, later, certified = paths.first, paths.later, paths.certified
    interface = graphs.interface
    return Report(
        model=type(model).__name__,
        branches=removed_branches(
            first.captured.jumps,
            later.captured.jumps,
            certified.closings,
            graphs.parts.interface.cache[0].neutral,
        ),
        verdict=least([certified.verdict, *map(verdict_of, paths.shown)]),
        domain=certified.domain if graphs.moved is None else interface.domain,
        laws=tuple(law.name for law in certified.laws),
        slots=tuple(
            f"{slot.past.path}: ({', '.join(map(str, slot.past.shape))}), {slot.neutral}"
            for slot in interface.cache
        ),
        notes=tuple(_notes(paths, graphs, left_alone)),
        loops=loops_in(certified.outputs),
        questions=tuple(map(str, (*first.captured.questions, *later.captured.questions))),
        interface=interface,
        steps=steps_of(first, later, certified, interface),
        outline=outline(
            first.captured,
            later.captured,
            certified.outputs,
            (slot.past.path for slot in interface.cache),
        ),
        seconds=seconds,
        law_kinds={law.name: law.kind for law in certified.laws},
    )


def _notes(paths: Paths, graphs: Graphs, left_alone: Sequence[str]) -> Iterator[str]:
    """What was assumed."""
    yield from paths.discovery.notes
    yield from assumed_of(paths.subject)
    yield from _of_stand_ins(paths.first, paths.later)
    yield from left_alone
    for name in paths.certified.relied_on:
        yield f"the values of {name}, which the tests relied on"
    yield from _of_memories(paths.remembered)
    for name in graphs.rowless:
        yield f"{name} may be left out, which then has no rows"
    if paths.later.written:
        yield "the model writes to its cache; the graph returns a new one"
    yield from map(_of_values, paths.certified.values)
    if graphs.moved is not None:
        yield "the encoder's keys and values stand beside the encoder"


def _of_memories(changes: Sequence[StateChange]) -> Iterator[str]:
    names = names_of(changes)
    if names:
        told = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
        yield f"no result depends on what calls leave in {told}; the graph computes it"


def _of_stand_ins(*paths: Program) -> Iterator[str]:
    for name in dict.fromkeys(name for path in paths for name in path.captured.stand_ins):
        yield f"{name} as ordinary operators, equal over the real numbers"


def _of_values(asked: ValueQuestion) -> str:
    return (
        f"whether {asked.path} is {asked.number} throughout is asked at {asked.where}; "
        "the graph is right where it is and where it is not"
    )
