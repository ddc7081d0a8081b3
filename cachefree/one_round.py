"""One round of a loop over tokens, found by laying the rounds side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cachefree.errors import CaptureError, Refusal, SourceLine
from cachefree.loops import Loop
from cachefree.placed_rows import (
    Written,
    has_token,
    part_at,
    put_in_order,
    read_again,
    rows_in_order,
    written_rows,
)
from cachefree.terms import SCAN, Table, Term, operands, replace_operands, topological
from cachefree.token_rows import rows_operator

__all__ = ["Made", "OneRound", "irregular"]

aten = torch.ops.aten
_Lanes = tuple[Term, ...]  # one value a round
_Turn = dict[tuple[int, bool], Term]


@dataclass
class Made:
    """What the rounds of loops made.

    Attributes:
        table: Where terms are made.
        values: Loop → round → place in it, and whether it is what was written to → it.
        writes: Loop → round → places of writes.
        born: Value → when it was first made: the loop's number and round, or around them.
    """

    table: Table
    values: list[list[_Turn]]
    writes: list[list[set[int]]]
    born: dict[Term, tuple[int, int]] = field(default_factory=dict)


class OneRound:
    """One loop as a scan."""

    def __init__(self, made: Made, loop: Loop) -> None:
        self.written = made
        self.table = made.table
        self.loop = loop
        self.made = _aligned(made.values[loop.number])
        self.symbols = loop.symbols
        self.known: dict[_Lanes, Term] = {}
        self.carried: list[tuple[_Lanes, Term]] = []
        self.rows: dict[tuple[Term, int], Term] = {}
        last = self.made[-1]
        self.last = {
            value: key
            for key, value in last.items()
            if any(turn.get(key) is not value for turn in self.made)
        }

    def run(self, outputs: Sequence[Term]) -> dict[Term, Term]:
        """What takes the place of each output, and of what is below it."""
        order = topological(outputs)
        if not self.last and not any(self._is_rows(term) for term in order):
            return {term: term for term in order}
        if len({frozenset(turn) for turn in self.written.writes[self.loop.number]}) > 1:
            raise irregular(self.loop, None, "they do not write to the same tensors")
        taken = self._taken(outputs)
        stacked: dict[_Lanes, Term] = {}
        ends: dict[_Lanes, Term] = {}
        for term in taken:
            lanes = self._lanes(term)
            rows = self._written_rows(lanes)
            if self._is_rows(term) or rows is not None:
                lanes = rows.lanes if rows is not None else lanes
                if self._of(lanes) not in self.rows.values():
                    stacked[lanes] = self._of(lanes)
            else:
                ends[lanes] = self._of(lanes)
        scan, place = self._scan(stacked, ends) if stacked or ends else (None, {})
        new = {term: self._result(term, scan, place) for term in taken}
        done: dict[Term, Term] = {}
        for term in order:
            if term in new:
                done[term] = new[term]
                continue
            args = replace_operands(
                term.args, lambda arg: done.get(arg, arg) if isinstance(arg, Term) else arg
            )
            done[term] = term if args == term.args else self.table.like(term, term.op, args)
        return done

    def _is_rows(self, term: Term) -> bool:
        return term.op is rows_operator() and term.args[4] == self.loop.number

    def _taken(self, outputs: Sequence[Term]) -> list[Term]:
        """What is read of the loop after it: rows of all rounds, and what the last one left."""
        found: dict[Term, None] = {}
        seen: set[Term] = set()
        pending = list(reversed(outputs))
        while pending:
            term = pending.pop()
            if term in seen:
                continue
            seen.add(term)
            if self._is_rows(term):
                found[term] = None
            elif term in self.last:
                if not any(has_token(below, self.symbols) for below in topological([term])):
                    raise irregular(
                        self.loop,
                        term.line,
                        "what they leave does not depend on the tokens, so that it cannot be told "
                        "from what is computed outside of the loop",
                    )
                found[term] = None
            else:
                pending += reversed(list(operands(term)))
        return list(found)

    def _lanes(self, term: Term) -> _Lanes:
        """The values of all rounds that correspond to a value that is read after the loop."""
        if self._is_rows(term):
            return tuple(term.args[0])
        key = self.last[term]
        lanes = [turn.get(key) for turn in self.made]
        if any(value is None for value in lanes):
            raise irregular(self.loop, term.line, "not all of them compute it")
        return tuple(lanes)  # type: ignore[arg-type]

    def _of(self, lanes: _Lanes) -> Term:
        """The body's value for the values of all rounds."""
        pending = [lanes]
        while pending:
            value = pending[-1]
            if value in self.known:
                pending.pop()
                continue
            again = read_again(self.table, value, self.symbols)
            if again is not None and self._is_from_before(again, value):
                if again in self.known:
                    self.known[value] = self.known[again]
                else:
                    pending.append(again)
                continue
            leaf = self._leaf(value)
            if leaf is not None:
                self.known[value] = leaf
                continue
            below = self._below(value)
            missing = [part for part in below if part not in self.known]
            if missing:
                pending += missing
                continue
            self.known[value] = self._built(value[0], [self.known[part] for part in below])
        return self.known[lanes]

    def _is_from_before(self, again: _Lanes, value: _Lanes) -> bool:
        """Whether what the first round reads back, if it wrote none, is of before the loop."""
        if again[0].op is not value[0].op or again[0].args[0] is not value[0].args[0]:
            return True
        return self.written.born.get(value[0].args[0], (-1, 0)) < (self.loop.number, 0)

    def _built(self, like: Term, below: Sequence[Term]) -> Term:
        parts = iter(below)
        args = replace_operands(
            like.args, lambda arg: next(parts) if isinstance(arg, Term) else arg
        )
        return self.table.like(like, like.op, args)

    def _leaf(self, lanes: _Lanes) -> Term | None:
        first = lanes[0]
        if all(value is first for value in lanes):
            if any(has_token(below, self.symbols) for below in topological([first])):
                raise irregular(self.loop, first.line, "one keeps what another one computed")
            return first
        row = self._row(lanes)
        if row is not None:
            return row
        begin = (self.loop.number, 0)
        born = [self.written.born.get(value, (-1, 0)) for value in lanes]
        if born[0] < begin and all(
            begin <= made < (self.loop.number, turn) for turn, made in enumerate(born) if turn
        ):
            return self._carry(lanes)
        is_found = begin <= born[1] if len(born) > 1 else False
        if (
            is_found  # what the first round makes for itself where the others find something
            and lanes[1].op != first.op
            and born[0] == begin
            and all(
                begin <= made < (self.loop.number, turn) for turn, made in enumerate(born) if turn
            )
            and not any(has_token(below, None) for below in topological([first]))
        ):
            return self._carry(lanes)
        return None

    def _row(self, lanes: _Lanes) -> Term | None:
        """A row that the scan hands in: the part of a tensor at the token's place."""
        found = [part_at(term, self.symbols[turn]) for turn, term in enumerate(lanes)]
        part = found[0]
        if part is None or any(other != part for other in found):
            return None
        if any(has_token(below, self.symbols) for below in topological([part.source])):
            return None
        source = rows_in_order(self.table, part, self.loop.count)
        if source is None:
            return None
        dim = part.dim
        shape = tuple(size for axis, size in enumerate(source.sizes) if axis != dim)
        row = self.rows.get((source, dim))
        if row is None:
            row = self._bound(f"row {len(self.rows)}", shape, source)
            self.rows[source, dim] = row
        if not part.is_kept:
            return row
        return self.table.like(row, aten.unsqueeze.default, (row, dim), lanes[0].sizes)

    def _bound(self, name: str, shape: tuple[Any, ...], like: Term) -> Term:
        return self.table.make(
            "bound", (name, shape, like.dtype), shape, like.dtype, like.device, like.line
        )

    def _carry(self, lanes: _Lanes) -> Term:
        for known, bound in self.carried:
            shared = min(len(known), len(lanes))
            if known[:shared] == lanes[:shared]:
                return bound
        first = lanes[0]
        if any(has_token(below, self.symbols) for below in topological([first])):
            raise irregular(self.loop, first.line, "one keeps what another one computed")
        if first.shape is None or any(
            value.shape != first.shape or value.dtype != first.dtype for value in lanes
        ):
            raise irregular(
                self.loop,
                lanes[-1].line,
                "what is carried has another size or dtype in each: "
                f"{' and '.join(str(value.shape) for value in lanes[:2])}",
            )
        bound = self._bound(f"carried {len(self.carried)}", first.sizes, first)
        self.carried.append((lanes, bound))
        return bound

    def _below(self, lanes: _Lanes) -> list[_Lanes]:
        """The operands, side by side."""
        first = lanes[0]
        for other in lanes[1:]:
            if other.op != first.op or other.shape != first.shape or other.dtype != first.dtype:
                raise irregular(
                    self.loop,
                    other.line or first.line,
                    f"one computes {_words(first)}, another one {_words(other)}",
                )
            if not _same_but_terms(first.args, other.args):
                raise irregular(
                    self.loop,
                    other.line or first.line,
                    f"they differ in a number, or use the token's place as one ({first.name})",
                )
        if not isinstance(first.op, torch._ops.OpOverload) and first.op in (
            "input",
            "attribute",
            "constant",
        ):
            raise irregular(self.loop, first.line, "they read different tensors")
        if has_token(first, None):
            raise irregular(self.loop, first.line, f"they use the token's place ({first.name})")
        return list(zip(*(operands(term) for term in lanes), strict=True))

    def _written_rows(self, lanes: _Lanes) -> Written | None:
        """The rows, where each round writes one of its own into a tensor of all tokens."""
        found = written_rows(lanes, self.symbols, self.loop.count)
        if found is None or self.written.born.get(found.before, (-1, 0)) >= (self.loop.number, 0):
            return None
        return found

    def _scan(
        self, stacked: Mapping[_Lanes, Term], ends: Mapping[_Lanes, Term]
    ) -> tuple[Term, dict[tuple[str, _Lanes], int]]:
        """The scan, and the place of each result."""
        nexts: list[Term] = []
        while len(nexts) < len(self.carried):  # what is carried may need something else carried
            nexts.append(self._of(self._next(self.carried[len(nexts)][0])))
        place: dict[tuple[str, _Lanes], int] = {}
        bounds = [bound for _, bound in self.carried]
        inits = [lanes[0] for lanes, _ in self.carried]
        for lanes, end in ends.items():
            if end not in nexts:
                zero: Any = (
                    0.0 if lanes[0].dtype is not None and lanes[0].dtype.is_floating_point else 0
                )
                like = lanes[0]
                bounds.append(self._bound(f"carried {len(bounds)}", like.sizes, like))
                inits.append(
                    self.table.like(
                        like, "full", (like.sizes, zero, like.dtype, like.device), like.sizes
                    )
                )
                nexts.append(end)
            place["end", lanes] = nexts.index(end)
        if not bounds:  # exporters take no scan that carries nothing
            like = next(iter(stacked.values()))
            nothing = ((1,), 0.0, torch.float32, like.device)
            inits.append(
                self.table.make("full", nothing, (1,), torch.float32, like.device, like.line)
            )
            bounds.append(self._bound("carried 0", (1,), inits[0]))
            nexts.append(bounds[0])
        rows = list(stacked)
        types = [(term.shape, term.dtype, term.device) for term in nexts]
        types += [
            ((self.loop.count, *lanes[0].sizes), lanes[0].dtype, lanes[0].device) for lanes in rows
        ]
        args = (
            self.loop.count,
            tuple(bounds),
            tuple(inits),
            tuple(self.rows.values()),
            tuple(self._front(source, dim) for source, dim in self.rows),
            tuple(nexts),
            tuple(stacked.values()),
        )
        scan = self.table.make(SCAN, args, None, None, None, self.loop.where, tuple(types))
        place.update({("rows", lanes): len(nexts) + at for at, lanes in enumerate(rows)})
        return scan, place

    def _front(self, source: Term, dim: int) -> Term:
        order = (dim, *(axis for axis in range(len(source.sizes)) if axis != dim))
        return self._permuted(source, order)

    def _permuted(self, source: Term, order: tuple[int, ...]) -> Term:
        if order == tuple(range(len(order))):
            return source
        shape = tuple(source.sizes[axis] for axis in order)
        return self.table.like(source, "permute", (source, order), shape)

    def _next(self, lanes: _Lanes) -> _Lanes:
        """What each round leaves where the next one finds what is carried."""
        left = lanes[1:]
        for key, value in self.made[0].items():
            if value is left[0] and all(
                turn.get(key) is due for turn, due in zip(self.made, left, strict=False)
            ):
                whole = [turn.get(key) for turn in self.made]
                if all(part is not None for part in whole):
                    return tuple(whole)  # type: ignore[arg-type]
        if len(left) < 2:
            raise irregular(self.loop, lanes[0].line, "what is carried is found once only")
        return left

    def _of_all(
        self, lanes: _Lanes, scan: Term | None, place: Mapping[tuple[str, _Lanes], int]
    ) -> Term:
        """The rows of all rounds, along axis 0."""
        value = self._of(lanes)
        for (source, dim), row in self.rows.items():
            if value is row:
                return self._front(source, dim)
        assert scan is not None
        return self._item(scan, place["rows", lanes])

    def _result(
        self, term: Term, scan: Term | None, place: Mapping[tuple[str, _Lanes], int]
    ) -> Term:
        lanes = self._lanes(term)
        written = self._written_rows(lanes)
        if self._is_rows(term):
            dim, is_joined = term.args[2], term.args[3]
        elif written is not None:
            lanes, dim, is_joined = written.lanes, written.dim, written.is_kept
        else:
            assert scan is not None
            return self._item(scan, place["end", lanes])
        rows = self._along(self._of_all(lanes, scan, place), dim, lanes[0], is_joined=is_joined)
        return rows if written is None else put_in_order(self.table, written, rows)

    def _along(self, rows: Term, dim: int, like: Term, *, is_joined: bool) -> Term:
        """The rows of all rounds, moved from axis 0 to the one that they have after the loop."""
        rank = len(rows.sizes)
        if is_joined:  # of size 1 along that axis
            rest = [axis for axis in range(1, rank) if axis != dim + 1]
            rest.insert(dim, 0)
            moved = self._permuted(rows, (*rest[: dim + 1], dim + 1, *rest[dim + 1 :]))
            sizes = (*like.sizes[:dim], self.loop.count, *like.sizes[dim + 1 :])
            return self.table.like(moved, "reshape", (moved, sizes), sizes)
        rest = list(range(1, rank))
        rest.insert(dim, 0)
        return self._permuted(rows, tuple(rest))

    def _item(self, scan: Term, index: int) -> Term:
        shape, dtype, device = scan.payload[index]
        return self.table.make("item", (scan, index), shape, dtype, device, scan.line)


