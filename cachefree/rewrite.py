"""The whole way, from a model to one proved graph, on one page."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from cachefree.baked import Modes, floating_dtype, moved_to
from cachefree.certificate import Evidence
from cachefree.collecting import collected_seldom
from cachefree.discover import Carry
from cachefree.errors import CacheFreeError, CaptureError, UnsupportedBranchError
from cachefree.explaining import unforeseen
from cachefree.graphs import Graphs, graphs_of
from cachefree.in_a_row import names_of
from cachefree.inputs import plainer_call
from cachefree.isolation import one_at_a_time
from cachefree.lifting.standing import Standing
from cachefree.lifting.subject import keeper_of
from cachefree.looked_up import forget
from cachefree.memos import MEMOS
from cachefree.origin import Origin
from cachefree.paths import MatteredError, Paths, proved_paths
from cachefree.preconditions import (
    refuse_no_module,
    refuse_questions_of_tracing,
    refuse_unusual_parameters,
    rewritten_inside,
)
from cachefree.progress import stages
from cachefree.refills import refills
from cachefree.report import Report
from cachefree.request import Request
from cachefree.rewritten import Rewritten
from cachefree.size_answers import SizeAnswers
from cachefree.summary import report_of
from cachefree.surroundings import unmoved
from cachefree.value_questions import ANSWERS

__all__ = ["rewrite"]


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
    request = Request(model, example_inputs, cache, carry, method, check, cross_attention, progress)
    try:
        try:
            return _rewritten_at_all(request)
        except UnsupportedBranchError as error:
            plainer = plainer_call(model, example_inputs, method, error)
            if plainer is None:
                raise
            try:
                return _rewritten_at_all(replace(request, example_inputs=plainer))
            except CacheFreeError:
                raise error from None
    except CacheFreeError as error:
        inside = rewritten_inside(model)
        if inside is None:
            raise
        raise CaptureError(inside, *error.refusals) from error
    except MemoryError:
        raise
    except Exception as error:  # whatever is raised below, a user is told in which line of theirs
        raise unforeseen(error) from error
    finally:
        forget()


def _rewritten_at_all(request: Request) -> Rewritten:
    """Without values that code asks for; where it asks, with those that are made of sizes alone."""
    try:
        with ANSWERS.following(None):
            return _with_or_without_state(request)
    except CacheFreeError:
        if not ANSWERS.is_left:
            raise
    with ANSWERS.following(SizeAnswers()):
        return _with_or_without_state(request)


def _with_or_without_state(request: Request) -> Rewritten:
    """With what calls leave on the model as no matter, where that can be shown; else as a cache."""
    try:
        return _rewritten(request, remembers=True)
    except MatteredError as mattered:
        try:
            return _rewritten(request, remembers=False, without=mattered)
        except CacheFreeError as error:
            raise error from (None if error is mattered.cause else mattered.cause)


def _rewritten(
    request: Request, *, remembers: bool, without: MatteredError | None = None
) -> Rewritten:
    started = time.perf_counter()
    model = request.model
    request.refuse_unknown()
    refuse_unusual_parameters(model)
    forget()
    refuse_questions_of_tracing(model)
    with stages(4, request.progress) as begin, unmoved(model), MEMOS.confirmed():
        paths = proved_paths(request, begin, remembers=remembers, without=without)
        idle = tuple(MEMOS.idle_in(model))
        begin("graph")
        graphs = graphs_of(
            paths, model, check=request.check, cross_attention=request.cross_attention
        )
    refilled, left_alone = refills(paths.subject, paths.discovery)
    report = report_of(model, paths, graphs, left_alone, time.perf_counter() - started)
    return _module(request, paths, graphs, report, refilled, idle)


def _module(
    request: Request,
    paths: Paths,
    graphs: Graphs,
    report: Report,
    refilled: Any,
    idle: Sequence[str],
) -> Rewritten:
    """What is handed back: the graphs, called as the model is, and their origin."""
    model, moved, parts = request.model, graphs.moved, graphs.parts
    captured = paths.first.captured, paths.later.captured
    changed = {change.path for path in captured for change in path.changes}
    changed |= {*names_of(paths.remembered), *idle}
    keeper = keeper_of(paths.subject, paths.later.captured)

    dtype, standing = floating_dtype(model), Standing(paths.subject)

    def again(other: nn.Module) -> Rewritten:
        options = {name: value for name, value in vars(request).items() if name not in _EXAMPLES}
        with standing.again(other):
            return rewrite(other, moved_to(other, request.example_inputs, dtype), **options)

    relied_on = paths.certified.relied_on
    origin = Origin(
        model,
        again,
        without=standing.paths | changed,
        constants=[
            tensor
            for path in captured
            for tensor in path.attributes.values()
            if id(tensor) not in paths.names or paths.names[id(tensor)] in relied_on
        ],
        holders=standing.holders,
    )
    evidence = None
    if moved is None:
        evidence = Evidence.of(paths.table, paths.certified, graphs.interface, parts.inputs)
    return Rewritten(
        graphs.one,
        graphs.interface,
        parts.calling,
        report,
        origin,
        graphs.encoder,
        parts.encoder,
        keeper,
        None if moved is None else moved.call,
        graphs.projection,
        evidence,
        Modes.now(model),
        refilled,
    )


_EXAMPLES = ("model", "example_inputs")
