"""Both paths of a model, captured, and the proof that one graph is both."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

from cachefree.align import Comparison
from cachefree.certify import Certified
from cachefree.discover import Discovery, cache_arguments
from cachefree.errors import CacheFreeError
from cachefree.isolation import StateChange
from cachefree.kept import StateMattersError, confirm_remembered
from cachefree.lifting.idle import without_unread
from cachefree.lifting.subject import find_subject, refuse_idle, refuse_unread, writes_to_state
from cachefree.memos import MEMOS
from cachefree.preconditions import refuse_shared_state
from cachefree.proof import proved
from cachefree.reading import Program, read
from cachefree.request import Request
from cachefree.terms import Table
from cachefree.write_once import OneCall

__all__ = ["MatteredError", "Paths", "proved_paths"]


@dataclass(frozen=True)
class Paths:
    """Both paths and what was shown of them.

    Attributes:
        subject: The model, or what stands for it where its cache is kept elsewhere.
        table: Of all terms.
        names: ``id`` of a parameter or buffer → its name.
        discovery: How the model is called.
        first: The first path.
        later: The later path.
        one: What the one graph is made from.
        certified: The proof.
        remembered: What calls leave on the model, though no result depends on it.
        shown: That none does.
    """

    subject: Any
    table: Table
    names: dict[int, str]
    discovery: Discovery
    first: Program
    later: Program
    one: OneCall
    certified: Certified
    remembered: tuple[StateChange, ...]
    shown: tuple[Comparison, ...]


class MatteredError(Exception):
    """What calls leave on the model was taken for something that no result depends on.

    Args:
        cause: How that was found.
        beside: The arguments that were taken for the cache meanwhile.
    """

    def __init__(self, cause: CacheFreeError, beside: Collection[str]) -> None:
        super().__init__()
        self.cause = cause
        self.beside = beside


def proved_paths(
    request: Request,
    begin: Callable[[str], None],
    *,
    remembers: bool,
    without: MatteredError | None,
) -> Paths:
    """Captures both paths and proves that one graph is both.

    Args:
        request: What is to be rewritten.
        begin: Called with the name of each stage.
        remembers: Whether what calls leave on the model may be no matter.
        without: That it was, where it is taken for a cache now.

    Raises:
        MatteredError: what calls leave on the model is a matter.
        CacheFreeError: there is no such graph.
    """
    begin("first path")
    subject, discovery = find_subject(
        request.model,
        request.example_inputs,
        request.cache,
        request.carry,
        request.method,
        remembers=remembers,
    )
    MEMOS.numbers_only = bool(discovery.first_path.values)
    _refuse_no_cache(without, discovery)
    begin("later path")
    table = Table()
    names = _names(request.model)
    first = read(discovery.first_path, table, names)

    def refuse(attempt: Discovery, later: Program) -> None:
        refuse_unread(subject, later)
        refuse_idle(subject, attempt, later)
        refuse_shared_state(attempt, first, later, is_written=writes_to_state(subject))

    try:
        discovery, later, one, certified = proved(
            subject, table, names, discovery, first, request.check, lambda: begin("proof"), refuse
        )
    except CacheFreeError as error:
        if MEMOS.kept:
            raise MatteredError(error, cache_arguments(discovery)) from error
        raise
    remembered = without_unread(subject, MEMOS.kept)
    MEMOS.may_keep = False
    shown: tuple[Comparison, ...] = ()
    if remembered:
        try:
            shown = confirm_remembered(
                subject, table, names, discovery, (first, later), certified.domain, remembered
            )
        except StateMattersError as error:
            raise MatteredError(error, cache_arguments(discovery)) from error
    return Paths(subject, table, names, discovery, first, later, one, certified, remembered, shown)


def _refuse_no_cache(mattered: MatteredError | None, discovery: Discovery) -> None:
    """Refuses a graph of what the model keeps that cannot be given the cache.

    Raises:
        CacheFreeError: why there is no graph that can.
    """
    if mattered is not None and not set(mattered.beside).isdisjoint(discovery.absent):
        raise mattered.cause


def _names(model: nn.Module) -> dict[int, str]:
    names: dict[int, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        names.setdefault(id(tensor), name)
    return names
