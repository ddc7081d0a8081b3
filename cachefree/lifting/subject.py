"""What of a model is rewritten: the model, another of its methods, or it without a memory."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from cachefree.capture import Captured
from cachefree.discover import Carry, Discovery, discover
from cachefree.errors import CacheFreeError, CacheNotFoundError, CaptureError, Refusal
from cachefree.inputs import FirstCall
from cachefree.lifting.contents import Contents
from cachefree.lifting.facade import Facade
from cachefree.lifting.finding import Lifting, find_lifting, first_call
from cachefree.lifting.given import refuse_unknown_start
from cachefree.lifting.keeping import Keeper
from cachefree.lifting.lifted import Lifted
from cachefree.lifting.plan import describe
from cachefree.lifting.roots import roots_of
from cachefree.memos import MEMOS
from cachefree.reading import Program
from cachefree.terms import topological

__all__ = [
    "assumed_of",
    "called_alike",
    "find_subject",
    "keeper_of",
    "refuse_idle",
    "refuse_unread",
    "writes_to_state",
]

log = logging.getLogger(__name__)


def find_subject(
    model: nn.Module,
    example_inputs: Any,
    cache: str | Sequence[str] | None,
    carry: Carry | None,
    method: str | Sequence[str],
    *,
    remembers: bool = False,
) -> tuple[nn.Module, Discovery]:
    """What is rewritten, and how it is called.

    Args:
        model: Any module.
        example_inputs: Inputs of a first call, or None.
        cache: Names of the cache's arguments, or None.
        carry: ``(outputs, inputs) → later inputs``, or None.
        method: The method that is called; two where the first call has one of its own.
        remembers: Whether what calls leave on the model may be something that no result depends
            on, beside a cache that is an argument. It is then in `MEMOS`, to be confirmed.

    Raises:
        CacheNotFoundError: no argument carries a cache, or several could.
        CaptureError: the model does not run or cannot be traced.
    """
    methods = _methods(model, method)
    own = model if methods == ("forward",) else Facade(model, methods)
    is_told = cache is not None or carry is not None
    if not is_told:
        example_inputs = _first_call(model, example_inputs, methods)
    lifting = None if is_told else _first_found(model, example_inputs, methods)
    if remembers and lifting is not None and not lifting.model.plan.arguments:
        MEMOS.may_keep = True
        try:
            return own, discover(own, example_inputs)
        except CacheFreeError as error:
            log.debug("no cache beside what the model keeps: %s", error)
            MEMOS.may_keep = False
            MEMOS.kept.clear()
    if lifting is None:
        MEMOS.may_keep = remembers
        try:
            return own, discover(own, example_inputs, cache=cache, carry=carry)
        except CacheNotFoundError:
            if is_told:
                raise
            MEMOS.may_keep = False
            lifting = find_lifting(model, example_inputs, methods, with_optional=True)
            if lifting is None:
                raise
    try:
        return lifting.model, _discovered(lifting)
    except CacheFreeError:
        if lifting.model.plan.arguments:
            raise
        # what a hook writes may be for the user's eyes only, beside a cache that is an argument
        try:
            found = discover(own, example_inputs, cache=cache, carry=carry)
        except CacheFreeError:
            found = None
        if found is None:
            raise
        return own, found


def _first_call(model: nn.Module, example_inputs: Any, methods: tuple[str, ...]) -> FirstCall:
    """The inputs of a first call; the refusal says where the model is not as it was before one."""
    with _telling_of_held_tensors(model):
        return first_call(model, example_inputs, methods)


def _first_found(model: nn.Module, example_inputs: Any, methods: tuple[str, ...]) -> Lifting | None:
    """The lifting of the first call as it is given."""
    with _telling_of_held_tensors(model):
        return find_lifting(model, example_inputs, methods, with_optional=False)


@contextlib.contextmanager
def _telling_of_held_tensors(model: nn.Module) -> Iterator[None]:
    try:
        yield
    except CaptureError as error:
        held = _held_tensors(model)
        if held:
            raise CaptureError(_stale(held), *error.refusals) from error
        raise


def assumed_of(subject: nn.Module) -> tuple[str, ...]:
    """How state was read that the model keeps, in words, where that is not proved by laws."""
    if not isinstance(subject, Lifted):
        return ()
    return tuple(
        f"the buffer {slot.label} is the rows written to it so far"
        for slot in subject.plan.slots
        if slot.kind == "live"
    )


def refuse_unread(subject: nn.Module, later: Program) -> None:
    """Refuses a graph that reads a preallocated buffer where nothing was written.

    Raises:
        CaptureError: it does.
    """
    if not isinstance(subject, Lifted):
        return
    lives = [slot.label for slot in subject.plan.slots if slot.kind == "live"]
    for term in topological(later.outputs) if lives else ():
        if term.op is torch.ops.aten.empty.memory_format:
            raise CaptureError(
                Refusal(
                    f"A preallocated buffer ({', '.join(lives[:3])}) is read where nothing was "
                    "written.",
                    why="A buffer is lifted as the rows written so far.",
                    remedy="Read the rows that were written; or pass the cache in and return it.",
                    where=term.line,
                )
            )


def writes_to_state(subject: nn.Module) -> bool:
    """Whether calls write in place to what an earlier call put where a lifted model keeps it."""
    return isinstance(subject, Lifted) and any(slot.is_written for slot in subject.plan.slots)


def _discovered(lifting: Lifting) -> Discovery:
    state = lifting.model.plan.state
    try:
        refuse_unknown_start(lifting)
        return discover(
            lifting.model, lifting.first, carry=lambda outputs, inputs: {state: outputs[1]}
        )
    except CacheFreeError as error:
        places = [slot.label for slot in lifting.model.plan.slots]
        told = ", ".join(places[:4]) + (" …" if len(places) > 4 else "")
        if lifting.stale:
            raise CaptureError(_stale(lifting.stale), *error.refusals) from error
        raise type(error)(
            Refusal(
                f"The model keeps state between calls: forward sets {told}.",
                why="What a call leaves behind changes the next call, and a later call could not "
                "be followed.",
                remedy="Pass it in and return it, as an argument of forward.",
            ),
            *error.refusals,
        ) from error


def refuse_idle(subject: nn.Module, discovery: Discovery, later: Program) -> None:
    """Refuses a lifted model whose results do not depend on what it keeps.

    Raises:
        CaptureError: they do not.
    """
    if not isinstance(subject, Lifted):
        return
    own = [out for at, out in enumerate(later.outputs) if at not in discovery.carried]
    used = set(topological(own))
    if not any(later.inputs[at] in used for at in discovery.cache_leaves):
        labels = [slot.label for slot in subject.plan.slots]
        raise CaptureError(
            Refusal(
                f"The model keeps state on itself, {', '.join(labels[:3])}, and no result of a "
                "call depends on it.",
                why="It is no cache; and a graph has no memory to keep it in.",
                remedy="Do not set it in forward; or return it.",
            )
        )


def _stale(places: Sequence[str]) -> Refusal:
    return Refusal(
        f"The model holds tensors of an earlier call: {', '.join(places[:4])}.",
        why="A first call starts from what the model is when it is rewritten.",
        remedy="Reset the model before it is rewritten.",
    )


def _held_tensors(model: nn.Module) -> list[str]:
    """Tensors that the model holds and that are neither parameters nor buffers."""
    own = {id(tensor) for tensor in model.buffers()}
    tensors = Contents(roots_of(model)).tensors()
    return [describe(place) for place, tensor in tensors if id(tensor) not in own]


def _methods(model: nn.Module, method: str | Sequence[str]) -> tuple[str, ...]:
    methods = (method,) if isinstance(method, str) else tuple(method)
    missing = [name for name in methods if not callable(getattr(model, name, None))]
    if missing or len(methods) not in (1, 2):
        raise CaptureError(
            Refusal(
                f"{type(model).__name__} has no method {missing[0]!r}."
                if missing
                else f"method={method!r} names {len(methods)} methods.",
                why="The graph is captured from a method of the model.",
                remedy="Name one method, or one for the first call and one for later calls.",
            )
        )
    return methods


def keeper_of(subject: nn.Module, later: Captured) -> Keeper | None:
    """What keeps the state of a lifted model; None where the cache is an argument."""
    if isinstance(subject, Lifted):
        structure = later.outputs.children[1]
        return Keeper(subject.plan, subject.own_signature, subject.methods, structure)
    return None


def called_alike(model: nn.Module, rewritten: Any) -> nn.Module:
    """A model called as ``rewritten`` calls its graph: with its state, if any, as an argument."""
    if rewritten.keeper is not None:
        return Lifted(model, rewritten.keeper.methods, rewritten.keeper.plan)
    methods = rewritten.calling.methods
    return Facade(model, methods) if methods else model
