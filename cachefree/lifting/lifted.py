"""A model whose cache is an argument and a result, around one that keeps it elsewhere."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cachefree.calls import Call
from cachefree.errors import CaptureError, Refusal
from cachefree.fake_runs import run_on_fakes
from cachefree.inputs import call_of
from cachefree.lifting.buffers import Buffers, Live
from cachefree.lifting.contents import ABSENT, Contents, Place, lookup, put
from cachefree.lifting.facade import Facade, Forward, in_order
from cachefree.lifting.plan import Alias, Plan, Slot, describe
from cachefree.lifting.roots import roots_of
from cachefree.lifting.shared_memory import Apart
from cachefree.structure import flatten

__all__ = ["Lifted"]


@dataclass
class _Scene:
    """One call: where everything is, what was there before, and what is replaced meanwhile."""

    roots: dict[str, Any]
    contents: Contents
    lives: dict[str, Live] = field(default_factory=dict)
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)
    names: set[Place] = field(default_factory=set)


class Lifted(Facade):
    """``forward(inputs, state=None) → (result, state)``: the model without a memory.

    A call starts from what the model is when nothing was called yet, or from the given state, and
    leaves the model as it was.

    Args:
        model: The model.
        methods: What of it is called.
        plan: What is lifted.
    """

    def __init__(self, model: nn.Module, methods: Sequence[str], plan: Plan) -> None:
        super().__init__(model, methods)
        self.__dict__["plan"] = plan
        self.__dict__["forward"] = Forward(self._run, self._lifted_signature(), self._method(-1))

    def _lifted_signature(self) -> inspect.Signature:
        parameters = [
            parameter
            for name, parameter in self.own_signature.parameters.items()
            if name not in self.plan.hidden
        ]
        state = inspect.Parameter(self.plan.state, inspect.Parameter.KEYWORD_ONLY, default=None)
        is_last = not (parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
        parameters.insert(len(parameters) - (not is_last), state)
        return inspect.Signature(parameters)

    def _run(self, named: dict[str, Any]) -> Any:
        state = named.pop(self.plan.state, None)
        return self.run(named, state)

    def run(self, named: Mapping[str, Any], state: Any) -> tuple[Any, Any]:
        """Calls the model with arguments by name.

        Returns:
            What it returns, and the new state.
        """
        arguments = {part.name: part.fresh() for part in self.plan.arguments}
        roots = roots_of(self.model)
        known = {id(root): name for name, root in roots.items()}
        for name, value in arguments.items():
            if id(value) in known:
                del roots[known[id(value)]]
            roots[name] = value
        scene = _Scene(roots, Contents(roots))
        try:
            self._install(scene, state)
            named = {**named, **arguments}
            named |= {part.name: part.value(state) for part in self.plan.positions}
            with self._watching(scene):
                result = self.invoke(named, is_first=state is None)
                result = _detached(result, {id(v): name for name, v in arguments.items()})
                return result, self._collect(scene)
        finally:
            scene.contents.restore()

    def call(self, named: Mapping[str, Any], state: Any) -> Call:
        """A call by argument names, taken apart; what is lifted is left out."""
        visible = {name: value for name, value in named.items() if name not in self.plan.hidden}
        bound = inspect.BoundArguments(
            inspect.signature(self.forward),
            in_order(inspect.signature(self.forward), {**visible, self.plan.state: state}),
        )
        return call_of(self, bound.args, bound.kwargs, {})

    def after(self, named: Mapping[str, Any], state: Any) -> Any:
        """The state after a call on fake tensors."""
        leaves, structure = run_on_fakes(self, self.call(named, state), {})
        return structure.rebuild(leaves)[1]

    def sizes(self, call: Call) -> list[tuple[int, ...]]:
        """The sizes of the state's tensors after a call on fake tensors."""
        leaves, structure = run_on_fakes(self, call, {})
        return [tuple(leaf.shape) for leaf in flatten(structure.rebuild(leaves)[1])[0]]

    def _watching(self, scene: _Scene) -> contextlib.AbstractContextManager[Any]:
        stack = contextlib.ExitStack()
        if scene.replaced:
            stack.enter_context(Apart(scene.replaced))
        if scene.lives:
            stack.enter_context(Buffers(scene.lives))
        return stack

    def _install(self, scene: _Scene, state: Any) -> None:
        names: dict[int, list[Place]] = {}
        if any(slot.kind != "entry" for slot in self.plan.slots):
            for place, tensor in scene.contents.tensors():
                names.setdefault(id(tensor), []).append(place)
        for slot in self.plan.slots:
            if slot.kind == "entry":
                if state is not None:
                    value = _detached(state[slot.label], {})
                    self._put(scene, slot, _copied(value) if slot.is_written else value)
                continue
            buffer: torch.Tensor = lookup(scene.roots[slot.place.root], slot.place.steps)
            scene.replaced[slot.label] = buffer
            given = None if state is None else state[slot.label]
            if slot.kind == "live":
                buffer = torch.empty(buffer.shape, dtype=buffer.dtype, device=buffer.device)
                scene.lives[slot.label] = Live(slot.label, buffer, given)
            else:
                start = torch.zeros(buffer.shape, dtype=buffer.dtype, device=buffer.device)
                buffer = start if given is None else given.clone()
            for place in names.get(id(scene.replaced[slot.label]), ()):  # the same by other names
                scene.names.add(place)
                put(lookup(scene.roots[place.root], place.steps[:-1]), place.steps[-1], buffer)

    def _put(self, scene: _Scene, slot: Slot, value: Any) -> None:
        container = lookup(scene.roots[slot.place.root], slot.place.steps[:-1])
        put(container, slot.place.steps[-1], value)

    def _collect(self, scene: _Scene) -> dict[str, Any]:
        self._unforeseen(scene)
        state: dict[str, Any] = {}
        for slot in self.plan.slots:
            value = lookup(scene.roots[slot.place.root], slot.place.steps)
            live = scene.lives.get(slot.label)
            if live is not None:
                _refuse_replaced(live, value)
                value = ABSENT if live.content is None else live.content
            state[slot.label] = _detached(value, {})
        return state

    def _unforeseen(self, scene: _Scene) -> None:
        """Refuses a call that sets what no call before did."""
        strange = self._strange(scene)
        if strange:
            raise CaptureError(
                Refusal(
                    f"A call sets {describe(strange[0])!r}, which the calls before did not.",
                    why="One graph has one list of inputs and outputs for all calls.",
                    remedy="Set it in every call.",
                )
            )

    def _strange(self, scene: _Scene) -> list[Place]:
        """The places that changed and are no part of the state."""
        return [
            place
            for place in scene.contents.changes()
            if not any(place.is_within(slot.place) for slot in self.plan.slots)
            and not any(place.is_within(other) for other in (*self.plan.idle, *scene.names))
        ]


def _refuse_replaced(live: Live, value: Any) -> None:
    if value is not live.buffer:
        raise CaptureError(
            Refusal(
                f"The preallocated buffer {live.name!r} is replaced by a call.",
                why="It is lifted as the rows written so far.",
                remedy="Write to it in place only.",
            )
        )


def _is_tensor(value: Any) -> bool:
    return isinstance(
        value, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
    ) and not isinstance(value, nn.Parameter)


def _copied(value: Any) -> Any:
    """The value with tensors of its own: a call may write to them."""
    leaves, structure = flatten(value)
    return structure.rebuild([leaf.clone() for leaf in leaves])


def _detached(value: Any, aliases: Mapping[int, str]) -> Any:
    """The value in containers of its own: those of the model are put back after the call."""
    leaves, structure = flatten(value, lambda part: id(part) in aliases or _is_tensor(part))
    return structure.rebuild(
        [Alias(aliases[id(leaf)]) if id(leaf) in aliases else leaf for leaf in leaves]
    )
