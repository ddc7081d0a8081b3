"""How a random program holds its cache: what it takes, what it returns, how the rows are told."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from .layers import Layer

__all__ = ["Container", "container"]


@dataclasses.dataclass(frozen=True)
class Container:
    """The source of a container.

    Attributes:
      kind: Its name.
      classes: Definitions before the model.
      unpack: Lines that make ``entries``, a tuple of tensors or None for each layer.
      pack: An expression of the cache, over ``presents``.
      first: What the first call passes; empty where it passes nothing.
      is_kept: Whether the model keeps it on itself.
    """

    kind: str
    unpack: tuple[str, ...]
    pack: str
    classes: tuple[str, ...] = ()
    first: str = ""
    is_kept: bool = False


def container(draw: random.Random, layers: Sequence[Layer]) -> Container:
    """A random container for the states of these layers."""
    count = len(layers)
    none = f"[None] * {count}"
    choices = [
        Container("tuple", (f"entries = past if past is not None else {none}",), "tuple(presents)"),
        Container("list", (f"entries = past or {none}",), "presents"),
        Container("nones", (f"entries = past if past else {none}",), "presents", first=none),
        Container(
            "dict",
            (f"entries = [past[f'layer{{i}}'] if past else None for i in range({count})]",),
            "{f'layer{i}': present for i, present in enumerate(presents)}",
        ),
        Container(
            "dataclass",
            (f"entries = {none} if past is None else past.entries",),
            "Cache(tuple(presents))",
            ("@dataclasses.dataclass", "class Cache:", "    entries: tuple", "", ""),
        ),
        Container("flat", _unflattened(layers), "tuple(part for one in presents for part in one)"),
        _dicts(layers),
        _named(layers),
        Container(
            "kept",
            ("past = self.kept", f"entries = past if past is not None else {none}"),
            "presents",
            is_kept=True,
        ),
    ]
    if all(layer.kind == "attention" for layer in layers) and len({la.body for la in layers}) == 1:
        choices += [_stacked(count)] * 3
    return draw.choice(choices)


def _unflattened(layers: Sequence[Layer]) -> tuple[str, ...]:
    lines, start = [], 0
    for layer in layers:
        lines.append(f"past[{start}:{start + len(layer.state)}]")
        start += len(layer.state)
    nones = f"[None] * {len(layers)}"
    return (f"entries = {nones} if past is None else [{', '.join(lines)}]",)


def _dicts(layers: Sequence[Layer]) -> Container:
    parts = [
        "{" + ", ".join(f"'s{j}': presents[{i}][{j}]" for j in range(len(layer.state))) + "}"
        for i, layer in enumerate(layers)
    ]
    nones = f"[None] * {len(layers)}"
    unpack = (f"entries = {nones} if past is None else [tuple(one.values()) for one in past]",)
    return Container("dicts", unpack, f"[{', '.join(parts)}]")


def _named(layers: Sequence[Layer]) -> Container:
    names = [f"s{i}_{j}" for i, layer in enumerate(layers) for j in range(len(layer.state))]
    definition = f"States = namedtuple('States', {' '.join(names)!r})"
    return Container(
        "namedtuple",
        _unflattened(layers),
        "States(*[part for one in presents for part in one])",
        (definition, "", ""),
    )


def _stacked(count: int) -> Container:
    unpack = (
        f"entries = [None] * {count} if past is None else [(one[0], one[1]) for one in past]",
    )
    return Container("stacked", unpack, "torch.stack([torch.stack(one) for one in presents])")
