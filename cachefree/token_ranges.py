"""What a loop over tokens goes through: ``range`` of a size, its like, and what numbers them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import sympy
import torch

from cachefree.loops import Loop, Loops, heard_loops
from cachefree.sizes import expression, is_users, user_line

__all__ = ["TokenRange", "numbered", "token_range"]

_HERE = __file__
_ENUMERATE, _RANGE = enumerate, range  # as Python has them


class TokenRange:
    """``range(n)`` of a symbolic size, and sequences of as many tensors.

    Args:
        loops: Who listens.
        count: How many.
        item: What a round is given for the token's place.
        first: The number that a round is given for the first place, where it is given numbers.
        step: 1, or -1 for numbers that fall.

    Attributes:
        seen: Is told what a round is given, and the round.
    """

    def __init__(
        self,
        loops: Loops,
        count: torch.SymInt,
        item: Callable[[torch.SymInt], Any] | None = None,
        *,
        first: Any = 0,
        step: int = 1,
    ) -> None:
        self.loops = loops
        self.count = count
        self.item = item
        self.first = first
        self.step = step
        self.seen: Callable[[Any, int], None] | None = None

    def at(self, place: Any, number: int) -> Any:
        """What a round is given.

        Args:
            place: The token's place.
            number: The same as a plain number, from the end where it is negative.
        """
        if self.item is None:
            return self.first + place if self.step == 1 else self.first - place
        part = self.item(place)
        if self.seen is not None:
            self.seen(part, number)
        return part

    is_loop_over_tokens = True

    def __iter__(self) -> Iterator[Any]:
        return _Rounds(self)

    def __reversed__(self) -> Iterator[Any]:
        if self.item is not None:
            self.loops.refuse(
                "A loop over the tokens takes the parts of a tensor from the last to the first.",
                "which part a round is given is told from the first one on",
                "Flip the tensor (torch.flip), or loop over reversed(range(n)).",
                user_line(sys._getframe(1)),
            )
        last = self.first + self.step * (self.count - 1)
        return _Rounds(TokenRange(self.loops, self.count, first=last, step=-self.step))

    def __len__(self) -> int:
        return self.count  # type: ignore[return-value]

    def __getitem__(self, place: Any) -> Any:
        if self.item is None or isinstance(place, slice):
            numbers = _RANGE(int(self.count))[place]
            if isinstance(numbers, int):
                return self.first + self.step * numbers
            return [self.first + self.step * number for number in numbers]
        return self.at(place, place if isinstance(place, int) else self.loops.round)


class _Rounds:
    """One run of a loop. A second one beside it, as in ``zip``, takes part in it."""

    def __init__(self, source: TokenRange) -> None:
        self.source = source
        self.loop: Loop | None = None
        self.is_guest = False
        self.place = 0

    is_loop_over_tokens = True

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        loops, frame = self.source.loops, _asking_frame()
        if self.loop is None:
            self.is_guest = (
                loops.active is not None
                and loops.frame is frame
                and loops.round == 0
                and loops.active.count == expression(self.source.count)
            )
            self.loop = loops.active if self.is_guest else loops.begin(self.source.count, frame)
        if self.loop is None:
            raise StopIteration
        if self.is_guest and self.loop.is_over and self.place == self.loop.rounds:
            raise StopIteration
        if self.is_guest:
            if loops.active is not self.loop or loops.round != self.place:
                loops.refuse(
                    "A loop over the tokens runs within another one.",
                    "one round would be another loop, of which no single step is known",
                    "Compute one of the two over all tokens at once.",
                    user_line(frame),
                )
        elif not loops.turn(self.loop, frame):
            raise StopIteration
        self.place += 1
        return self.source.at(loops.tokens[self.place - 1], self.place - 1)


def _asking_frame() -> FrameType:
    """The frame that goes on to the next round."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename == _HERE and frame.f_back is not None:
        frame = frame.f_back
    return frame


def token_range(args: tuple[Any, ...]) -> TokenRange | None:
    """``range(n)``, ``range(1, n)``, ``range(n - 1, -1, -1)`` of a size; None for what is plain."""
    loops = heard_loops()
    is_size = any(isinstance(arg, torch.SymInt) for arg in args)
    if loops is None or not is_size or not is_users(sys._getframe(2).f_code.co_filename):
        return None
    start, stop, step = (0, *args, 1) if len(args) == 1 else (*args, 1)[:3]
    if step not in (1, -1):
        return None
    expr = sympy.expand(step * (expression(stop) - expression(start)))
    if expr.is_Integer or loops.writes_out(expr):
        return None
    return TokenRange(loops, loops.environment.size_of(expr), first=start, step=step)


class _Numbered:
    """``enumerate`` of what loops over tokens."""

    def __init__(self, parts: Iterator[Any], loops: Loops, start: Any) -> None:
        self.parts = parts
        self.loops = loops
        self.start = start

    is_loop_over_tokens = True

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> tuple[Any, Any]:
        part = next(self.parts)
        return self.start + self.loops.tokens[self.loops.round], part


def numbered(parts: Any, start: Any) -> Iterator[Any]:
    """``enumerate(parts, start)``, whose numbers are the tokens' places where parts are tokens'."""
    loops = heard_loops()
    parts = iter(parts)
    if loops is not None and _is_over_tokens(parts):
        return _Numbered(parts, loops, start)
    return _ENUMERATE(parts, start)


def _is_over_tokens(parts: Any) -> bool:
    if type(parts) is zip:
        within = parts.__reduce__()[1]  # the iterators that are run side by side
        return any(map(_is_over_tokens, within))
    return bool(getattr(type(parts), "is_loop_over_tokens", False))
