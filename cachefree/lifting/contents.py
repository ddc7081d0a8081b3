"""What mutable values hold, remembered before a call, compared after it, and put back."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = [
    "ABSENT",
    "TENSORS",
    "Contents",
    "Place",
    "cloned",
    "entries",
    "is_same",
    "lookup",
    "put",
]


class _Mark(enum.Enum):
    """What stands for a value. An enumeration, so that a copy of it is itself."""

    ABSENT = "no value"
    TENSORS = "tensors"

    def __repr__(self) -> str:
        return f"<{self.value}>"


ABSENT, TENSORS = _Mark.ABSENT, _Mark.TENSORS
_MODULE_OWN = frozenset(vars(nn.Module()))
_ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Place:
    """Where a value is held: a root, and the way from it through containers.

    Attributes:
        root: Which root.
        steps: Attribute names, keys and indices; at least one.
    """

    root: str
    steps: tuple[Any, ...]

    def is_within(self, other: Place) -> bool:
        """Whether this is the other place, or below it."""
        own = self.steps[: len(other.steps)]
        return self.root == other.root and len(own) == len(other.steps) and own == other.steps


def entries(value: Any) -> dict[Any, Any] | None:
    """What a mutable value holds, by key; None where it is no container."""
    if isinstance(value, nn.Module):
        own = {name: part for name, part in vars(value).items() if name not in _MODULE_OWN}
        return {**own, **value._buffers}
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, (list, deque)):
        return dict(enumerate(value))
    if _holds_attributes(value):
        return dict(vars(value))
    return None


def _within(value: Any) -> dict[Any, Any] | None:
    """What a value holds, by key: a tuple cannot be set, yet what is in it may change."""
    return dict(enumerate(value)) if type(value) is tuple else entries(value)


def _holds_attributes(value: Any) -> bool:
    if isinstance(value, (torch.Tensor, type, enum.Enum)) or callable(value):
        return False
    home = type(value).__module__.split(".")[0]
    return home not in ("builtins", "torch", "types", "threading", "_thread") and hasattr(
        value, "__dict__"
    )


def put(container: Any, key: Any, value: Any) -> None:
    """Sets one entry; `ABSENT` removes it."""
    if isinstance(container, nn.Module):
        held = container._buffers if key in container._buffers else vars(container)
    elif isinstance(container, dict):
        held = container
    elif isinstance(container, (list, deque)):
        if value is ABSENT:
            del container[key]
        elif key == len(container):
            container.append(value)
        else:
            container[key] = value
        return
    else:
        held = vars(container)
    if value is ABSENT:
        held.pop(key, None)
    else:
        held[key] = value


def lookup(root: Any, steps: tuple[Any, ...]) -> Any:
    """The value at the end of the way; `ABSENT` where there is none."""
    value = root
    for step in steps:
        held = _within(value)
        if held is None or step not in held:
            return ABSENT
        value = held[step]
    return value


def cloned(value: Any, known: dict[int, Any] | None = None) -> Any:
    """A copy of containers and plain objects; what they hold otherwise is shared."""
    known = {} if known is None else known
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(cloned(part, known) for part in value)
    held = None if isinstance(value, nn.Module) else entries(value)
    if held is None:
        return value
    copy = value.copy() if isinstance(value, (dict, list, deque)) else object.__new__(type(value))
    known[id(value)] = copy
    for key, part in held.items():
        put(copy, key, cloned(part, known))
    return copy


def is_same(one: Any, other: Any) -> bool:
    """Whether two values are the same object, or equal plain values."""
    if one is other:
        return True
    return type(one) is type(other) and isinstance(one, _ATOMS) and bool(one == other)


class Contents:
    """What everything that is reachable from some roots holds now.

    Modules are entered as roots only.

    Args:
        roots: Name → a module or another container.
    """

    def __init__(self, roots: Mapping[str, Any]) -> None:
        self.roots = dict(roots)
        self._before: dict[int, tuple[Any, dict[Any, Any]]] = {}
        for root in roots.values():
            self._remember(root, is_root=True)

    def _remember(self, value: Any, *, is_root: bool = False) -> None:
        if id(value) in self._before or (isinstance(value, nn.Module) and not is_root):
            return
        held = _within(value)
        if held is None:
            return
        self._before[id(value)] = (value, held)
        for part in held.values():
            self._remember(part)

    def __contains__(self, value: Any) -> bool:
        return id(value) in self._before

    def changes(self) -> list[Place]:
        """The places that hold something else now."""
        seen: set[int] = set()
        return [
            place
            for name, root in self.roots.items()
            for place in self._changes(name, (), root, seen)
        ]

    def _changes(
        self, root: str, steps: tuple[Any, ...], value: Any, seen: set[int]
    ) -> Iterator[Place]:
        if id(value) in seen or id(value) not in self._before:
            return
        seen.add(id(value))
        before, now = self._before[id(value)][1], _within(value) or {}
        for key, part in now.items():
            if key not in before or not is_same(before[key], part):
                yield Place(root, (*steps, key))
            elif not isinstance(part, nn.Module):
                yield from self._changes(root, (*steps, key), part, seen)
        for key in before:
            if key not in now:
                yield Place(root, (*steps, key))

    def before(self, place: Place) -> Any:
        """What was at a place; `ABSENT` where nothing was."""
        value = self.roots[place.root]
        for step in place.steps:
            if id(value) not in self._before or step not in self._before[id(value)][1]:
                return ABSENT
            value = self._before[id(value)][1][step]
        return value

    def tensors(self) -> Iterator[tuple[Place, torch.Tensor]]:
        """The tensors that are held and are no parameters."""
        seen: set[int] = set()
        for name, root in self.roots.items():
            yield from self._tensors(name, (), root, seen)

    def _tensors(
        self, root: str, steps: tuple[Any, ...], value: Any, seen: set[int]
    ) -> Iterator[tuple[Place, torch.Tensor]]:
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter) and steps:
            yield Place(root, steps), value
        if id(value) in seen or id(value) not in self._before:
            return
        seen.add(id(value))
        for key, part in self._before[id(value)][1].items():
            is_fixed = type(value) is tuple and isinstance(part, torch.Tensor)
            if not isinstance(part, nn.Module) and not is_fixed:
                yield from self._tensors(root, (*steps, key), part, seen)

    def restore(self) -> None:
        """Puts everything back, the order of entries too."""
        for value, before in self._before.values():
            if type(value) is tuple:
                continue
            now = entries(value) or {}
            if list(now) == list(before) and all(now[key] is before[key] for key in now):
                continue
            _refill(value, now, before)


def _refill(value: Any, now: Mapping[Any, Any], before: Mapping[Any, Any]) -> None:
    if isinstance(value, (list, deque)):
        value.clear()
        value.extend(before.values())
        return
    for key in now:
        if key not in before or not isinstance(value, nn.Module):
            put(value, key, ABSENT)
    for key, part in before.items():
        put(value, key, part)
