"""Sees what a call changes: which places, and which tensors it writes to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cachefree.lifting.buffers import gives_itself, is_write
from cachefree.lifting.contents import TENSORS, Place, lookup
from cachefree.lifting.lifted import Lifted
from cachefree.lifting.plan import Plan, Slot, describe
from cachefree.structure import flatten

__all__ = ["Probe", "Writes"]


class Probe(Lifted):
    """Calls a model on fake tensors and sees which places change, and which tensors are written."""

    def __init__(self, model: nn.Module, methods: Sequence[str], plan: Plan) -> None:
        super().__init__(model, methods, plan)
        self.__dict__["found"] = ()
        self.__dict__["rewritten"] = frozenset()

    def _watching(self, scene: Any) -> contextlib.AbstractContextManager[Any]:
        stack = contextlib.ExitStack()
        stack.enter_context(super()._watching(scene))
        tensors = dict(scene.contents.tensors())
        entries = [
            (slot.place, leaf)
            for slot in self.plan.slots
            if slot.kind == "entry"
            for leaf in flatten(lookup(scene.roots[slot.place.root], slot.place.steps))[0]
        ]
        self.__dict__["writes"] = stack.enter_context(Writes(tensors, entries))
        return stack

    def _unforeseen(self, scene: Any) -> None:
        self.__dict__["rewritten"] = frozenset(self.writes.entries)
        entries_ = [
            Slot(describe(place), place, "entry", _initial(scene.contents.before(place)))
            for place in self._strange(scene)
        ]
        buffers = [
            Slot(describe(place), place, "live" if all(rows) else "whole", TENSORS)
            for place, rows in self.writes.written.items()
            if not any(place.is_within(slot.place) for slot in (*self.plan.slots, *entries_))
        ]
        self.__dict__["found"] = (*entries_, *buffers)


_VIEWS = frozenset(
    (
        "__getitem__",
        "narrow",
        "view",
        "transpose",
        "reshape",
        "select",
        "unsqueeze",
        "squeeze",
        "detach",
    )
)


class Writes(TorchFunctionMode):
    """Sees writes to tensors, also through views of them.

    Args:
        tensors: Place → the tensor there.
        entries: Places of the state with the tensors that an earlier call put there.

    Attributes:
        entries: Those places of the state that were written to.
        written: Place → for each write whether it was one of consecutive rows.
    """

    def __init__(
        self, tensors: dict[Place, torch.Tensor], entries: Sequence[tuple[Place, torch.Tensor]]
    ) -> None:
        super().__init__()
        self.held = {id(tensor): (tensor, place) for place, tensor in entries}
        self.entries: set[Place] = set()
        self.known = {id(tensor): (tensor, place, True) for place, tensor in tensors.items()}
        self.written: dict[Place, list[bool]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        known = self.known.get(id(args[0])) if args else None
        held = self.held.get(id(args[0])) if args else None
        result = func(*args, **(kwargs or {}))
        is_other = known is not None and result is not args[0]
        if is_other and gives_itself(name, args, kwargs or {}, result):
            return args[0]  # what stands for it is another tensor
        if held is not None and is_write(name):
            self.entries.add(held[1])
        elif held is not None and name in _VIEWS and isinstance(result, torch.Tensor):
            self.held.setdefault(id(result), (result, held[1]))
        if known is None:
            return result
        _, place, is_rows = known
        if is_write(name):
            simple = name == "copy_" or (name == "__setitem__" and _is_slices(args[1]))
            self.written.setdefault(place, []).append(is_rows and simple)
        elif name in _VIEWS and isinstance(result, torch.Tensor):
            simple = name == "narrow" or (name == "__getitem__" and _is_slices(args[1]))
            self.known.setdefault(id(result), (result, place, is_rows and simple))
        return result


def _is_slices(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(isinstance(part, slice) or part is Ellipsis for part in parts)


def _initial(value: Any) -> Any:
    return TENSORS if flatten(value)[0] else value
