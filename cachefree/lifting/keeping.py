"""The state put back where the model's own way of being called has it."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cachefree.errors import DomainError, Refusal
from cachefree.lifting.contents import ABSENT, entries, is_same, lookup, put
from cachefree.lifting.plan import Alias, Argument, Plan, Slot
from cachefree.structure import Structure, flatten

__all__ = ["Keeper"]

Pure = Callable[..., tuple[Any, Any]]


@dataclass
class _Call:
    """One call: its arguments for the pure model, and the containers that the caller passed."""

    named: dict[str, Any]
    containers: dict[str, Any]
    state: Any


class Keeper:
    """Calls a pure model as the model itself is called, and keeps its state between calls.

    Args:
        plan: What was lifted.
        signature: Of the model's own method.
        methods: The names of the methods that were lifted.
        structure: Of the state after a call.
    """

    def __init__(
        self,
        plan: Plan,
        signature: inspect.Signature,
        methods: tuple[str, ...],
        structure: Structure,
    ) -> None:
        self.plan = plan
        self.signature = signature
        self.methods = methods
        self.structure = structure
        self.held: dict[str, Any] | None = None
        self._lock = threading.Lock()
        roots = {argument.name for argument in plan.arguments}
        self._own = [slot for slot in plan.slots if slot.place.root not in roots]

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "_lock"}
        leaves, structure = flatten(self.held)
        return {**state, "held": structure.rebuild([leaf.detach() for leaf in leaves])}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def is_first(self, method: str) -> bool | None:
        """Whether a method is that of first calls; None where there is one for all calls."""
        return method == self.methods[0] if len(self.methods) > 1 else None

    def another(self) -> Keeper:
        """The same with a state of its own."""
        return Keeper(self.plan, self.signature, self.methods, self.structure)

    def reset(self) -> None:
        """Makes the next call a first call.

        Raises:
            DomainError: another thread is in a call.
        """
        with self._alone():
            self.held = None

    def is_pure(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether a call gives the state itself."""
        return self.plan.state in kwargs

    def call(
        self,
        pure: Pure,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        is_first: bool | None = None,
    ) -> Any:
        """Calls ``pure(inputs, state) → (result, state)`` as the model itself is called.

        Nothing is written before the call has succeeded.

        Args:
            pure: The model without a memory.
            args: Positional arguments.
            kwargs: Keyword arguments.
            is_first: Whether the method that was called is that of first calls, or that of later
                ones; None where there is one for both.

        Raises:
            DomainError: the state given is no state of the model, or two threads call at once.
        """
        with self._alone():
            call = self._taken_apart(args, kwargs)
            if is_first is not None and is_first != (call.state is None):
                raise DomainError(_wrong_method(self.methods, is_first))
            call.named[self.plan.state] = call.state
            try:
                result, state = _called(pure, self.signature, call.named)
            except DomainError as error:
                raise self._explained(error) from None
            if self._own:
                self.held = {slot.label: state[slot.label] for slot in self._own}
            for argument in self.plan.arguments:
                self._fill(argument, call.containers[argument.name], state)
            return _with_containers(result, call.containers)

    def container_with(self, state: Mapping[str, Any]) -> Any:
        """The argument that calls fill, holding a state; a dict by name where there are several."""
        found = {}
        for argument in self.plan.arguments:
            found[argument.name] = Argument(argument.name, argument.template).fresh()
            self._fill(argument, found[argument.name], state)
        return next(iter(found.values())) if len(found) == 1 else found

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise DomainError(
                Refusal(
                    "Two calls run at the same time.",
                    why="The module keeps the cache from call to call; two threads would mix it.",
                    remedy="Use one copy for each thread: copy.deepcopy(rewritten); or give and "
                    f"take the cache: rewritten(…, {self.plan.state}=…).",
                )
            )
        try:
            yield
        finally:
            self._lock.release()

    def _taken_apart(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        try:
            named = dict(self.signature.bind_partial(*args, **kwargs).arguments)
        except TypeError as error:
            raise DomainError(
                Refusal(
                    f"{error}.",
                    why=f"The arguments are {', '.join(self.signature.parameters)}.",
                    remedy="Call it as the model is called.",
                )
            ) from None
        containers = {part.name: named.pop(part.name, None) for part in self.plan.arguments}
        for argument in self.plan.arguments:
            self._check_container(argument, containers[argument.name])
        state = self._state(containers)
        if self._starts_again(named):
            state = None
        for position in self.plan.positions:
            given = named.pop(position.name, self.signature.parameters[position.name].default)
            due = position.value(state)
            if not torch.compiler.is_compiling() and given != due:
                raise DomainError(
                    Refusal(
                        f"{position.name} is {given!r} where the cache holds {due!r}.",
                        why="The model was rewritten as one whose calls follow one another.",
                        remedy=f"Pass {position.name}={due!r}; for a new sequence, call reset() "
                        "or pass an empty cache.",
                    )
                )
        return _Call(named, containers, state)

    def _starts_again(self, named: Mapping[str, Any]) -> bool:
        """Whether a call writes preallocated buffers from their beginning on.

        What they held is then read no more, and there is nothing else.
        """
        return (
            bool(self.plan.positions)
            and all(slot.kind == "live" for slot in self.plan.slots)
            and all(
                named.get(part.name, self.signature.parameters[part.name].default) == 0
                for part in self.plan.positions
            )
        )

    def _check_container(self, argument: Argument, container: Any) -> None:
        name = argument.name
        if container is None:
            raise DomainError(
                Refusal(
                    f"The argument {name!r} is missing.",
                    why="The model was rewritten with it: it holds the cache.",
                    remedy=f"Pass {name}, empty on the first call; rewritten.empty_cache() is one.",
                )
            )
        if not isinstance(container, type(argument.template)):
            raise DomainError(
                Refusal(
                    f"{name} is a {type(container).__name__}; a "
                    f"{type(argument.template).__name__} is expected.",
                    why="The model was rewritten with one: it holds the cache.",
                    remedy="Pass what the model itself takes.",
                )
            )
        slots = [slot for slot in self.plan.slots if slot.place.root == name]
        other = _set_otherwise(container, argument.template, slots, (), name)
        if other is not None:
            raise DomainError(
                Refusal(
                    f"The call does not fit: {other}.",
                    why="It was a constant of the model's code when the graph was captured.",
                    remedy=f"Pass a {name} that is set up as the one in example_inputs, or rewrite "
                    "with one like this.",
                )
            )
        strange = _strange(container, argument.template, slots, ())
        if strange is not None:
            raise DomainError(
                Refusal(
                    f"{name} holds {strange}, which no call of this model puts there.",
                    why="It may be the cache of another model.",
                    remedy=f"Use one {name} for one model, empty on its first call.",
                )
            )

    def _state(self, containers: Mapping[str, Any]) -> dict[str, Any] | None:
        """The state that a call starts from; None for a first call."""
        roots = {argument.name: argument.template for argument in self.plan.arguments}
        state: dict[str, Any] = {}
        fresh: list[Slot] = []
        later: list[Slot] = []
        for slot in self.plan.slots:
            root = slot.place.root
            if root in roots:
                value = lookup(containers[root], slot.place.steps)
                is_fresh = _is_fresh(value, lookup(roots[root], slot.place.steps))
            else:
                is_fresh = self.held is None
                value = None if self.held is None else self.held[slot.label]
            (fresh if is_fresh else later).append(slot)
            state[slot.label] = value
        if not later:
            return None
        missing = [slot for slot in fresh if self._changes(slot)]
        if missing:
            raise DomainError(
                Refusal(
                    f"A part of the cache is missing: {', '.join(s.label for s in missing[:3])}.",
                    why=f"{later[0].label} is there. A call takes all of the cache or nothing.",
                    remedy="Pass the whole cache, or an empty one; where the model keeps a part of "
                    "it, call reset() with each empty one.",
                )
            )
        return state

    def _changes(self, slot: Slot) -> bool:
        """Whether a call leaves something else there than what was there first."""
        child = self.structure.children[self.structure.keys.index(slot.label)]
        return bool(child.leaf_count) or not is_same(child.value, slot.initial)

    def _fill(self, argument: Argument, container: Any, state: Mapping[str, Any]) -> None:
        for slot in self.plan.slots:
            if slot.place.root == argument.name:
                holder = lookup(container, slot.place.steps[:-1])
                put(holder, slot.place.steps[-1], state[slot.label])

    def _explained(self, error: DomainError) -> DomainError:
        if self.held is None:
            return error
        return DomainError(
            *(
                Refusal(
                    refusal.what,
                    refusal.why,
                    f"{refusal.remedy} For a new sequence, call reset() first.",
                    refusal.where,
                )
                for refusal in error.refusals
            )
        )


def _wrong_method(methods: tuple[str, ...], is_first: bool) -> Refusal:
    return Refusal(
        f"{methods[0]} is called while there is a cache."
        if is_first
        else f"{methods[-1]} is called before there is a cache.",
        why=f"The first call of a sequence is {methods[0]}, later ones are {methods[-1]}.",
        remedy=f"For a new sequence, call reset() or pass an empty cache, and then {methods[0]}.",
    )


def _called(pure: Pure, signature: inspect.Signature, named: dict[str, Any]) -> tuple[Any, Any]:
    """Calls with arguments by name, those that have none by position."""
    args: list[Any] = []
    kwargs = dict(named)
    for name, parameter in signature.parameters.items():
        if name not in kwargs:
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY:
            args.append(kwargs.pop(name))
        elif parameter.kind is parameter.VAR_POSITIONAL:
            before = [n for n in signature.parameters if n in kwargs]
            args += [kwargs.pop(n) for n in before[: before.index(name)]]
            args += kwargs.pop(name)
        elif parameter.kind is parameter.VAR_KEYWORD:
            kwargs.update(kwargs.pop(name))
    return pure(*args, **kwargs)


def _with_containers(result: Any, containers: Mapping[str, Any]) -> Any:
    """The result with the caller's own containers where the model returns them."""
    leaves, structure = flatten(result, lambda part: isinstance(part, (Alias, torch.Tensor)))
    if not any(isinstance(leaf, Alias) for leaf in leaves):
        return result
    return structure.rebuild(
        [containers[leaf.name] if isinstance(leaf, Alias) else leaf for leaf in leaves]
    )


def _is_fresh(value: Any, template: Any) -> bool:
    if is_same(value, template):
        return True
    one, other = entries(value), entries(template)
    return (
        one is not None
        and other is not None
        and not flatten(value)[0]
        and one.keys() == other.keys()
    )


def _set_otherwise(
    value: Any, template: Any, slots: list[Slot], steps: tuple[Any, ...], path: str
) -> str | None:
    """A number, flag or text that no call changes and that differs from the template's."""
    if any(slot.place.steps == steps for slot in slots):
        return None
    held, known = entries(value), entries(template)
    if held is not None and known is not None:
        pairs = ((key, part) for key, part in held.items() if key in known)
        texts = (
            _set_otherwise(part, known[key], slots, (*steps, key), f"{path}.{key}")
            for key, part in pairs
        )
        return next((text for text in texts if text is not None), None)
    if isinstance(template, (int, float, str)) and value != template:
        return f"{path} is {value!r} where {template!r} is expected"
    return None


def _strange(value: Any, template: Any, slots: list[Slot], steps: tuple[Any, ...]) -> str | None:
    """An entry of a container that is neither state nor in the template, in words."""
    if any(slot.place.steps == steps for slot in slots):
        return None
    held, known = entries(value), entries(template)
    if held is None or known is None:
        return None if template is not ABSENT else repr(steps[-1])
    for key, part in held.items():
        inner = (*steps, key)
        if key not in known and not any(slot.place.steps[: len(inner)] == inner for slot in slots):
            return f"the entry {key!r}" if isinstance(key, (str, int)) else "another entry"
        found = _strange(part, known.get(key, ABSENT), slots, inner)
        if found is not None:
            return found
    return None
