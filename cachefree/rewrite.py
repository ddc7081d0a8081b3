"""The whole way, from a model to one proved graph, on one page."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Sequence
from typing import Any

from torch import fx, nn

from cachefree.align import Comparison
from cachefree.assembly import assembled
from cachefree.baked import Modes, moved_to
from cachefree.branches import removed_branches
from cachefree.certificate import Evidence
from cachefree.certify import least, verdict_of
from cachefree.collecting import collected_seldom
from cachefree.discover import Carry, Discovery, cache_arguments
from cachefree.encoder_argument import states_argument
from cachefree.errors import CacheFreeError, CaptureError, Refusal, UnsupportedBranchError
from cachefree.explaining import unforeseen
from cachefree.graph import emit
from cachefree.hoisting import hoisted
from cachefree.in_a_row import names_of
from cachefree.inputs import plainer_call
from cachefree.isolation import StateChange, one_at_a_time
from cachefree.kept import StateMattersError, confirm_remembered
from cachefree.left_out import arguments_left_out, flags_needed
from cachefree.lifting.idle import without_unread
from cachefree.lifting.subject import (
    assumed_of,
    buffers_of_state,
    find_subject,
    keeper_of,
    refuse_idle,
    refuse_unread,
)
from cachefree.looked_up import forget
from cachefree.memos import MEMOS
from cachefree.origin import Origin
from cachefree.outlines import outline
from cachefree.preconditions import (
    refuse_no_module,
    refuse_questions_of_tracing,
    refuse_unusual_parameters,
)
from cachefree.progress import stages
from cachefree.proof import proved
from cachefree.reading import Program, read
from cachefree.refills import refills
from cachefree.report import Report
from cachefree.rewritten import Rewritten
from cachefree.rowless import inputs_without_rows
from cachefree.scans import loops_in
from cachefree.steps import steps_of
from cachefree.surroundings import unmoved
from cachefree.terms import Table, Term
from cachefree.value_questions import ValueQuestion

__all__ = ["rewrite"]

_CHECKS = ("prove", "test", "off")
_CROSS = ("reuse", "hoist")


@one_at_a_time
@collected_seldom()
def rewrite(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    cache: str | Sequence[str] | None = None,
    carry: Carry | None = None,
    method: str | tuple[str, str] = "forward",
    check: str = "prove",
    cross_attention: str = "reuse",
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
        cross_attention: Where an encoder's keys and values are computed. ``"reuse"``: in the one
            graph, on the first call, which joins them with what is past at every step.
            ``"hoist"``: beside the encoder, in ``rewritten.encoder``; the graph takes them as
            inputs, and neither joins nor returns them.
        progress: Whether to show a progress bar; None: on a terminal or in a notebook.

    Returns:
        The module, with its ``graph_module`` and its ``report``.

    Raises:
        CacheNotFoundError: no argument carries a cache, or several could.
        CaptureError: the model does not run, or its code depends on the values of tensors.
        UnsupportedBranchError: the two paths differ in a way that no rule closes.

    Example:
        >>> class Decoder(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.keys = torch.nn.Linear(3, 3)
        ...
        ...     def forward(self, x, past=None):
        ...         k = self.keys(x)
        ...         if past is not None:
        ...             k = torch.cat([past, k], dim=1)
        ...         return k.cumsum(dim=1)[:, -x.shape[1] :], k
        >>> rewritten = cachefree.rewrite(Decoder().eval(), (torch.zeros(2, 5, 3),))
        >>> rewritten.report.verdict.name
        'PROVED_EXACT'
        >>> rewritten.empty_cache(batch_size=4).shape
        torch.Size([4, 0, 3])
    """
    refuse_no_module(model)
    rest = cache, carry, method, check, cross_attention, progress
    try:
        try:
            return _rewritten_at_all(model, example_inputs, *rest)
        except UnsupportedBranchError as error:
            plainer = plainer_call(model, example_inputs, method, error)
            if plainer is None:
                raise
            try:
                return _rewritten_at_all(model, plainer, *rest)
            except CacheFreeError:
                raise error from None
    except (CacheFreeError, MemoryError):
        raise
    except Exception as error:  # whatever is raised below, a user is told in which line of theirs
        raise unforeseen(error) from error
    finally:
        forget()


