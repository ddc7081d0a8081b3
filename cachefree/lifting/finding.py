"""Finds what a model keeps between its calls elsewhere than in its arguments and results."""

from __future__ import annotations

import inspect
import logging
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from cachefree.dimensions import find_dimensions, resized
from cachefree.inputs import FirstCall, find_first_call
from cachefree.lifting.contents import TENSORS, Contents, entries, lookup
from cachefree.lifting.facade import Facade
from cachefree.lifting.idle import without_idle
from cachefree.lifting.lifted import Lifted
from cachefree.lifting.plan import Argument, Plan, Position, Slot
from cachefree.lifting.roots import roots_of
from cachefree.lifting.shared_memory import refuse_overlaps
from cachefree.lifting.watching import Probe, Writes
from cachefree.structure import flatten

__all__ = ["Lifting", "find_lifting", "first_call"]

log = logging.getLogger(__name__)
_COUNTS = re.compile(r"pos|start|offset|past|step|cur|len|idx|index|seen|^[ti]$", re.IGNORECASE)
_MOST_ROUNDS = 4


@dataclass
class Lifting:
    """A model with its state as an argument, and how that is called first.

    Attributes:
        model: The lifted model.
        first: Its first call.
        stale: Places that held tensors before the first call.
        counts: Arguments that may count what the cache holds, where no size tells them.
    """

    model: Lifted
    first: FirstCall
    stale: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()


def first_call(model: nn.Module, example_inputs: Any, methods: Sequence[str]) -> FirstCall:
    """The inputs of a first call, found by calls that leave nothing behind.

    Raises:
        CaptureError: the given inputs do not run, or none were found.
    """
    shielded = _Shielded(model, methods)
    first = find_first_call(shielded, example_inputs)
    if first is not example_inputs:
        first.leaves_nothing = not shielded.has_changed
    return first


def find_lifting(
    model: nn.Module,
    example_inputs: Any,
    methods: Sequence[str],
    *,
    with_optional: bool,
) -> Lifting | None:
    """What a first call leaves behind, lifted; None where it leaves nothing that holds tensors.

    Args:
        model: Any module.
        example_inputs: Inputs of a first call, or None.
        methods: Which methods are called.
        with_optional: Whether to try an empty dict for each argument that may be left out.
    """
    first = first_call(model, example_inputs, methods)
    if first.leaves_nothing and not with_optional:
        return None
    signature = _Shielded(model, methods).own_signature
    named = dict(signature.bind(*first.args, **first.kwargs).arguments)
    if not with_optional:
        return _lifted(model, methods, signature, named, first)
    hints = _hints(getattr(model, methods[-1]))
    for more in _optional(signature, named, hints):
        try:
            found = _lifted(model, methods, signature, {**named, **more}, first)
        except Exception as error:  # noqa: BLE001 - the model may raise anything
            log.debug("the model does not run with %s: %s", more, error)
            continue
        if found is not None:
            return found
    return None


class _Shielded(Facade):
    """A model whose calls leave nothing behind, neither on it nor in what it is given.

    Attributes:
        has_changed: Whether some call put or wrote anything there, as far as it ran.
    """

    def __init__(self, model: nn.Module, methods: Sequence[str]) -> None:
        super().__init__(model, methods)
        self.__dict__["has_changed"] = False

    def invoke(self, named: Mapping[str, Any], *, is_first: bool) -> Any:
        contents = Contents({**roots_of(self.model), "arguments": dict(named)})
        writes = Writes(dict(contents.tensors()), ())
        try:
            with writes:
                return super().invoke(named, is_first=is_first)
        finally:
            self.__dict__["has_changed"] |= bool(writes.written) or bool(contents.changes())
            contents.restore()


def _hints(function: Any) -> dict[str, Any]:
    """The annotations of a function, as objects."""
    try:
        return typing.get_type_hints(function)
    except Exception as error:  # noqa: BLE001 - a name in an annotation may mean nothing
        log.debug("the annotations of %s: %s", function, error)
        return {}


