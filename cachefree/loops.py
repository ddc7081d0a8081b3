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
import functools
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

import sympy
import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode, set_proxy_slot
from torch.utils._thunk import Thunk

from cachefree.errors import CaptureError, Refusal, SourceLine
from cachefree.sizes import (
    Question,
    SizeEnvironment,
    compiled,
    expression,
    is_users,
    size_symbol,
    user_line,
)

__all__ = [
    "LOOP",
    "Loop",
    "Loops",
    "TokenRange",
    "heard_loops",
    "is_token",
    "rows",
    "rows_operator",
    "sequence",
    "token",
]

LOOP = "cachefree_loop"
_CAPTURE = os.path.join(os.path.dirname(__file__), "capture.py")
_LEAST_ROUNDS = 3
_TOKEN = "token_"
_DEPTH = 6
_MOST = 4096


def token(loop: int, place: int) -> int:
    """The place of a token: what a loop's variable is in the graph."""
    raise NotImplementedError("a captured path is read, and never run")


def is_token(symbol: sympy.Symbol) -> bool:
    """Whether a symbol is the place of a token in a loop."""
    return symbol.name.startswith(_TOKEN)


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

    def begin(self, count: torch.SymInt, frame: FrameType) -> Loop:
        """The loop that a line begins."""
        where = user_line(frame)
        if self.active is not None:
            self.refuse(
                "A loop over the tokens runs within another one.",
                "one round would be another loop, of which no single step is known",
                "Compute one of the two over all tokens at once.",
                where,
            )
        least = _least(sympy.sympify(expression(count)), {})
        if not (least - 1).is_nonnegative:
            self.refuse(
                f"A loop over {expression(count)} may run not even once.",
                "one graph has at least one token to start from",
                "Loop over all tokens.",
                where,
            )
        rounds = int(self.environment.example(expression(count)))
        if rounds < _LEAST_ROUNDS:
            self.refuse(
                f"A loop over {expression(count)} is run {rounds} times in the example.",
                f"{_LEAST_ROUNDS} rounds are compared with one another",
                "Give an example with more tokens.",
                where,
            )
        number = len(self.found)
        names = [f"{_TOKEN}{number}_{place}" for place in range(rounds)]
        self.tokens = [self._token(number, place, name) for place, name in enumerate(names)]
        loop = Loop(number, expression(count), rounds, where, tuple(map(size_symbol, names)))
        self.found.append(loop)
        self.active, self.round, self.frame = loop, -1, frame
        return loop

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
        loop.values.append(_values(self.model, frame, self._age))
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
                    f"it is {_shown(before.get(name))} before one round and "
                    f"{_shown(after.get(name))} before the next, so that a later round may do "
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
        if any(self._round_of(part) is not None for part in value[-1:]):
            self.refuse(
                "The body of a loop over the tokens asks for the length of a list that it fills.",
                "the length tells one round from another",
                "Carry what changes from token to token in tensors only.",
                user_line(sys._getframe(2)),
            )

    def _round_of(self, value: Any) -> tuple[int, int, int] | None:
        node = node_of(value) if isinstance(value, torch.Tensor) else None
        return None if node is None else node.meta.get(LOOP)

    def of_rows(self, parts: Any) -> Loop | None:
        """The loop whose rounds gave one tensor each of a sequence; None where none did."""
        if not isinstance(parts, (list, tuple)) or not parts:
            return None
        rounds = [self._round_of(part) for part in parts]
        made = next((found for found in reversed(rounds) if found is not None), None)
        if made is None:
            return None
        loop = self.found[made[0]]
        return loop if loop.is_over and len(parts) == loop.rounds else None


