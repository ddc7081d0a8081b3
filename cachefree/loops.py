"""Loops over the tokens in Python, heard while a path is captured.

``for t in range(x.shape[1])`` would freeze the number of tokens. Here such a loop is run as often
as the example has tokens, each round with a symbol for the token's place, and every node of the
graph keeps the round that it was made in. That the rounds are all alike, and that one graph for any
number of them follows from it, is shown later, by terms (`cachefree.scans`).

What is shown by terms for the rounds that were run holds for all others if the code of the body
cannot tell one round from another. So whatever it asks about a token's place is refused, and so are
Python values that change from round to round.
"""

from __future__ import annotations

import contextlib
import operator
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import sympy
import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, set_proxy_slot
from torch.utils._thunk import Thunk

from cachefree.errors import CaptureError, Refusal, SourceLine
from cachefree.loop_values import shown, values_of
from cachefree.sizes import (
    SizeEnvironment,
    expression,
    is_of_this_package,
    size_symbol,
    user_line,
)
from cachefree.token_places import TOKEN, least_of

__all__ = [
    "LEAST_ROUNDS",
    "LOOP",
    "Loop",
    "Loops",
    "TooFewRoundsError",
    "few_rounds_written_out",
    "heard_loops",
    "node_of",
    "one_of_each",
    "token",
]

LOOP = "cachefree_loop"
LEAST_ROUNDS = 3
_ASIDE = -1_000_000  # a place that nothing else has


class TooFewRoundsError(CaptureError):
    """A loop runs less often in the example than rounds are compared.

    Attributes:
        count: How often it runs, as an expression of sizes.
    """

    count: Any


def token(loop: int, place: int) -> int:
    """The place of a token: what a loop's variable is in the graph."""
    raise NotImplementedError("a captured path is read, and never run")


@dataclass
class Loop:
    """A loop over tokens that was run.

    Attributes:
        number: Which loop of the path.
        count: How often it runs, as an expression of sizes.
        rounds: How often it was run.
        where: The user's line.
        symbols: The symbol of the token's place in each round.
        marks: How many calls of torch functions there were before each round, and after the last.
        values: Python values that the code could see before each round and after the last.
    """

    number: int
    count: Any
    rounds: int
    where: SourceLine | None
    symbols: tuple[sympy.Symbol, ...] = ()
    marks: list[int] = field(default_factory=list)
    values: list[dict[str, Any]] = field(default_factory=list)
    is_over: bool = False


_hearing = threading.local()


def heard_loops() -> Loops | None:
    """Who hears the loops of the path that this thread captures; None outside of a capture."""
    found: Loops | None = getattr(_hearing, "loops", None)
    return found


@contextlib.contextmanager
def few_rounds_written_out() -> Iterator[None]:
    """Lets loops with few rounds in the example run as written: how many is the user's question."""
    before = is_written_out()
    _hearing.few = True
    try:
        yield
    finally:
        _hearing.few = before


def is_written_out() -> bool:
    """Whether loops with few rounds run as written."""
    return bool(getattr(_hearing, "few", False))


