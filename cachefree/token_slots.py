"""``[None] * n`` that a loop over n tokens fills, one entry each round."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from cachefree.loops import Loops, heard_loops
from cachefree.sizes import expression, is_of_this_package, is_users, user_line

__all__ = ["multiplied"]


class _Unfilled:
    """What an entry holds before its round: torch takes it for no tensor."""

    def __repr__(self) -> str:
        return "no value yet"


class _TokenSlots(list[Any]):
    """A list with an entry for each token, which is what its rounds put there once all have run.

    Until then nothing may be read of it but what the round that runs has put there, so that it is
    no matter how long it is in the example.
    """

    is_filled_by_token = True

    def __init__(self, loops: Loops, count: Any) -> None:
        super().__init__([_Unfilled()] * int(loops.environment.example(count)))
        self.loops = loops
        self.size = count
        self.filled = 0

    def _is_own(self, place: Any) -> bool:
        """Whether a place is that of the round that runs, in a loop over all entries."""
        loop = self.loops.active
        return (
            loop is not None
            and isinstance(place, torch.SymInt)
            and loop.count == self.size
            and expression(place) == loop.symbols[self.loops.round]
        )

    @property
    def is_full(self) -> bool:
        """Whether each round has put something there, and the loop is over."""
        return self.filled == list.__len__(self) and self.loops.active is None

    def __setitem__(self, place: Any, value: Any) -> None:
        if not self._is_own(place) or self.filled != self.loops.round:
            self._refuse("is filled otherwise than entry t in round t, once")
        if not isinstance(value, torch.Tensor):
            self._refuse("is filled with other values than tensors")
        list.__setitem__(self, self.filled, value)
        self.filled += 1

    def __getitem__(self, place: Any) -> Any:
        if self._is_own(place) and self.filled == self.loops.round + 1:
            return list.__getitem__(self, self.loops.round)
        if not self.is_full:
            self._refuse("is read before all rounds have filled it")
        return list.__getitem__(self, place)

    def _refuse(self, what: str) -> None:
        self.loops.refuse(
            f"A list with an entry for each token {what}.",
            "no one step is known that every round takes",
            "Append to an empty list, or put tensor t there in round t of a loop over all tokens.",
            user_line(sys._getframe(2)),
        )


def _once_full(name: str) -> Callable[..., Any]:
    original = getattr(list, name)

    def method(self: _TokenSlots, *args: Any) -> Any:
        if not self.is_full and not is_of_this_package(sys._getframe(1).f_code.co_filename):
            self._refuse("is read before all rounds have filled it")
        return original(self, *args)

    return method


def _refused(name: str) -> Callable[..., Any]:
    def method(self: _TokenSlots, *args: Any, **kwargs: Any) -> Any:
        self._refuse(f"is changed by {name.strip('_')}")

    return method


for _name in (
    *("__iter__", "__len__", "__reversed__", "__contains__", "__add__", "__eq__", "__ne__"),
    *("index", "copy", "count"),
):
    setattr(_TokenSlots, _name, _once_full(_name))
for _name in (
    *("append", "extend", "insert", "pop", "remove", "clear", "sort", "reverse"),
    *("__delitem__", "__iadd__", "__imul__", "__mul__", "__rmul__"),
):
    setattr(_TokenSlots, _name, _refused(_name))


def multiplied(original: Callable[..., Any]) -> Callable[..., Any]:
    """``size * [None]``, which else would freeze the size at the example's."""

    def product(size: Any, other: Any) -> Any:
        loops = heard_loops()
        if (
            loops is not None
            and type(other) is list
            and len(other) == 1
            and other[0] is None
            and is_users(sys._getframe(1).f_code.co_filename)
        ):
            return _TokenSlots(loops, expression(size))
        return original(size, other)

    return product