def _is_operator(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and not target._schema.name.startswith(
        "aten::sym_"
    )


def node_of(value: torch.Tensor) -> Any:
    """The node of the graph that made a tensor, while it is traced."""
    from torch.fx.experimental.proxy_tensor import get_proxy_slot

    mode = get_proxy_mode()
    if mode is None:
        return None
    slot: Any = get_proxy_slot(value, mode.tracer, None)  # type: ignore[call-overload]
    return None if slot is None else slot.proxy.node


class TokenRange:
    """``range(n)`` of a symbolic size, and sequences of as many tensors.

    Args:
        loops: Who listens.
        count: How many.
        item: What a round is given for the token's place.
    """

    def __init__(
        self, loops: Loops, count: torch.SymInt, item: Callable[[torch.SymInt], Any] | None = None
    ) -> None:
        self.loops = loops
        self.count = count
        self.item = item

    def __iter__(self) -> Iterator[Any]:
        return _Rounds(self)

    def __len__(self) -> int:
        return self.count  # type: ignore[return-value]

    def __getitem__(self, place: Any) -> Any:
        if self.item is None or isinstance(place, slice):
            return list(range(int(self.count)))[place]
        return self.item(place)


class _Rounds:
    """One run of a loop. A second one beside it, as in ``zip``, takes part in it."""

    def __init__(self, source: TokenRange) -> None:
        self.source = source
        self.loop: Loop | None = None
        self.is_guest = False
        self.place = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        loops, frame = self.source.loops, sys._getframe(1)
        if self.loop is None:
            self.is_guest = (
                loops.active is not None
                and loops.frame is frame
                and loops.round == 0
                and loops.active.count == expression(self.source.count)
            )
            self.loop = loops.active if self.is_guest else loops.begin(self.source.count, frame)
        assert self.loop is not None
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
        place = loops.tokens[self.place]
        self.place += 1
        return place if self.source.item is None else self.source.item(place)


def _values(
    model: torch.nn.Module, frame: FrameType | None, age: Callable[[torch.Tensor], Any]
) -> dict[str, Any]:
    """What Python code could tell rounds apart by: the values of locals, and numbers of modules."""
    found: dict[str, Any] = {}
    seen: dict[int, Any] = {}
    summary = functools.partial(_summary, age=age, seen=seen, depth=_DEPTH)
    while frame is not None and frame.f_code.co_filename != _CAPTURE:
        if is_users(frame.f_code.co_filename):
            for name, value in frame.f_locals.items():
                found[f"{name!r} ({frame.f_code.co_name})"] = summary(value)
        frame = frame.f_back
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, (int, float, str, bool, list, tuple, dict, set)) and (
                not attribute.startswith("_") or attribute not in _OF_TORCH
            ):
                found[f"{name}.{attribute}".lstrip(".")] = summary(value)
    return found


_OF_TORCH = frozenset(vars(torch.nn.Module()))
_OPAQUE = (type, ModuleType, FunctionType, BuiltinFunctionType, torch.nn.Module)


