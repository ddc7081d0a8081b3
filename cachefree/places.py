"""The places where a call takes its cache, and the parts of a result that feed them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cachefree.structure import Structure, flatten

__all__ = [
    "Carried",
    "Carry",
    "Link",
    "Place",
    "Selector",
    "empty_entries",
    "is_empty",
    "items_of",
    "regrouped",
    "select",
    "selectors",
]

Carry = Callable[[Any, Any], Any]
"""``(outputs, inputs) → later inputs``."""
Selector = tuple[Any, ...]
"""Steps into the model's result; ``("tail", n)`` is its n-th entry and all after it.

``("pairs",)`` takes what a step before gave two by two, ``("zipped",)`` takes the first of each of
its entries together, then the second, and so on.
"""


@dataclass(frozen=True)
class Place:
    """Where the call takes the cache: a parameter, or an entry inside a given container."""

    parameter: str
    position: int | None = None
    steps: tuple[Any, ...] = ()
    is_variadic: bool = False

    @property
    def path(self) -> str:
        """As Python writes it."""
        return self.parameter + "".join(f"[{step!r}]" for step in self.steps)

    def put(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call with ``value`` there."""
        if self.is_variadic:
            return (*args, *value), kwargs
        if self.position is not None and self.position < len(args):
            changed = self._inside(args[self.position], self.steps, value)
            return (*args[: self.position], changed, *args[self.position + 1 :]), kwargs
        return args, {
            **kwargs,
            self.parameter: self._inside(kwargs.get(self.parameter), self.steps, value),
        }

    def _inside(self, container: Any, steps: tuple[Any, ...], value: Any) -> Any:
        if not steps:
            return value
        if isinstance(container, tuple):
            parts = list(container)
            parts[steps[0]] = self._inside(parts[steps[0]], steps[1:], value)
            return tuple(parts)
        copied = container.copy() if hasattr(container, "copy") else container
        copied[steps[0]] = self._inside(
            container[steps[0]] if steps[1:] else None, steps[1:], value
        )
        return copied


@dataclass(frozen=True)
class Link:
    """One place of the cache and the part of the result that feeds it."""

    place: Place
    selector: Selector


@dataclass(frozen=True)
class Carried:
    """The user's own way from a result to one argument of a later call."""

    carry: Carry
    inputs: Any
    key: Any

    def __call__(self, result: Any) -> Any:
        """What the argument takes after this result."""
        return dict(items_of(self.carry(result, self.inputs)))[self.key]


def items_of(inputs: Any) -> list[tuple[Any, Any]]:
    """Arguments with their names, or with their positions."""
    return list(inputs.items()) if isinstance(inputs, Mapping) else list(enumerate(inputs))


def is_empty(value: Any) -> bool:
    """Whether a value is None or holds nothing but empty tensors and containers."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 0
    if value is None:
        return True
    if isinstance(value, (tuple, list)):
        return all(is_empty(part) for part in value)
    return isinstance(value, dict) and not value


def empty_entries(value: Any, steps: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to the empty entries inside a container; the container itself where all are empty."""
    if is_empty(value):
        return [steps]
    if isinstance(value, dict):
        return [
            found for key, part in value.items() for found in empty_entries(part, (*steps, key))
        ]
    if isinstance(value, (tuple, list)):
        return [
            found for key, part in enumerate(value) for found in empty_entries(part, (*steps, key))
        ]
    return []


def selectors(result: Any, steps: Selector = (), depth: int = 3) -> Iterator[Selector]:
    """Paths to the parts of a result that hold tensors."""
    leaves, structure = flatten(result)
    if not leaves:
        return
    yield steps
    if depth == 0 or not structure.children:
        return
    for key, child in zip(structure.keys, structure.children, strict=True):
        if child.leaf_count:
            yield from selectors(_step(result, structure, key), (*steps, key), depth - 1)
    if structure.kind in ("tuple", "list") and not steps:
        for start in range(1, len(structure.children)):
            yield (("tail", start),)


def regrouped(result: Any) -> Iterator[Selector]:
    """Parts of a result in other containers than the result has them in, in the same order.

    ``{"y": y, "h": h, "c": c}`` feeds ``(h, c)``; ``y, keys, values`` and ``y, (keys, values)``
    feed ``[(key, value), ...]``, and so does ``y, key, value, key, value``.
    """
    _, structure = flatten(result)
    if structure.kind in ("mapping", "object", "namedtuple"):
        yield from ((("tail", start),) for start in range(1, len(structure.children)))
    count = len(structure.children)
    for start in range(1, count):
        rest = structure.children[start:]
        if all(part.children for part in rest) and len(rest) > 1:
            yield (("tail", start), ("zipped",))
        if count - start > 2 and all(part.kind == "leaf" for part in rest):
            yield (("tail", start), ("pairs",))
    for key, part in zip(structure.keys, structure.children, strict=True):
        if len(part.children) > 1 and all(inner.children for inner in part.children):
            yield (key, ("zipped",))


def _entries(value: Any) -> tuple[Any, ...]:
    """The entries of a container of any kind, in order."""
    structure = flatten(value)[1]
    return tuple(_step(value, structure, key) for key in structure.keys)


def _step(value: Any, structure: Structure, key: Any) -> Any:
    return getattr(value, str(key)) if structure.kind in ("object", "namedtuple") else value[key]


def select(result: Any, selector: Selector) -> Any:
    """The part of a result that a selector leads to."""
    value = result
    for step in selector:
        if isinstance(step, Carried):
            value = step(value)
        elif isinstance(step, tuple) and step[:1] == ("tail",):
            value = _entries(value)[step[1] :]
        elif step == ("pairs",):
            if len(value) % 2:
                raise ValueError("the last entry has no other beside it")
            value = list(zip(value[::2], value[1::2], strict=True))
        elif step == ("zipped",):
            value = list(zip(*map(_entries, _entries(value)), strict=True))
        elif isinstance(value, (Mapping, list)) or type(value) is tuple:
            value = value[step]
        else:
            value = getattr(value, str(step))
    return value