class _MatteredError(Exception):
    """What calls leave on the model was taken for something that no result depends on.

    Args:
        cause: How that was found.
        beside: The arguments that were taken for the cache meanwhile.
    """

    def __init__(self, cause: CacheFreeError, beside: Collection[str]) -> None:
        super().__init__()
        self.cause = cause
        self.beside = beside


def _rewritten_at_all(*given: Any) -> Rewritten:
    """With what calls leave on the model as no matter, where that can be shown; else as a cache."""
    try:
        return _rewritten(*given, remembers=True)
    except _MatteredError as mattered:
        try:
            return _rewritten(*given, remembers=False, without=mattered)
        except CacheFreeError as error:
            raise error from (None if error is mattered.cause else mattered.cause)


def _rewritten(
    model: nn.Module,
    example_inputs: Any,
    cache: str | Sequence[str] | None,
    carry: Carry | None,
    method: str | tuple[str, str],
    check: str,
    cross_attention: str,
    progress: bool | None,
    *,
    remembers: bool,
    without: _MatteredError | None = None,
) -> Rewritten:
    started = time.perf_counter()
    if check not in _CHECKS:
        raise CaptureError(Refusal(f"check={check!r} is none of {', '.join(map(repr, _CHECKS))}."))
    if cross_attention not in _CROSS:
        raise CaptureError(
            Refusal(
                f"cross_attention={cross_attention!r} is none of {', '.join(map(repr, _CROSS))}."
            )
        )
    refuse_unusual_parameters(model)
    forget()
    refuse_questions_of_tracing(model)
    with stages(4, progress) as begin, unmoved(model), MEMOS.confirmed():
        begin("first path")
        subject, discovery = find_subject(
            model, example_inputs, cache, carry, method, remembers=remembers
        )
        MEMOS.numbers_only = bool(discovery.first_path.values)
        _refuse_no_cache(without, discovery)
        begin("later path")
        table = Table()
        names = _names(model)
        first = read(discovery.first_path, table, names)

        def refuse(attempt: Discovery, later: Program) -> None:
            refuse_unread(subject, later)
            refuse_idle(subject, attempt, later)

        try:
            discovery, later, one, certified = proved(
                subject, table, names, discovery, first, check, lambda: begin("proof"), refuse
            )
        except CacheFreeError as error:
            if MEMOS.kept:
                raise _MatteredError(error, cache_arguments(discovery)) from error
            raise
        remembered = without_unread(subject, MEMOS.kept)
        changed = frozenset((*names_of(remembered), *MEMOS.idle_in(model)))
        shown: tuple[Comparison, ...] = ()
        MEMOS.may_keep = False
        if remembered:
            try:
                shown = confirm_remembered(
                    subject, table, names, discovery, (first, later), certified.domain, remembered
                )
            except StateMattersError as error:
                raise _MatteredError(error, cache_arguments(discovery)) from error
        begin("graph")
        spare = arguments_left_out(
            subject, table, names, discovery, later, len(certified.shown[-1][1])
        )
        needed = flags_needed(subject, discovery)
        parts = assembled(subject, discovery, later, one, certified, spare, needed)
        rowless = inputs_without_rows(
            subject, table, names, discovery, one, certified, later.captured, check
        )
        parts.calling.leave_out(*rowless)
        interface = parts.interface
        if one.encoder is not None and parts.encoder is not None and not one.absent:
            parts.encoder.argument = states_argument(
                subject,
                table,
                names,
                discovery,
                (first, later),
                one.encoder,
                parts.encoder.dropped,
            )
        inputs, outputs, domain = parts.inputs, certified.outputs, certified.domain
        encoder = projection = moved = None
        if one.encoder is not None:
            encoder = _emitted(model, one.encoder.inputs, (one.encoder.output,))
        if cross_attention == "hoist":
            moved = hoisted(table, discovery, first, one, certified, parts)
            interface, inputs, outputs = moved.call.interface, moved.inputs, moved.outputs
            domain = interface.domain
            encoder, projection = (
                _emitted(model, *graph) for graph in (moved.encoder, moved.projection)
            )
        graph_module = emit(
            model,
            [(spec.name, term) for spec, term in zip(interface.inputs, inputs, strict=True)],
            [(spec.name, term) for spec, term in zip(interface.outputs, outputs, strict=True)],
        )
    refilled, left_alone = refills(subject, discovery)
    report = Report(
        model=type(model).__name__,
        branches=removed_branches(
            first.captured.jumps,
            later.captured.jumps,
            certified.closings,
            parts.interface.cache[0].neutral,
        ),
        verdict=least([certified.verdict, *map(verdict_of, shown)]),
        domain=domain,
        laws=tuple(law.name for law in certified.laws),
        slots=tuple(
            f"{slot.past.path}: ({', '.join(map(str, slot.past.shape))}), {slot.neutral}"
            for slot in interface.cache
        ),
        notes=(
            *discovery.notes,
            *assumed_of(subject),
            *_stand_in_notes(first, later),
            *left_alone,
            *(f"the values of {name}, which the tests relied on" for name in certified.relied_on),
            *_remembered_notes(remembered),
            *(f"{name} may be left out, which then has no rows" for name in rowless[0]),
            *(["the model writes to its cache; the graph returns a new one"] * bool(later.written)),
            *map(_told_of_values, certified.values),
            *([] if moved is None else ["the encoder's keys and values stand beside the encoder"]),
        ),
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
        seconds=time.perf_counter() - started,
        law_kinds={law.name: law.kind for law in certified.laws},
    )

    changed |= {change.path for change in (*first.captured.changes, *later.captured.changes)}
    keeper = keeper_of(subject, later.captured)

    def again() -> Rewritten:
        return rewrite(
            model,
            moved_to(model, example_inputs),
            cache=cache,
            carry=carry,
            method=method,
            check=check,
            cross_attention=cross_attention,
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
            without=buffers_of_state(subject) | changed,
            constants=[
                tensor
                for path in (first, later)
                for tensor in path.captured.attributes.values()
                if id(tensor) not in names or names[id(tensor)] in certified.relied_on
            ],
            has_state=keeper is not None,
        ),
        encoder,
        parts.encoder,
        keeper,
        None if moved is None else moved.call,
        projection,
        Evidence.of(table, certified, interface, parts.inputs) if moved is None else None,
        Modes.now(model),
        refilled,
    )


