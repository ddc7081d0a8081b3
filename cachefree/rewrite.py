"""The whole way, from a model to one proved graph, on one page."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

from torch import nn

from cachefree.assembly import assembled
from cachefree.branches import removed_branches
from cachefree.discover import Carry, Discovery
from cachefree.encoder_argument import states_argument
from cachefree.errors import CaptureError, Refusal
from cachefree.graph import emit
from cachefree.isolation import one_at_a_time
from cachefree.lifting.subject import (
    assumed_of,
    buffers_of_state,
    find_subject,
    keeper_of,
    refuse_idle,
    refuse_unread,
)
from cachefree.origin import Origin
from cachefree.preconditions import refuse_questions_of_tracing, refuse_unusual_parameters
from cachefree.progress import stages
from cachefree.proof import proved
from cachefree.reading import Program, read
from cachefree.report import Report
from cachefree.rewritten import Rewritten
from cachefree.surroundings import forget
from cachefree.terms import Table, Term

__all__ = ["rewrite"]

_CHECKS = ("prove", "test", "off")


@one_at_a_time
def rewrite(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    cache: str | Sequence[str] | None = None,
    carry: Carry | None = None,
    method: str | tuple[str, str] = "forward",
    check: str = "prove",
    progress: bool | None = None,
) -> Rewritten:
    """Gives back one graph that is both of a model's paths: the first call's and the later calls'.

    The cache is always a tensor: zero length on the first call, joined unconditionally. No weight
    is read or copied, and the model is not modified.

    Args:
        model: Any ``nn.Module`` whose forward takes a cache that may be absent.
        example_inputs: Inputs of a first call: a tuple (positional) or a dict (by keyword). Every
            axis that may vary is found by itself.
            None: taken from ``model.dummy_inputs`` or ``model.example_input_array``, or probed.
        cache: Name or names of the arguments that carry the cache; None: found by itself.
        carry: ``(outputs, inputs) → later inputs``: how a call's outputs feed the next; None: found
            by itself.
        method: The method that is called; two where the first call has one of its own:
            ``("prefill", "step")``.
        check: ``"prove"`` refuses what cannot be proved; ``"test"`` accepts what random tests
            accept; ``"off"`` checks nothing.
        progress: Whether to show a progress bar; None: on a terminal or in a notebook.

    Returns:
        The module, with its ``graph_module`` and its ``report``.

    Raises:
        CacheNotFoundError: no argument carries a cache, or several could.
        CaptureError: the model does not run, or its code depends on the values of tensors.
        UnsupportedBranchError: the two paths differ in a way that no rule closes.
    """
    started = time.perf_counter()
    if not isinstance(model, nn.Module):
        raise CaptureError(
            Refusal(
                f"rewrite takes an nn.Module, not {type(model).__name__}.",
                remedy="Pass the model itself.",
            )
        )
    if check not in _CHECKS:
        raise CaptureError(Refusal(f"check={check!r} is none of {', '.join(map(repr, _CHECKS))}."))
    refuse_unusual_parameters(model)
    forget()
    refuse_questions_of_tracing(model)
    with stages(4, progress) as begin:
        begin("first path")
        subject, discovery = find_subject(model, example_inputs, cache, carry, method)
        begin("later path")
        table = Table()
        names = _names(model)
        first = read(discovery.first_path, table, names)

        def refuse(attempt: Discovery, later: Program) -> None:
            refuse_unread(subject, later)
            refuse_idle(subject, attempt, later)

        discovery, later, one, certified = proved(
            subject, table, names, discovery, first, check, lambda: begin("proof"), refuse
        )
        begin("graph")
        parts = assembled(subject, discovery, later, one, certified)
        interface = parts.interface
        if one.encoder is not None and parts.encoder is not None:
            parts.encoder.argument = states_argument(
                subject,
                table,
                names,
                discovery,
                (first, later),
                one.encoder,
                parts.encoder.dropped,
            )
        graph_module = emit(
            model,
            [(spec.name, term) for spec, term in zip(interface.inputs, parts.inputs, strict=True)],
            [
                (spec.name, term)
                for spec, term in zip(interface.outputs, certified.outputs, strict=True)
            ],
        )
        encoder = (
            None
            if one.encoder is None
            else emit(
                model,
                [(name_of(term), term) for term in one.encoder.inputs],
                [(name_of(one.encoder.states), one.encoder.output)],
            )
        )
    report = Report(
        model=type(model).__name__,
        branches=removed_branches(
            first.captured.jumps,
            later.captured.jumps,
            certified.closings,
            interface.cache[0].neutral,
        ),
        verdict=certified.verdict,
        domain=certified.domain,
        laws=tuple(law.name for law in certified.laws),
        slots=tuple(
            f"{slot.past.path}: ({', '.join(map(str, slot.past.shape))}), {slot.neutral}"
            for slot in interface.cache
        ),
        notes=(*discovery.notes, *assumed_of(subject), *_stand_in_notes(first, later)),
        questions=tuple(map(str, (*first.captured.questions, *later.captured.questions))),
        seconds=time.perf_counter() - started,
    )

    keeper = keeper_of(subject, later.captured)

    def again() -> Rewritten:
        return rewrite(
            model,
            example_inputs,
            cache=cache,
            carry=carry,
            method=method,
            check=check,
            progress=progress,
        )

    return Rewritten(
        graph_module,
        interface,
        parts.calling,
        report,
        Origin(
            model,
            again,
            without=buffers_of_state(subject),
            has_state=keeper is not None,
        ),
        encoder,
        parts.encoder,
        keeper,
    )


def _stand_in_notes(*paths: Program) -> tuple[str, ...]:
    names = dict.fromkeys(name for path in paths for name in path.captured.stand_ins)
    return tuple(f"{name} as ordinary operators, equal over the real numbers" for name in names)


def name_of(term: Term) -> str:
    """The path of an input as a name."""
    return re.sub(r"\W+", "_", str(term.args[0])).strip("_")


def _names(model: nn.Module) -> dict[int, str]:
    names: dict[int, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        names.setdefault(id(tensor), name)
    return names
