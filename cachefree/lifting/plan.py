"""What of a model's state is lifted, and where it is put back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cachefree.lifting.contents import Place, cloned
from cachefree.structure import flatten

__all__ = ["Alias", "Argument", "Plan", "Position", "Slot", "describe"]


@dataclass(frozen=True)
class Argument:
    """An argument that the call fills: a dict, a list or an object.

    Attributes:
        name: Of the argument.
        template: What it is before the first call.
        is_shared: Whether the model, or a hook of it, holds the same object.
    """

    name: str
    template: Any
    is_shared: bool = False

    def fresh(self) -> Any:
        """The object for one call."""
        return self.template if self.is_shared else cloned(self.template)


@dataclass(frozen=True)
class Position:
    """An argument that counts what the cache holds.

    Attributes:
        name: Of the argument.
        leaf: The place of a tensor among the state's tensors whose size is the count.
        axis: Its axis.
    """

    name: str
    leaf: int
    axis: int

    def value(self, state: Any) -> Any:
        """The count."""
        if state is None:
            return 0
        leaves, _ = flatten(state)
        return leaves[self.leaf].shape[self.axis]


@dataclass(frozen=True)
class Slot:
    """A part of the state.

    Attributes:
        label: Its name in the state.
        place: Where the model has it.
        kind: ``"entry"`` where calls put something there, ``"live"`` for a preallocated buffer
            that is written row by row, ``"whole"`` for a tensor that is written in place otherwise.
        initial: What is there before the first call, where that is no tensor.
        is_written: Whether calls write in place to what an earlier call put there.
    """

    label: str
    place: Place
    kind: str = "entry"
    initial: Any = None
    is_written: bool = False


@dataclass(frozen=True)
class Alias:
    """Stands in a result for an argument that the call fills."""

    name: str


@dataclass(frozen=True)
class Plan:
    """What is lifted.

    Attributes:
        slots: The state.
        arguments: The arguments that the call fills.
        positions: The arguments that count.
        state: The name of the argument that the state becomes.
        idle: What calls change and no call reads.
    """

    slots: tuple[Slot, ...] = ()
    arguments: tuple[Argument, ...] = ()
    positions: tuple[Position, ...] = ()
    state: str = "state"
    idle: tuple[Place, ...] = ()

    def __deepcopy__(self, memo: Any) -> Plan:
        return self  # places name the modules of the model itself, as the keys of a dict do

    @property
    def hidden(self) -> frozenset[str]:
        """The arguments that a lifted call does not have."""
        return frozenset(
            [*(part.name for part in self.arguments), *(part.name for part in self.positions)]
        )


def describe(place: Place) -> str:
    """A place as Python writes it."""
    text = place.root
    for step in place.steps:
        if isinstance(step, str) and not text:
            text = step
        elif isinstance(step, str) and step.isidentifier():
            text += f".{step}"
        else:
            text += f"[{step!r}]" if isinstance(step, (int, str)) else f"[{type(step).__name__}]"
    return text
