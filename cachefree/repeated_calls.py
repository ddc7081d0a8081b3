"""The calls of a path as they are where its loops over tokens run more often, or less.

A path is captured with a few rounds of each loop. With more of them, the calls of the last one come
again for each further token, on what the round before it returned, and on the same tensors from
before the loop. A run with that many tokens has to show just these calls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import sympy

from cachefree.dataflow import Source
from cachefree.faithful import TorchCall
from cachefree.loops import Loop, one_of_each
from cachefree.sizes import compiled

__all__ = ["places_of", "repeated"]


def places_of(loops: Sequence[Loop]) -> dict[sympy.Symbol, sympy.Integer]:
    """The number that each token's place stands for in the example."""
    return {
        symbol: sympy.Integer(place) for loop in loops for place, symbol in enumerate(loop.symbols)
    }


def repeated(
    calls: Sequence[TorchCall], loops: Sequence[Loop], sizes: Mapping[str, int]
) -> Sequence[TorchCall]:
    """The calls of a path with its loops run as often as the sizes say.

    Args:
        calls: The calls of the captured path.
        loops: Its loops, in order.
        sizes: The size of each symbol.
    """
    if not loops and not any(call.rows is not None for call in calls):
        return calls
    return _Repetition(calls, loops, sizes).run()


@dataclasses.dataclass(frozen=True)
class _At:
    """Which round stands for which: round ``turn`` of a loop for the token at ``place``."""

    loop: int
    turn: int
    place: int

    def moved(self, turn: int) -> int:
        """The place that a round stands for: relative to its own, or to the first one."""
        is_near = 0 <= self.turn - turn <= 1
        return self.place - (self.turn - turn) if is_near else turn


class _Repetition:
    """How the numbers of calls change."""

    def __init__(
        self, calls: Sequence[TorchCall], loops: Sequence[Loop], sizes: Mapping[str, int]
    ) -> None:
        self.calls = calls
        self.loops = loops
        self.sizes = sizes
        self.counts = [self._count(loop.count) for loop in loops]
        self.turns: dict[int, tuple[int, int]] = {}  # call → its loop and round
        self.ends: dict[tuple[int, int], int] = {}  # loop and place → the call after its last
        self.outside: dict[int, int] = {}  # call around the loops → where it is now

    def run(self) -> list[TorchCall]:
        """The calls, renumbered."""
        found: list[tuple[int, _At | None]] = []
        end = 0
        for loop, count in zip(self.loops, self.counts, strict=True):
            self._around(found, end, loop.marks[0])
            for turn in range(loop.rounds):
                members = range(loop.marks[turn], loop.marks[turn + 1])
                self.turns.update(dict.fromkeys(members, (loop.number, turn)))
            for place in range(count):
                turn = min(place, loop.rounds - 1)
                at = _At(loop.number, turn, place)
                found += [(number, at) for number in range(*loop.marks[turn : turn + 2])]
                self.ends[loop.number, place] = len(found)
            end = loop.marks[-1]
        self._around(found, end, len(self.calls))
        return [self._call(self.calls[number], at) for number, at in found]

    def _around(self, found: list[tuple[int, _At | None]], start: int, end: int) -> None:
        for number in range(start, end):
            self.outside[number] = len(found)
            found.append((number, None))

    def _call(self, call: TorchCall, at: _At | None) -> TorchCall:
        operands = zip(call.args, call.sources, strict=True)
        moved = [self._operand(arg, source, at) for arg, source in operands]
        args, sources = (tuple(part) for part in zip(*moved, strict=True)) if moved else ((), ())
        same = {k: self._source(source, at) for k, source in call.same.items()}
        return dataclasses.replace(call, args=args, sources=sources, same=same)

    def _operand(self, arg: Any, source: Any, at: _At | None) -> tuple[Any, Any]:
        """What is described of an operand, and its sources."""
        if isinstance(arg, sympy.Basic):
            return self._size(arg, at), source
        if not isinstance(arg, tuple):
            return arg, source
        if arg[:1] == ("tensor",) and source is not None:
            shape = tuple([self._size(size, at) for size in arg[1]])
            return ("tensor", shape, *arg[2:]), self._source(source, at)
        sources = source if source is not None else (None,) * len(arg)
        parts = list(zip(arg, sources, strict=True))
        loop, place = self._one_of_each_round(sources)
        if loop is not None and (at is None or at.loop != loop.number):
            begin, end = place.start, place.stop
            turns = [_At(loop.number, min(k, loop.rounds - 1), k)
                     for k in range(self.counts[loop.number])]  # fmt: skip
            moved = [self._operand(one, other, at) for one, other in parts[:begin]]
            for turn in turns:
                one, other = parts[begin + turn.turn]
                moved.append(self._operand(one, other, turn))
            moved += [self._operand(one, other, at) for one, other in parts[end:]]
        else:
            moved = [self._operand(*part, at) for part in parts]
        return tuple(one for one, _ in moved), None if source is None else tuple(
            other for _, other in moved
        )

    def _one_of_each_round(self, sources: Sequence[Any]) -> tuple[Loop | None, slice]:
        """The loop of which a list has one tensor of each round, and which parts they are."""
        found = [
            self.turns.get(source[1]) if source and source[0] == "call" else None
            for source in sources
        ]
        number = next((turn[0] for turn in reversed(found) if turn is not None), None)
        if number is None:
            return None, slice(0)
        place = one_of_each(found, number, self.loops[number].rounds)
        return (None, slice(0)) if place is None else (self.loops[number], place)

    def _size(self, size: Any, at: _At | None) -> Any:
        if not isinstance(size, sympy.Basic) or not size.free_symbols:
            return size
        places = {}
        for loop, count in zip(self.loops, self.counts, strict=True):
            for turn, symbol in enumerate(loop.symbols):
                if at is not None and at.loop == loop.number:
                    places[symbol] = at.moved(turn)
                else:
                    places[symbol] = count - 1 if turn == loop.rounds - 1 else turn
        return size.xreplace({symbol: sympy.Integer(place) for symbol, place in places.items()})

    def _source(self, source: Source, at: _At | None) -> Source:
        if source[0] == "call":
            return ("call", self._number(source[1], at), self._part(source[1], source[2], at))
        if source[0] == "seen":
            return ("seen", self._number(source[1], at), source[2])
        if source[0] == "of":
            return (*source[:3], tuple([self._within(part, at) for part in source[3]]))
        return source

    def _within(self, sources: Any, at: _At | None) -> Any:
        if not isinstance(sources, tuple) or not sources:
            return sources
        if isinstance(sources[0], str):
            return self._source(sources, at)
        return tuple([self._within(part, at) for part in sources])

    def _number(self, number: int, at: _At | None) -> int:
        """Where a call is that made what another one reads."""
        if number in self.outside:
            return self.outside[number]
        if number not in self.turns:
            return number
        loop, turn = self.turns[number]
        if at is not None and at.loop == loop:
            place = at.moved(turn)
        else:
            place = self.counts[loop] - 1 if turn == self.loops[loop].rounds - 1 else turn
        # the first round may make something more at its begin, so they are alike from their ends
        return self.ends.get((loop, place), -1) + number - self.loops[loop].marks[turn + 1]

    def _part(self, number: int, k: int, at: _At | None) -> int:
        """Which of the tensors that a call returned, where it took one apart into tokens."""
        rows = self.calls[number].rows
        if rows is None:
            return k
        if k < 0:
            return k + self._count(rows)
        return at.moved(k) if at is not None and k <= at.turn else k

    def _count(self, expr: Any) -> int:
        return int(compiled(sympy.sympify(expr))(self.sizes))