def _summary(
    value: Any, age: Callable[[torch.Tensor], Any], seen: dict[int, Any], depth: int
) -> Any:
    """A value without its tensors."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        expr = sympy.sympify(expression(value))
        of_token = any(is_token(s) for s in expr.free_symbols if isinstance(s, sympy.Symbol))
        return "a token's place" if of_token else ("a size", str(expr))
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return (type(value).__name__, repr(value))
    if isinstance(value, torch.Tensor):
        return age(value)
    if isinstance(value, _OPAQUE) or depth == 0 or isinstance(value, (torch.dtype, torch.device)):
        return ("object", id(value))
    if id(value) in seen:
        return seen[id(value)]
    seen[id(value)] = "itself"
    again = functools.partial(_summary, age=age, seen=seen, depth=depth - 1)
    if isinstance(value, MethodType):
        result: Any = ("method", id(value.__func__), again(value.__self__))
    elif isinstance(value, (list, tuple)) or type(value).__name__ == "deque":
        parts = list(map(again, value))
        kept = [part for part in parts if not _is_made(part)]
        result = (type(value).__name__, len(kept) < len(parts), *kept)
    elif isinstance(value, dict):
        result = tuple((again(key), again(part)) for key, part in value.items())
    elif isinstance(value, (set, frozenset)):
        result = tuple(sorted(map(repr, map(again, value))))
    elif isinstance(value, (_Rounds, TokenRange)):
        result = "a loop"
    elif hasattr(value, "__next__"):
        result = ("iterator", _where_iterator(value))
    elif hasattr(value, "__dict__"):
        result = (type(value).__name__, tuple((k, again(v)) for k, v in vars(value).items()))
    else:
        result = ("object", id(value))
    seen[id(value)] = result
    return result


def _is_made(summary: Any) -> bool:
    return isinstance(summary, tuple) and summary[:1] == ("made",)


def _where_iterator(value: Any) -> Any:
    """Where an iterator stands; something else each time where it does not say."""
    frame = getattr(value, "gi_frame", None)
    if frame is not None:
        return (frame.f_lasti, repr(sorted(map(repr, frame.f_locals))))
    try:
        return repr(value.__reduce__()[1:])
    except Exception:  # noqa: BLE001 - it does not say
        return object()


def _shown(value: Any) -> str:
    is_plain = isinstance(value, tuple) and len(value) == 2
    text = str(value[1]) if is_plain else str(value)
    return text if len(text) <= 60 else "something else"


@functools.cache
def rows_operator() -> Any:
    """The tensors that the rounds of a loop gave, one beside the other.

    Its result has as many as the loop has rounds at any size, not at the example's.
    """
    namespace = torch.ops.cachefree
    if not hasattr(namespace, "rows"):
        torch.library.define(
            "cachefree::rows",
            "(Tensor[] parts, SymInt count, int dim, bool is_joined, int loop) -> Tensor",
        )
        torch.library.register_fake("cachefree::rows", _rows)
    return namespace.rows.default


def _rows(
    parts: list[torch.Tensor], count: Any, dim: int, is_joined: bool, loop: int
) -> torch.Tensor:
    shape = list(parts[0].shape)
    if is_joined:
        shape[dim] = count
    else:
        shape.insert(dim, count)
    return parts[0].new_empty(shape)


def rows(func: Any, args: tuple[Any, ...], kwargs: Any) -> torch.Tensor | None:
    """The rows of a loop that was run, where a call of ``stack`` or ``cat`` puts them together."""
    loops = heard_loops()
    if loops is None or func not in _PUT_TOGETHER or not args:
        return None
    loop = loops.of_rows(args[0])
    if loop is None:
        return None
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    parts = list(args[0])
    is_joined = func is not torch.stack
    rank = parts[0].dim() + (not is_joined)
    is_regular = all(part.shape == parts[0].shape for part in parts)
    if kwargs.keys() - {"dim", "axis"} or not is_regular:
        return None
    dim %= rank
    if is_joined and parts[0].shape[dim] != 1:
        return None
    count = loops.environment.size_of(loop.count)
    result: torch.Tensor = rows_operator()(parts, count, dim, is_joined, loop.number)
    return result


_PUT_TOGETHER = (torch.stack, torch.cat, torch.concat, torch.concatenate)
_TAKEN_APART = {
    torch.unbind: None,
    torch.Tensor.unbind: None,
    torch.Tensor.__iter__: None,
    torch.split: 1,
    torch.Tensor.split: 1,
}


def sequence(func: Any, args: tuple[Any, ...], kwargs: Any) -> TokenRange | None:
    """The parts of a tensor along an axis of symbolic size, where a call takes it apart."""
    loops = heard_loops()
    if loops is None or func not in _TAKEN_APART or not isinstance(args[0], torch.Tensor):
        return None
    if not is_users(sys._getframe(2).f_code.co_filename):
        return None
    source, *rest = args
    width = _TAKEN_APART[func]
    if width is not None and (rest[:1] or [kwargs.get("split_size")]) != [width]:
        return None
    place = 0 if width is None else 1
    dim = rest[place] if len(rest) > place else kwargs.get("dim", 0)
    if not source.dim() or not isinstance(source.shape[dim], torch.SymInt):
        return None

    def item(at: Any) -> Any:
        with torch._C.DisableTorchFunction():
            part = torch.select(source, dim, at)
            return part if width is None else part.unsqueeze(dim)

    return TokenRange(loops, source.shape[dim], item)


def _tokens_of(question: Question) -> list[sympy.Symbol]:
    return [symbol for symbol in question.fact.free_symbols if is_token(symbol)]


def places_of(loops: Sequence[Loop]) -> dict[sympy.Symbol, sympy.Integer]:
    """The number that each token's place stands for in the example."""
    return {
        symbol: sympy.Integer(place) for loop in loops for place, symbol in enumerate(loop.symbols)
    }


