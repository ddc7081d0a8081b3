"""The later path that one graph can be made from, found and proved.

A later path is captured at one choice of sizes and one reading of what the cache's sizes mean.
Where no graph can be made from that one, another may do: the path that the model takes for one new
token, or a memory of one row that is not there at first. Each is proved in the same way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import sympy
from torch import nn

from cachefree.certify import Certified, certify
from cachefree.discover import Discovery
from cachefree.errors import CacheFreeError, UnsupportedBranchError
from cachefree.example_sizes import capture_where_it_runs
from cachefree.first_only import absences, fixed_inputs
from cachefree.neutral import FirstValues
from cachefree.one_token import ONE_TOKEN, of_one_token, with_cache_carried, with_unread_carried
from cachefree.preconditions import (
    refuse_frozen_sizes,
    refuse_independence,
    refuse_other_results,
    refuse_writes,
)
from cachefree.prefix import with_prefixes
from cachefree.reading import Program, read
from cachefree.scans import loops_in
from cachefree.sizes import size_symbol
from cachefree.spec import LATER_CALLS
from cachefree.start_rows import with_start_rows
from cachefree.starts import started
from cachefree.step_starts import first_values
from cachefree.stepped import (
    SCANNED,
    has_state,
    not_its_steps,
    not_tested,
    step_of,
    with_steps_scanned,
)
from cachefree.terms import Table
from cachefree.unread_inputs import with_unread_left_out
from cachefree.write_once import OneCall, with_slots_joined

__all__ = ["proved"]

log = logging.getLogger(__name__)
_QUERY = "query"
_Refuse = Callable[[Discovery, Program], None]
_MOST_OTHERS = 2


def proved(
    model: nn.Module,
    table: Table,
    names: dict[int, str],
    discovery: Discovery,
    first: Program,
    check: str,
    begin: Callable[[], None],
    refuse: _Refuse,
) -> tuple[Discovery, Program, OneCall, Certified]:
    """The later path with the proof that one graph is it and the first path.

    Args:
        model: Any module.
        table: Of all terms.
        names: ``id`` of a parameter or buffer → its name.
        discovery: How the model is called.
        first: The first path.
        check: As `cachefree.rewrite` has it.
        begin: Called when the proof begins.
        refuse: Refuses more of a later path than every path has to keep.

    Raises:
        CacheFreeError: no later path does; the reasons are those of the likeliest.
    """
    reason: CacheFreeError | None = None
    asks: list[bool] = []
    laters: list[Program] = []

    def of(attempt: Discovery) -> tuple[Discovery, Program, OneCall, Certified]:
        later = _later(model, table, names, attempt, first, refuse)
        asks.append(_asks_for_tokens(later))
        laters.append(later)
        begin()
        if attempt.both is not None:
            return _with_all_inputs(model, table, names, attempt, first, later, check, refuse)
        one, starts = _joined(table, attempt, first, later)
        found = certify(model, table, names, attempt, first, later, one, starts, check)
        return attempt, later, one, found

    def without_unread() -> Discovery | None:
        return with_unread_left_out(model, discovery, first, laters[0]) if laters else None

    for attempt in _attempts(discovery, asks, without_unread):
        try:
            shown = of(attempt)
        except CacheFreeError as error:
            log.debug("no graph with %s, asked as %s: %s", attempt.later, attempt.asked, error)
            reason = reason or error
            continue
        missed = shown[3].missed
        beside = [regime for regime in missed if regime.region.name == LATER_CALLS]
        for regime in beside[:_MOST_OTHERS]:
            beyond = replace(attempt, hints=dict(regime.program.captured.sizes))
            try:
                there = of(beyond)
            except CacheFreeError as error:
                log.debug("no graph from the path at %s: %s", beyond.hints, error)
                continue
            if len(there[3].missed) < len(missed) and _serves(there[3], attempt.hints):
                return there
        return shown
    assert reason is not None
    others = _others(model, table, names, discovery, first, laters[:1], check, refuse)
    for shown_or_why in others:
        if not isinstance(shown_or_why, CacheFreeError):
            return shown_or_why
        reason = shown_or_why
    return _of_steps(model, table, names, discovery, first, check, refuse, reason)


def _others(
    model: nn.Module,
    table: Table,
    names: dict[int, str],
    discovery: Discovery,
    first: Program,
    laters: Sequence[Program],
    check: str,
    refuse: _Refuse,
) -> Iterator[tuple[Discovery, Program, OneCall, Certified] | CacheFreeError]:
    """Graphs that are more than an edited later path, and why others are none."""
    if laters and check == "prove" and discovery.both is None:
        for attempt in filter(None, (discovery.unowned, discovery)):
            yield from _start_rows(model, table, names, attempt, first, check, refuse)
    if loops_in(first.outputs):
        yield from _loops(model, table, names, discovery, first, laters, check, refuse)


def _start_rows(
    model: nn.Module,
    table: Table,
    names: dict[int, str],
    discovery: Discovery,
    first: Program,
    check: str,
    refuse: _Refuse,
) -> Iterator[tuple[Discovery, Program, OneCall, Certified]]:
    """The later path with rows joined that only the first path has, where it is both paths."""
    for one in with_start_rows(model, table, names, discovery, first):
        try:
            later = _later(model, table, names, discovery, first, refuse)
            one, starts = started(table, discovery, first, one)
            found = certify(model, table, names, discovery, first, later, one, starts, check)
        except CacheFreeError as error:
            log.debug("no graph with rows that the first call joins: %s", error)
            continue
        yield discovery, later, one, found


def _loops(
    model: nn.Module,
    table: Table,
    names: dict[int, str],
    discovery: Discovery,
    first: Program,
    laters: Sequence[Program],
    check: str,
    refuse: _Refuse,
) -> Iterator[tuple[Discovery, Program, OneCall, Certified] | CacheFreeError]:
    """Graphs that are a loop from the cache, and why others are none where that tells more."""
    for attempt in _readings(discovery):
        for general in (None, *laters):
            try:
                yield _of_one_token(model, table, names, attempt, first, general, check, refuse)
            except CacheFreeError as error:
                log.debug("no loop from the cache with %s: %s", attempt.later, error)
                if isinstance(error, UnsupportedBranchError) and attempt.asked:
                    yield error


def _serves(certified: Certified, sizes: Mapping[str, int]) -> bool:
    """Whether both calls are served at some sizes: no limit's other side is worth the examples."""
    known = {size_symbol(name): size for name, size in sizes.items()}
    return all(
        any(
            all(condition.fact.subs(known) == sympy.true for condition in regime.region.conditions)
            for regime in regimes
        )
        for _, regimes in certified.shown
    )


