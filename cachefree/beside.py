"""Two ways of computing one value, chosen by sizes: side by side, each on all rows or on none.

Before: ``y = step(x, state) if state is not None and n == 1 else chunks(x, state)``.

After: ``rows = batch * (n == 1) * min(1, past)`` and ``cat([step(x[:rows]), chunks(x[rows:])])``,
along the batch.

Why equal: the sizes make ``rows`` all or none, so that one of the two is given the whole batch and
the other one no row of it, and gives none: ``cat([e, y]) = y``. So nothing is asked of either, not
even that rows are independent of one another. What both ways have alike is not computed twice.

Only a step stands beside a loop: where code has another way for one token and no loop over tokens
or chunks of them, that way is most often a mistake, and its line is what the user has to know.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import Max, Min

from cachefree.facts import Facts
from cachefree.normal import Normaliser
from cachefree.regimes import Kind, Regime, Survey
from cachefree.rules import Closing, replaced
from cachefree.sizes import expression, size_symbol
from cachefree.spec import FIRST_CALL
from cachefree.terms import SCAN, Table, Term, operands, replace_operands, topological

__all__ = ["with_ways_beside"]

aten = torch.ops.aten
_BATCH = size_symbol("batch")
_PAST = size_symbol("past")
_LEAVES = ("input", "attribute", "constant")
_TO_A_SHAPE = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


class _Beside:
    name = "two ways side by side"
    neutral = "no row of the batch for the way that is not taken"

    def edit(self, site: Any) -> None:
        """Not asked: both ways are found by walking both paths together."""


def with_ways_beside(
    table: Table,
    outputs: Sequence[Term],
    surveys: Sequence[Survey],
    kinds: Sequence[Kind],
    past: Sequence[sympy.Symbol],
) -> Iterator[Closing]:
    """The graph with the ways of a region that it does not serve beside its own.

    Args:
        table: Of all terms.
        outputs: The one graph's.
        surveys: What was found of each call.
        kinds: The calls.
        past: The past's lengths, by which a first call is told from later ones.
    """
    if past != (_PAST,):  # a slot that is empty or full is no length that a way can be given
        return
    if not any(term.op == SCAN for term in topological(outputs)):
        return
    for found, kind in reversed(list(zip(surveys, kinds, strict=True))):
        for regime in found.unequal:
            rows = _rows(kind, regime, past[0])
            if rows is None or kind.uniform:
                continue
            edited = _Ways(table, tuple(outputs), kind, regime, rows).joined()
            if edited is not None:
                yield Closing(_Beside(), edited, regime.comparison.divergences)


def _rows(kind: Kind, regime: Regime, past: sympy.Symbol) -> Any:
    """The batch where a region is, else 0; None where a region is more than some sizes.

    A way for other sizes than its own is given no row, but has to run: its sizes are numbers. That
    something is past chooses no way by itself: a first call that differs from later ones at every
    size is closed by a rule, or has no neutral element.
    """
    if not regime.pinned or len(regime.region.conditions) > len(regime.pinned):
        return None
    is_there = Max(0, 1 - past) if kind.name == FIRST_CALL else Min(1, past)
    for symbol, size in regime.pinned.items():
        is_there *= Max(0, Min(1 + symbol - size, 1 + size - symbol))
    return _BATCH * is_there


_Pair = tuple[Term, Term]


@dataclass
class _Ways:
    """One region's own path, beside the one graph.

    Attributes:
        rows: How many rows of a batch are the path's.
        gates: Values of the one graph with those of the path that are to stand beside them.
    """

    table: Table
    outputs: tuple[Term, ...]
    kind: Kind
    regime: Regime
    rows: Any
    settled: dict[_Pair, str] = field(default_factory=dict)
    gates: dict[Term, Term] = field(default_factory=dict)

    def joined(self) -> tuple[Term, ...] | None:
        """The outputs with both ways where they part; None where they cannot stand side by side."""
        own = self.regime.program.outputs
        conditions = self.regime.region.conditions
        self.facts = Facts((*self.kind.basics, *(condition.fact for condition in conditions)))
        values = self.kind.values_where(self.regime.pinned, conditions)
        given = dict(self.kind.inputs)
        self.mine = Normaliser(self.table, self.facts, values, given, is_exact=False)
        self.theirs = Normaliser(self.table, self.facts, values, is_exact=False)
        self.mine.normal(self.outputs)
        self.theirs.normal(own)
        self.ids: dict[Any, int] = {}
        self.left = self._named(self.outputs, self.mine, {})
        self.right = self._named(own, self.theirs, {})
        pairs = list(zip(self.outputs, own, strict=True))
        alike = self._settle(pairs)
        if alike is None:
            return None
        self.right = self._named(own, self.theirs, alike)
        self.is_open = _open((*self.outputs, *own))
        shared = set(self.right.values())
        self.known = {
            self.left[term]: term
            for term in reversed(topological(self.outputs))
            if not self.is_open[term]
        }
        self.latest = _latest(self.outputs, self.gates)
        edits = {}
        for one, other in self.gates.items():
            new = self._beside(one, other, shared)
            if new is None:
                return None
            edits[one] = new
        return replaced(self.table, self.outputs, edits) if edits else None

    def _named(
        self, outputs: Iterable[Term], normaliser: Normaliser, alike: Mapping[Term, int]
    ) -> dict[Term, int]:
        """A number for each value: equal ones are the same in this region."""
        names: dict[Term, int] = {}
        normal: dict[Term, int] = self.__dict__.setdefault("normal", {})
        for term in topological(outputs):
            if term in alike:
                names[term] = alike[term]
                continue
            args = replace_operands(
                term.args,
                lambda arg: (
                    ("value", names[arg])
                    if isinstance(arg, Term)
                    else (type(arg).__name__, str(self._size(arg)))
                ),
            )
            spelled = self.ids.setdefault((term.op, args), len(self.ids))
            names[term] = normal.setdefault(normaliser.of(term), spelled)
        return names

    def _size(self, size: Any) -> Any:
        return self.mine._size(size)

    def _settle(self, outputs: list[_Pair]) -> dict[Term, int] | None:
        """Finds where both part; gives the numbers of what is alike then, by the path's value."""
        order: list[_Pair] = []
        below: dict[_Pair, list[_Pair] | None] = {}
        stack = list(outputs)
        while stack:
            pair = stack.pop()
            if pair in below:
                continue
            order.append(pair)
            is_alike = self.left[pair[0]] == self.right[pair[1]]
            below[pair] = [] if is_alike else self._operands(*pair)
            stack += below[pair] or ()
        can: dict[_Pair, str | None] = {}
        for pair in self._upwards(outputs, below):
            inner = below[pair]
            if inner is not None and all(can.get(each) for each in inner):
                can[pair] = "alike"
            else:
                can[pair] = "parted" if self._may_part(*pair) else None
        if not all(can[pair] for pair in outputs):
            return None
        alike: dict[Term, int] = {}
        stack, seen = list(outputs), set()
        while stack:
            pair = stack.pop()
            if pair in seen:
                continue
            seen.add(pair)
            one, other = pair
            if alike.setdefault(other, self.left[one]) != self.left[one]:
                return None
            if can[pair] == "parted":
                if self.gates.setdefault(one, other) is not other:
                    return None
            else:
                stack += below[pair] or ()
        return alike

    @staticmethod
    def _upwards(
        outputs: Iterable[_Pair], below: Mapping[_Pair, list[_Pair] | None]
    ) -> Iterator[_Pair]:
        """Pairs, those of operands first."""
        seen: set[_Pair] = set()
        stack = [(pair, False) for pair in outputs]
        while stack:
            pair, is_expanded = stack.pop()
            if is_expanded:
                yield pair
            elif pair not in seen:
                seen.add(pair)
                stack.append((pair, True))
                stack += [(each, False) for each in below[pair] or () if each not in seen]

    def _operands(self, one: Term, other: Term) -> list[_Pair] | None:
        """The operands side by side; None where the two are no one operator."""
        if one.op != other.op or one.op in (*_LEAVES, SCAN, "bound"):
            return None

        def bare(args: Any) -> Any:
            return replace_operands(
                args, lambda arg: Term if isinstance(arg, Term) else self._size(arg)
            )

        if bare(one.args) != bare(other.args):
            return None
        return list(zip(operands(one), operands(other), strict=True)) or None

    def _may_part(self, one: Term, other: Term) -> bool:
        if one.shape is None or other.shape is None or one.dtype != other.dtype:
            return False
        if _batch_axis(one) is None or _batch_axis(other) is None:
            return False
        sizes = [[self._size(size) for size in term.sizes] for term in (one, other)]
        due = [[size for size in part if size != 1] for part in sizes]
        return len(due[0]) == len(due[1]) and all(map(self.facts.equal, *due))

    def _beside(self, one: Term, other: Term, shared: set[int]) -> Term | None:
        """Both ways' rows of one value; None where what they start from cannot be parted."""
        rest = expression(sympy.expand(_BATCH - self.rows))
        mine = self._rows_of(
            one,
            rest,
            lambda term: (
                self._part(term, term, self.rows, _BATCH)
                if term.op == "input" or self.left[term] in shared
                else None
            ),
        )
        theirs = self._rows_of(
            other,
            self.rows,
            lambda term: (
                self._part(self.known[name], term, sympy.Integer(0), self.rows)
                if (name := self.right[term]) in self.known
                and self.latest[self.known[name]] < self.latest[one]
                else None
            ),
        )
        if mine is None or theirs is None:
            return None
        axis = _batch_axis(one)
        assert axis is not None
        shape = (*one.sizes[:axis], self.rows, *one.sizes[axis + 1 :])
        if theirs.sizes != shape:
            theirs = self.table.like(theirs, "reshape", (theirs, shape), shape)
        return self.table.like(one, aten.cat.default, ((theirs, mine), axis), one.sizes)

    def _rows_of(self, top: Term, rows: Any, start: Any) -> Term | None:
        """A value for some rows of the batch, from the parts that it starts from."""
        starts: dict[Term, Term] = {}

        def below(term: Term) -> Iterable[Term]:
            if term is not top and not self.is_open[term]:
                found = start(term)
                if found is not None:
                    starts[term] = found
                    return ()
            return operands(term)

        done: dict[Term, Term] = {}

        def sized(value: Any) -> Any:
            if isinstance(value, Term):
                return done[value]
            if isinstance(value, sympy.Basic) and value.has(_BATCH):
                return expression(value.xreplace({_BATCH: rows}))
            return value

        for term in topological([top], below):
            if term in starts or term.op in _LEAVES:
                if term.op == "input" and term not in starts:
                    return None
                done[term] = starts.get(term, term)
                continue
            payload = term.payload
            if term.shape is None and payload is not None:
                payload = tuple((tuple(map(sized, part)), *kind) for part, *kind in payload)
            args = replace_operands(term.args, sized)
            shape = None if term.shape is None else tuple(map(sized, term.shape))
            if term.op in _TO_A_SHAPE:
                args = (args[0], shape)  # -1 is no size where there is no row
            done[term] = self.table.make(
                term.op,
                args,
                shape,
                term.dtype,
                term.device,
                term.line,
                payload,
            )
        return done[top]

    def _part(self, source: Term, like: Term, begin: Any, end: Any) -> Term | None:
        """Some rows of a value of the one graph, as large as another is; None if it has none."""
        if source.shape is None or len(source.sizes) != len(like.sizes):
            return None
        if not any(_has_batch(size) for size in source.sizes):
            own: int | None = None
        else:
            own = _batch_axis(source)
            if own is None:
                return None
        for axis, size in enumerate(like.sizes):
            bounds = (begin, end) if axis == own else (sympy.Integer(0), size)
            if axis != own and source.sizes[axis] == size:
                continue
            shape = list(source.sizes)
            shape[axis] = expression(sympy.expand(bounds[1] - bounds[0]))
            args = (source, axis, *map(expression, bounds), 1)
            source = self.table.like(source, aten.slice.Tensor, args, shape)
        return source


def _has_batch(size: Any) -> bool:
    return isinstance(size, sympy.Basic) and size.has(_BATCH)


def _batch_axis(term: Term) -> int | None:
    """The axis of a value's rows, one for each text of a batch; None where there is none."""
    assert term.shape is not None
    axes = [axis for axis, size in enumerate(term.shape) if _has_batch(size)]
    return axes[0] if len(axes) == 1 and term.shape[axes[0]] == _BATCH else None


def _latest(outputs: Iterable[Term], gates: Iterable[Term]) -> dict[Term, int]:
    """The place of the last gate at or below each value: gates are edited in this order."""
    places = {term: place for place, term in enumerate(topological(outputs), start=1)}
    latest: dict[Term, int] = {}
    for term in places:
        own = places[term] if term in gates else 0
        latest[term] = max([own, *(latest[below] for below in operands(term))])
    return latest


def _open(outputs: Iterable[Term]) -> dict[Term, bool]:
    """Which values are of a loop's body."""
    found: dict[Term, bool] = {}
    for term in topological(outputs):
        found[term] = term.op == "bound" or (
            term.op != SCAN and any(found[below] for below in operands(term))
        )
    return found