def _aligned(made: list[dict[tuple[int, bool], Term]]) -> list[dict[tuple[int, bool], Term]]:
    """The rounds with equal places, where the first one makes something more at its begin."""
    first, second = ({order for order, _ in turn} for turn in made[:2])
    more = max(first, default=0) - max(second, default=0)
    if more <= 0:
        return made
    return [
        {(order - more, is_base): term for (order, is_base), term in made[0].items()},
        *made[1:],
    ]


def _same_but_terms(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same_but_terms, one, other))
    if isinstance(one, Term) and isinstance(other, Term):
        return True
    if isinstance(one, float) and isinstance(other, float):
        return repr(one) == repr(other)
    return type(one) is type(other) and bool(one == other)


def _words(term: Term) -> str:
    return term.name if term.op not in ("input", "attribute") else str(term.args[0])


def irregular(loop: Loop, where: SourceLine | None, why: str) -> CaptureError:
    """Why the rounds of a loop are no scan."""
    return CaptureError(
        Refusal(
            "The rounds of a loop over the tokens are not alike.",
            why=f"Of the rounds that were compared, {why}. One graph has one step for all tokens.",
            remedy="Let every token go through the same code: start from a state that is given "
            "before the loop, and carry everything else in tensors.",
            where=where or loop.where,
        )
    )