def _joined(
    table: Table, discovery: Discovery, first: Program, later: Program
) -> tuple[OneCall, FirstValues]:
    """The one call, and the first values of its cache that are computed from the inputs."""
    one, starts = started(
        table, discovery, first, with_slots_joined(table, discovery, first, later)
    )
    if one.encoder is None or one.encoder.only_it_reads(one.outputs):
        return one, starts
    whole = with_slots_joined(table, discovery, first, later, is_parted=False)
    return started(table, discovery, first, whole)


def _with_all_inputs(
    model: nn.Module,
    table: Table,
    names: dict[int, str],
    discovery: Discovery,
    first: Program,
    later: Program,
    check: str,
    refuse: _Refuse,
) -> tuple[Discovery, Program, OneCall, Certified]:
    """The path that is given all inputs, where later calls leave out some of the first one's.

    Raises:
        UnsupportedBranchError: it is not the path that these calls take.
    """
    reason: CacheFreeError | None = None
    for one, general in _all_inputs(model, table, names, discovery, first, check, refuse):
        refuse(discovery, general)
        one, starts = started(table, discovery, first, one)
        try:
            found = certify(
                model, table, names, discovery, first, later, one, starts, check, general=general
            )
        except UnsupportedBranchError as error:
            log.debug("no graph with the first call's own inputs: %s", error)
            reason = reason or error
            continue
        return discovery, general, one, found
    raise reason or fixed_inputs(discovery.first_only)


def _all_inputs(
    model: nn.Module,
    table: Table,
    names: dict[int, str],
    discovery: Discovery,
    first: Program,
    check: str,
    refuse: _Refuse,
) -> Iterator[tuple[OneCall, Program]]:
    """Paths that are given the cache and the first call's own inputs, or what is made of them."""
    call = discovery.both
    assert call is not None
    absent = list(absences(call, discovery.first_only, discovery.hints))
    if absent:
        try:
            general = _later(model, table, names, replace(discovery, later=call), first, refuse)
        except CacheFreeError as error:
            log.debug("no path with all inputs: %s", error)
            absent = []
    for sizes in absent:
        yield OneCall(call, general.inputs, general.outputs, {}, absent=sizes), general
    if check == "prove":  # a proposal, which only a proof tells from the model
        yield from with_prefixes(model, table, names, discovery)