def _refuse_no_cache(mattered: _MatteredError | None, discovery: Discovery) -> None:
    """Refuses a graph of what the model keeps that cannot be given the cache.

    Raises:
        CacheFreeError: why there is no graph that can.
    """
    if mattered is not None and not set(mattered.beside).isdisjoint(discovery.absent):
        raise mattered.cause


def _emitted(model: nn.Module, inputs: Sequence[Term], outputs: Sequence[Term]) -> fx.GraphModule:
    """A graph beside the one graph: its inputs by their paths, its outputs in order."""
    return emit(
        model,
        [(name_of(term), term) for term in inputs],
        [(f"output_{place}", term) for place, term in enumerate(outputs)],
    )


def _remembered_notes(changes: Sequence[StateChange]) -> tuple[str, ...]:
    names = names_of(changes)
    if not names:
        return ()
    told = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
    return (f"no result depends on what calls leave in {told}; the graph computes it",)


def _stand_in_notes(*paths: Program) -> tuple[str, ...]:
    names = dict.fromkeys(name for path in paths for name in path.captured.stand_ins)
    return tuple(f"{name} as ordinary operators, equal over the real numbers" for name in names)


def _told_of_values(asked: ValueQuestion) -> str:
    return (
        f"whether {asked.path} is {asked.number} throughout is asked at {asked.where}; "
        "the graph is right where it is and where it is not"
    )


def name_of(term: Term) -> str:
    """The path of an input as a name."""
    return re.sub(r"\W+", "_", str(term.args[0])).strip("_")


def _names(model: nn.Module) -> dict[int, str]:
    names: dict[int, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        names.setdefault(id(tensor), name)
    return names