class Loops:
    """The loops over tokens of a path that is being captured.

    Args:
        environment: Where the sizes come from.
        model: Whose numbers are watched.
        calls: The calls of torch functions, so far.
    """

    def __init__(
        self, environment: SizeEnvironment, model: torch.nn.Module, calls: list[Any]
    ) -> None:
        self.environment = environment
        self.model = model
        self.calls = calls
        self.found: list[Loop] = []
        self.active: Loop | None = None
        self.round = 0
        self.nodes = 0  # how many the round made
        self.frame: FrameType | None = None
        self.tokens: list[torch.SymInt] = []
        self.refusals: list[Refusal] = []

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Writes the loop and the round into each node that is traced inside."""
        mode = get_proxy_mode()
        assert mode is not None
        tracer: Any = mode.tracer
        create_node = tracer.create_node

        def create_node_of_round(*args: Any, **kwargs: Any) -> Any:
            node = create_node(*args, **kwargs)
            if self.active is not None:
                node.meta[LOOP] = (self.active.number, self.round, self.nodes)
                # sizes are computed once, in the round that needs them first
                self.nodes += node.op == "get_attr" or _is_operator(node.target)
            return node

        tracer.create_node = create_node_of_round
        self.environment.loops = _hearing.loops = self
        try:
            yield
        finally:
            tracer.create_node = create_node
            self.environment.loops = _hearing.loops = None
        if self.active is not None:
            self.refuse(
                "A loop over the tokens ends before its last token.",
                "break and return leave it, so that it does not run once for each token",
                "Let it run to the end, or loop outside of the model.",
                self.active.where,
            )
        if self.refusals:
            raise CaptureError(*dict.fromkeys(self.refusals))

    def refuse(self, what: str, why: str, remedy: str, where: SourceLine | None) -> None:
        """Notes a refusal, so that code which catches exceptions does not hide it, and raises."""
        refusal = Refusal(what, why=why, remedy=remedy, where=where)
        self.refusals.append(refusal)
        raise CaptureError(refusal)

    def writes_out(self, count: Any) -> bool:
        """Whether a loop runs as written, with as many rounds as the example has."""
        return is_written_out() and self.environment.example(count) < LEAST_ROUNDS

    def begin(self, count: torch.SymInt, frame: FrameType) -> Loop | None:
        """The loop that a line begins; None where it runs not even once."""
        where = user_line(frame)
        if self.active is not None:
            self.refuse(
                "A loop over the tokens runs within another one.",
                "one round would be another loop, of which no single step is known",
                "Compute one of the two over all tokens at once.",
                where,
            )
        if not self._does_run(count):
            return None
        rounds = int(self.environment.example(expression(count)))
        if rounds < LEAST_ROUNDS:
            self._refuse_few(expression(count), rounds, where)
        number = len(self.found)
        names = [f"{TOKEN}{number}_{place}" for place in range(rounds)]
        self.tokens = [self._token(number, place, name) for place, name in enumerate(names)]
        loop = Loop(number, expression(count), rounds, where, tuple(map(size_symbol, names)))
        self.found.append(loop)
        self.active, self.round, self.frame = loop, -1, frame
        return loop

    def _does_run(self, count: torch.SymInt) -> bool:
        """Whether there is a first round; where sizes leave it open, the user's line asks."""
        least = least_of(sympy.sympify(expression(count)))
        if (least - 1).is_nonnegative:
            return True
        self.environment.is_asked_by_users = True
        try:
            return bool(count >= 1)
        finally:
            self.environment.is_asked_by_users = False

    def _refuse_few(self, count: Any, rounds: int, where: SourceLine | None) -> None:
        error = TooFewRoundsError(
            Refusal(
                f"A loop over {count} is run {rounds} times in the example.",
                why=f"{LEAST_ROUNDS} rounds are compared with one another.",
                remedy="Give an example with more tokens.",
                where=where,
            )
        )
        error.count = count
        raise error

    def _token(self, loop: int, place: int, name: str) -> torch.SymInt:
        mode = get_proxy_mode()
        assert mode is not None
        tracer: Any = mode.tracer
        size: torch.SymInt = self.environment.new_size(name, place)
        proxy = tracer.create_proxy("call_function", token, (loop, place), {})
        proxy.node.meta["val"] = size
        set_proxy_slot(size, tracer, Thunk(lambda: proxy))
        return size

    def turn(self, loop: Loop, frame: FrameType) -> bool:
        """Begins the next round; False where there is none."""
        loop.values.append(values_of(self.model, frame, self._age))
        loop.marks.append(len(self.calls))
        self.round += 1
        self.nodes = 0
        if self.round < loop.rounds:
            return True
        self.active, loop.is_over = None, True
        self._refuse_changes(loop)
        return False

    def _refuse_changes(self, loop: Loop) -> None:
        """Refuses Python values that are others after the last round than before it.

        A round does what the one before it did where it finds the same. Earlier ones may find
        something else: that they do the same is seen by what they do.
        """
        before, after = loop.values[-2:]
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name):
                self.refuse(
                    f"The body of a loop over the tokens changes {name}, which is no tensor.",
                    f"it is {shown(before.get(name))} before one round and "
                    f"{shown(after.get(name))} before the next, so that a later round may do "
                    "something else",
                    "Carry what changes from token to token in tensors only.",
                    loop.where,
                )
        loop.values.clear()

    def _age(self, value: torch.Tensor) -> Any:
        """How many rounds ago a tensor was made; which one it is where none made it."""
        place = self._round_of(value)
        if place is None or self.active is None or place[0] != self.active.number:
            return ("another tensor", id(value))
        return ("made", self.round - place[1])

    def heard_length(self, value: Any) -> None:
        """Refuses to tell the length of a list that the rounds of a loop fill."""
        if self.active is None or not isinstance(value, list) or not self.round:
            return
        if is_of_this_package(sys._getframe(2).f_code.co_filename):
            return
        if any(self._round_of(part) is not None for part in value[-1:]):
            self.refuse(
                "The body of a loop over the tokens asks for the length of a list that it fills.",
                "the length tells one round from another",
                "Carry what changes from token to token in tensors only.",
                user_line(sys._getframe(2)),
            )

    def is_of_this_round(self, value: torch.Tensor) -> bool:
        """Whether the round that runs made a tensor."""
        found = self._round_of(value)
        return bool(found and self.active and found[:2] == (self.active.number, self.round))

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Lets what is traced inside have no place among what a round makes."""
        nodes, self.nodes = self.nodes, _ASIDE
        try:
            yield
        finally:
            self.nodes = nodes

    def _round_of(self, value: Any) -> tuple[int, int, int] | None:
        node = node_of(value) if isinstance(value, torch.Tensor) else None
        return None if node is None else node.meta.get(LOOP)

    def of_rows(self, parts: Any) -> tuple[Loop, slice] | None:
        """The loop whose rounds gave one tensor each of a sequence; None where none did.

        Returns:
            The loop, and which parts of the sequence they are.
        """
        if not isinstance(parts, (list, tuple)) or not parts:
            return None
        made = [found[:2] if found else None for found in map(self._round_of, parts)]
        number = next((found[0] for found in reversed(made) if found is not None), None)
        if number is None or not self.found[number].is_over:
            return None
        place = one_of_each(made, number, self.found[number].rounds)
        return None if place is None else (self.found[number], place)


def one_of_each(made: Sequence[Any], loop: int, rounds: int) -> slice | None:
    """Which parts of a sequence the rounds of a loop gave, one each and in order.

    Or one of the round before each, and something else before the first. Beside them there may be
    others, but none of an earlier round than the last.

    Args:
        made: The loop and the round of each part, or anything else.
        loop: The loop's number.
        rounds: How often it was run.
    """
    for late in (0, 1):
        due = [(loop, turn) for turn in range(rounds - late)]
        for begin in range(len(made) - rounds + 1):
            place = slice(begin, begin + rounds)
            others = [*made[:begin], *made[begin : begin + late], *made[begin + rounds :]]
            if list(made[place])[late:] == due and not any(
                isinstance(other, tuple) and other[0] == loop and other[1] != rounds - 1
                for other in others
            ):
                return place
    return None


def _is_operator(target: Any) -> bool:
    return target is operator.getitem or (
        isinstance(target, torch._ops.OpOverload)
        and not target._schema.name.startswith("aten::sym_")
    )


def node_of(value: torch.Tensor) -> Any:
    """The node of the graph that made a tensor, while it is traced."""
    mode = get_proxy_mode()
    if mode is None:
        return None
    slot: Any = get_proxy_slot(value, mode.tracer, None)
    return None if slot is None else slot.proxy.node
