"""What calls leave on a model and no call reads: attention weights to be looked at, last inputs.

Such a place is no state, though it changes. A call is run with something in its place that cannot
be read, and takes the same path. Every capture of the rewrite is compared in that way in the end.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from cachefree.faithful import CallLog
from cachefree.fake_runs import run_on_fakes
from cachefree.isolation import NOTHING, StateChange
from cachefree.lifting.contents import ABSENT, entries, lookup, put
from cachefree.lifting.lifted import Lifted
from cachefree.lifting.plan import Plan, Slot
from cachefree.lifting.roots import roots_of
from cachefree.memos import MEMOS
from cachefree.reach import PLAIN
from cachefree.structure import flatten, leaf_paths

__all__ = ["without_idle", "without_unread"]

log = logging.getLogger(__name__)


class Unread(torch.Tensor):
    """A tensor that raises when it is read."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        """Raises."""
        raise _is_read()

    def __hash__(self) -> int:
        """Raises."""
        raise _is_read()


def _is_read(*_: Any) -> RuntimeError:
    return RuntimeError("what an earlier call left is read")


def _raising(*_: Any, **__: Any) -> Any:
    raise _is_read()


_ASKED = [name for name in vars(int) if name not in ("__new__", "__doc__", "__getattribute__")]
UnreadNumber = type("UnreadNumber", (int,), dict.fromkeys(_ASKED, _raising))
"""A number that raises when it is read: for code that asks whether something is one."""
_ODD = -7919_7919
"""Where its value is read without a question, it is seen in the path."""


def without_idle(
    model: nn.Module, methods: Sequence[str], plan: Plan, named: Mapping[str, Any], values: Any
) -> Plan:
    """The plan without the places that no call reads.

    Args:
        model: Any module.
        methods: What of it is called.
        plan: What a first call changes.
        named: The arguments of a first call, by name.
        values: The state after it.
    """
    kinds: dict[Any, list[Slot]] = {}
    for slot in plan.slots:
        is_attribute = len(slot.place.steps) == 1 and _is_module(model, slot)
        if slot.kind == "entry" and is_attribute and _may_be_idle(slot, values[slot.label]):
            kinds.setdefault(slot.place.steps[-1], []).append(slot)
    for slots in kinds.values():
        fewer = replace(
            plan,
            slots=tuple(slot for slot in plan.slots if slot not in slots),
            idle=(*plan.idle, *(slot.place for slot in slots)),
        )
        if _is_unread(model, methods, fewer, slots, named, values):
            log.info("no call reads %s", ", ".join(slot.label for slot in slots))
            plan = fewer
            MEMOS.set_idle(_settings(model, slots))
    return plan


def without_unread(model: nn.Module, changes: Sequence[StateChange]) -> tuple[StateChange, ...]:
    """Changes without those of numbers that every call sets before it reads them.

    Args:
        model: Any module.
        changes: What its captured paths leave on it.
    """
    values: dict[tuple[str, str], list[Any]] = {}
    for change in changes:
        values.setdefault((change.module, change.attribute), []).extend(
            (change.before, change.after)
        )
    numbers = {place for place, found in values.items() if all(map(_is_number, found))}
    if not numbers:
        return tuple(changes)
    for unread in (UnreadNumber(_ODD), torch.Tensor._make_subclass(Unread, torch.empty(0))):
        settings = [(model.get_submodule(module), name, unread) for module, name in numbers]
        if not MEMOS.set_idle_if_unread(settings):
            return tuple(changes)
    return tuple(change for change in changes if (change.module, change.attribute) not in numbers)


def _is_number(value: Any) -> bool:
    return value is NOTHING or isinstance(value, (*PLAIN, torch.SymInt, torch.SymFloat))


def _may_be_idle(slot: Slot, value: Any) -> bool:
    is_empty = slot.initial is None or slot.initial is ABSENT
    if type(value) in PLAIN:
        return is_empty or type(slot.initial) in PLAIN
    return is_empty and _holds_tensors_only(value)


def _holds_tensors_only(value: Any) -> bool:
    leaves, structure = flatten(value)
    is_nested = isinstance(value, (torch.Tensor, tuple, list, dict))
    return bool(leaves) and is_nested and len(leaf_paths(structure)) == _parts(value)


def _parts(value: Any) -> int:
    held = entries(value) if not isinstance(value, tuple) else dict(enumerate(value))
    return 1 if held is None else sum(map(_parts, held.values()))


_Setting = tuple[Any, Any, Any]
"""A container, a key and what is to be there."""


def _settings(model: nn.Module, slots: Sequence[Slot]) -> list[_Setting]:
    """Something that cannot be read, at each place."""
    roots = roots_of(model)
    unread = torch.Tensor._make_subclass(Unread, torch.empty(0))
    return [
        (lookup(roots[slot.place.root], slot.place.steps[:-1]), slot.place.steps[-1], unread)
        for slot in slots
    ]


def _is_unread(
    model: nn.Module,
    methods: Sequence[str],
    plan: Plan,
    slots: Sequence[Slot],
    named: Mapping[str, Any],
    values: Any,
) -> bool:
    """Whether a first and a later call take the same paths with what cannot be read in place."""
    lifted = Lifted(model, methods, plan)
    rest = {slot.label: values[slot.label] for slot in plan.slots}
    settings = _settings(model, slots)
    left, odd = (
        [
            (container, key, values[slot.label] if number is None else number)
            for slot, (container, key, _) in zip(slots, settings, strict=True)
            if type(values[slot.label]) in PLAIN
        ]
        for number in (None, UnreadNumber(_ODD))
    )
    for state in (None, rest):
        before = _calls(lifted, named, state)
        if before is None:
            return False
        for others in (settings, left, odd):
            if _calls_with(others, lifted, named, state) != before:
                return False
    return True


def _calls_with(
    settings: Sequence[_Setting], lifted: Lifted, named: Mapping[str, Any], state: Any
) -> list[Any] | None:
    """The torch functions that a call calls with something else in some places."""
    held = [(container, key, (entries(container) or {}).get(key, ABSENT))
            for container, key, _ in settings]  # fmt: skip
    try:
        for setting in settings:
            put(*setting)
        return _calls(lifted, named, state)
    finally:
        for setting in held:
            put(*setting)


def _calls(lifted: Lifted, named: Mapping[str, Any], state: Any) -> list[Any] | None:
    """The torch functions that a call calls; None where it does not run."""
    calls = CallLog()
    try:
        run_on_fakes(lifted, lifted.call(named, state), {}, calls)
    except Exception as error:  # noqa: BLE001 - the model may raise anything
        log.debug("a call does not run: %s", error)
        return None
    return [(call.name, call.args) for call in calls.calls]


def _is_module(model: nn.Module, slot: Slot) -> bool:
    return slot.place.root in dict(model.named_modules())