def _optional(
    signature: inspect.Signature, named: dict[str, Any], hints: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """An empty dict, or an object of the annotated class, where nothing is given."""
    for name, parameter in signature.parameters.items():
        if named.get(name) is not None or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            continue
        if named.get(name, parameter.default) is None:
            yield {name: {}}
            yield from ({name: made} for made in _annotated(hints.get(name)))


def _annotated(annotation: Any) -> Iterator[Any]:
    """Objects of the user's own classes that an annotation names."""
    for cls in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(cls, type) and cls.__module__ not in ("builtins", "torch", "typing"):
            try:
                yield cls()
            except Exception as error:  # noqa: BLE001 - a class that takes arguments is not tried
                log.debug("%s() raised %s", cls.__name__, error)


def _lifted(
    model: nn.Module,
    methods: Sequence[str],
    signature: inspect.Signature,
    named: dict[str, Any],
    first: FirstCall,
) -> Lifting | None:
    """The lifting of one first call: called again and again until no place is new."""
    known = Contents(roots_of(model))
    arguments = tuple(
        Argument(name, value, value in known)
        for name, value in named.items()
        if _is_store(value, signature.parameters[name])
    )
    plan = Plan((), arguments, (), next(n for n in _names() if n not in signature.parameters))
    probe = Probe(model, methods, plan)
    probe.after(named, None)
    if not probe.found:
        return None
    plan = _with(plan, probe.found)
    values = Lifted.after(Lifted(model, methods, plan), named, None)
    plan = without_idle(model, methods, replace(plan, arguments=_filled(plan)), named, values)
    values = {slot.label: values[slot.label] for slot in plan.slots}
    if not flatten(values)[0]:
        return None
    plan = replace(plan, positions=_positions(model, methods, plan, named))
    for _ in range(_MOST_ROUNDS):
        probe = Probe(model, methods, plan)
        try:
            probe.after(named, values)
        except Exception as error:  # noqa: BLE001 - discovery tells why a later call does not run
            log.debug("a later call does not run: %s", error)
            break
        plan = _with(plan, probe.found)
        written = [slot for slot in plan.slots if slot.place in probe.rewritten]
        plan = replace(
            plan,
            slots=tuple(replace(s, is_written=s.is_written or s in written) for s in plan.slots),
        )
        if not probe.found:
            break
        values = Lifted(model, methods, plan).after(named, None)
    roots = roots_of(model)
    refuse_overlaps(
        {
            slot.label: lookup(roots[slot.place.root], slot.place.steps)
            for slot in plan.slots
            if slot.kind != "entry"
        }
    )
    lifted = Lifted(model, methods, plan)
    visible = {name: value for name, value in named.items() if name not in plan.hidden}
    bound = inspect.BoundArguments(inspect.signature(lifted.forward), visible)
    call = FirstCall(bound.args, dict(bound.kwargs), first.assumed, first.is_given)
    counts = () if plan.positions else _counts(lifted, named)
    return Lifting(lifted, call, _stale(plan), counts)


def _with(plan: Plan, found: Sequence[Slot]) -> Plan:
    """The plan with more slots, one label each."""
    labels = {slot.label for slot in plan.slots}
    slots = list(plan.slots)
    for slot in found:
        label = slot.label
        while label in labels:
            label += "_"
        labels.add(label)
        slots.append(replace(slot, label=label))
    return replace(plan, slots=tuple(slots))


def _filled(plan: Plan) -> tuple[Argument, ...]:
    """The arguments that calls do fill."""
    return tuple(
        argument
        for argument in plan.arguments
        if any(slot.place.root == argument.name for slot in plan.slots)
    )


def _stale(plan: Plan) -> tuple[str, ...]:
    """Places of the state, other than buffers, that hold tensors before the first call."""
    return tuple(
        slot.label for slot in plan.slots if slot.kind == "entry" and slot.initial is TENSORS
    )


def _names() -> Iterator[str]:
    yield from ("past", "state", "cache")
    yield from (f"state_{number}" for number in range(1, 10**6))


def _is_store(value: Any, parameter: inspect.Parameter) -> bool:
    """Whether an argument is a container without tensors that a call may fill."""
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return False
    if isinstance(value, nn.Module) or entries(value) is None:
        return False
    return not flatten(value)[0]


def _positions(
    model: nn.Module, methods: Sequence[str], plan: Plan, named: dict[str, Any]
) -> tuple[Position, ...]:
    """The arguments that are 0 on a first call and may count what the cache holds."""
    lifted = Lifted(model, methods, plan)
    candidates = _counts(lifted, named)
    if not candidates:
        return ()
    call, groups = find_dimensions(lifted, lifted.call(named, None))
    for group in sorted(groups, key=lambda group: min(axis for _, axis in group) == 0):
        sizes = []
        for size in (5, 8):
            try:
                sizes.append(lifted.sizes(resized(call, dict.fromkeys(group, size))))
            except Exception as error:  # noqa: BLE001 - the model may raise anything
                log.debug("the model does not run with %s tokens: %s", size, error)
        for leaf, shapes in enumerate(zip(*sizes, strict=False)):
            grown = [a for a, (one, two) in enumerate(zip(*shapes, strict=False)) if two - one == 3]
            if len(sizes) == 2 and grown:
                return tuple(Position(name, leaf, grown[0]) for name in candidates)
    return ()


def _counts(lifted: Lifted, named: dict[str, Any]) -> tuple[str, ...]:
    return tuple(
        name
        for name, parameter in lifted.own_signature.parameters.items()
        if _COUNTS.search(name) and _is_zero(named.get(name, parameter.default))
    )


def _is_zero(value: Any) -> bool:
    return type(value) is int and value == 0