def _of_one_token(
    model: nn.Module,
    table: Table,
    names: dict[int, str],
    discovery: Discovery,
    first: Program,
    general: Program | None,
    check: str,
    refuse: _Refuse,
) -> tuple[Discovery, Program, OneCall, Certified]:
    """The loop over the tokens of the first path, or of a later one, that a step is a round of."""
    one = (
        with_cache_carried(table, discovery, first)
        if general is None
        else with_unread_carried(table, discovery, general)
    )
    later = of_one_token(model, table, names, discovery)
    _refuse_unfit(discovery, first, later, refuse)
    one, starts = started(table, discovery, first, one)
    certified = certify(
        model, table, names, discovery, first, later, one, starts, check, pinned=ONE_TOKEN
    )
    return discovery, later, one, certified


def _of_steps(
    model: nn.Module,
    table: Table,
    names: dict[int, str],
    discovery: Discovery,
    first: Program,
    check: str,
    refuse: _Refuse,
    reason: CacheFreeError,
) -> tuple[Discovery, Program, OneCall, Certified]:
    """The later path's step scanned over the tokens, where tests are asked for.

    Raises:
        CacheFreeError: it is not the first path; or the reason, why no other graph is.
    """
    if discovery.both is not None or not has_state(discovery):
        raise reason
    try:
        step = step_of(model, table, names, discovery)
        _refuse_unfit(discovery, first, step, refuse)
        one = with_steps_scanned(table, discovery, first, step)
    except CacheFreeError as error:
        log.debug("no step to be scanned with %s: %s", discovery.later, error)
        why = error.refusals if check == "test" else ()
        raise type(reason)(*reason.refusals, *why) from None
    if check != "test":
        raise _with_hint(reason, discovery, step) from None
    starts = first_values(model, table, discovery, first, step)
    try:
        certified = certify(
            model, table, names, discovery, first, step, one, starts, check, pinned=ONE_TOKEN
        )
    except UnsupportedBranchError as error:
        log.debug("the steps are not the first path: %s", error)
        raise type(reason)(*reason.refusals, not_its_steps(discovery, step)) from None
    return replace(discovery, notes=(*discovery.notes, SCANNED)), step, one, certified


def _with_hint(reason: CacheFreeError, discovery: Discovery, step: Program) -> CacheFreeError:
    """The reason with what tests may take, where the paths may be a parallel form and its steps."""
    if not isinstance(reason, UnsupportedBranchError):
        return reason
    return type(reason)(*reason.refusals, not_tested(discovery, step))


def _attempts(
    discovery: Discovery, asks: list[bool], without_unread: Callable[[], Discovery | None]
) -> Iterator[Discovery]:
    """The readings to try; one new token only where the code asks how many there are."""
    readings = _readings(discovery)
    yield from readings
    if not discovery.asked and any(asks):
        for reading in readings:
            yield replace(reading, asked={_QUERY: 1})
    less = without_unread()
    if less is not None:
        yield less


def _readings(discovery: Discovery) -> list[Discovery]:
    return [discovery] + ([discovery.other] if discovery.other is not None else [])


def _asks_for_tokens(later: Program) -> bool:
    query = size_symbol(_QUERY)
    return any(query in question.fact.free_symbols for question in later.captured.questions)


def _later(
    model: nn.Module,
    table: Table,
    names: dict[int, str],
    discovery: Discovery,
    first: Program,
    refuse: _Refuse,
) -> Program:
    """The captured later path, after what no graph can be was refused."""
    path, discovery.hints = capture_where_it_runs(
        model,
        discovery.later,
        discovery.hints,
        discovery.asked,
        settled=discovery.first_path.sizes,
    )
    later = read(path, table, names)
    _refuse_unfit(discovery, first, later, refuse)
    return later


def _refuse_unfit(discovery: Discovery, first: Program, later: Program, refuse: _Refuse) -> None:
    """Refuses what no graph can be."""
    refuse(discovery, later)
    refuse_writes(discovery, first, later)
    refuse_frozen_sizes(first, later)
    refuse_other_results(first, later)
    refuse_independence(discovery, later)