def repeated(calls: Sequence[Any], loops: Sequence[Loop], sizes: Mapping[str, int]) -> list[Any]:
    """The calls of a path as they are where its loops run as often as the sizes say."""
    found: list[Any] = []
    end = 0
    for loop in loops:
        count = int(compiled(sympy.sympify(loop.count))(sizes))
        found += calls[end : loop.marks[0]]
        for place in range(count):
            place = min(place, loop.rounds - 1)
            found += calls[loop.marks[place] : loop.marks[place + 1]]
        end = loop.marks[-1]
    return [*found, *calls[end:]]


def refuse_questions(loops: Sequence[Loop], environment: SizeEnvironment) -> None:
    """Refuses a loop whose body asks which token it is at.

    That a token's place is one of the tokens' is no question.

    Raises:
        CaptureError: it asks; all lines are listed.
    """
    counts = {symbol: loop.count for loop in loops for symbol in loop.symbols}
    refusals = [
        Refusal(
            "The body of a loop over the tokens asks which token it is at.",
            why=f"It is not the same step for each of them: {_in_words(question.fact)}.",
            remedy="Do what is for one token only before or after the loop, or with tensors "
            "(torch.where).",
            where=question.where,
        )
        for question in (
            *environment.questions.values(),
            *environment.operator_questions.values(),
        )
        if _tokens_of(question) and not _is_of_every_place(question.fact, counts)
    ]
    if refusals:
        raise CaptureError(*dict.fromkeys(refusals))
    for asked in (environment.questions, environment.operator_questions):
        for key in [key for key, question in asked.items() if _tokens_of(question)]:
            del asked[key]  # type: ignore[attr-defined]


def _in_words(fact: Any) -> str:
    return re.sub(rf"{_TOKEN}\d+_(\d+)", r"token \1", str(fact))


def _is_of_every_place(fact: Any, counts: Mapping[sympy.Symbol, Any]) -> bool:
    """Whether a fact holds of every place among the tokens."""
    if isinstance(fact, sympy.And):
        return all(_is_of_every_place(part, counts) for part in fact.args)
    if isinstance(fact, sympy.Not):
        inner = fact.args[0]
        if isinstance(inner, sympy.Or):
            return all(_is_of_every_place(sympy.Not(part), counts) for part in inner.args)
        fact = inner.negated if hasattr(inner, "negated") else fact
    if not isinstance(fact, sympy.core.relational.Relational):
        return False
    difference = sympy.expand(fact.lhs - fact.rhs)
    if isinstance(fact, (sympy.Lt, sympy.Le)):
        difference = -difference
    elif not isinstance(fact, (sympy.Gt, sympy.Ge)):
        return False
    least = _least(sympy.expand(difference), counts)
    if isinstance(fact, (sympy.Gt, sympy.Lt)):
        return bool(least.is_positive)
    return bool(least.is_nonnegative)


def _least(expr: Any, counts: Mapping[sympy.Symbol, Any]) -> Any:
    """What an expression is at least, over every place among the tokens."""
    for symbol, count in counts.items():
        if symbol in expr.free_symbols:
            slope = sympy.diff(expr, symbol)
            if not slope.is_number:
                return sympy.nan
            expr = expr.subs(symbol, 0 if slope >= 0 else count - 1)
    positive = {symbol: size_symbol(f"{symbol}_more") + 1 for symbol in expr.free_symbols}
    return sympy.expand(expr.subs(positive))
