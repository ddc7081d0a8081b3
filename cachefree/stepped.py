"""First paths that compute all tokens at once, where later ones step a state: the steps, scanned.

Before: ``if state is None: y, state = parallel(x)``, ``else: y, state = step(x, state)``.

After: ``scan(n, step, state, x)``, from the neutral state.

Why equal: a scan of one token is its body, which is the later path itself. For more tokens than
one later calls may compute anything, so these are outside the domain. That the parallel form is
its steps is a theorem about the model that no term tells; it is tested (`cachefree.tested`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import nn

from cachefree.calls import TensorSpec
from cachefree.discover import Discovery
from cachefree.errors import Refusal, SourceLine, UnsupportedBranchError
from cachefree.facts import Facts
from cachefree.one_token import of_one_token
from cachefree.reading import Program
from cachefree.rules import replaced
from cachefree.sizes import size_symbol, symbols_of
from cachefree.starts import past_symbols
from cachefree.terms import SCAN, Table, Term, topological
from cachefree.write_once import OneCall

__all__ = [
    "SCANNED",
    "has_state",
    "not_its_steps",
    "not_tested",
    "step_of",
    "with_steps_scanned",
]

SCANNED = (
    "that the first call is its steps: the graph scans the later path over the tokens, and random "
    "values at many sizes showed no difference"
)
_QUERY = size_symbol("query")
_MOST_TRIED = 12


def has_state(discovery: Discovery) -> bool:
    """Whether something in the cache keeps its size."""
    return len(_growing(discovery)) < len(discovery.cache_leaves)


def step_of(model: nn.Module, table: Table, names: dict[int, str], discovery: Discovery) -> Program:
    """The later path for one token.

    Raises:
        UnsupportedBranchError: something in the cache grows with the tokens.
    """
    for spec in _growing(discovery):
        sizes = ", ".join(map(str, spec.shape))
        raise _unfit(
            f"the cache {spec.path} of shape ({sizes}) grows with the tokens, and what is carried "
            "from token to token keeps its size"
        )
    return of_one_token(model, table, names, discovery)


def _growing(discovery: Discovery) -> list[TensorSpec]:
    """The tensors of the cache whose sizes are not those of every first call."""
    known = symbols_of(size for spec in discovery.first.tensors for size in spec.shape) - {_QUERY}
    caches = [discovery.later.tensors[place] for place in discovery.cache_leaves]
    return [spec for spec in caches if symbols_of(spec.shape) - known]


def with_steps_scanned(
    table: Table, discovery: Discovery, first: Program, step: Program
) -> OneCall:
    """The later path's step as the body of a loop over the tokens.

    Args:
        table: Of all terms.
        discovery: How the model is called.
        first: The first path, which tells along which axis a result has the tokens.
        step: The later path for one token.

    Raises:
        UnsupportedBranchError: an input or a result is not one row a token.
    """
    return _Steps(table, discovery, first, step).run()


@dataclass
class _Steps:
    table: Table
    discovery: Discovery
    first: Program
    step: Program
    carried: list[Term] = field(default_factory=list)
    rows: list[Term] = field(default_factory=list)
    sources: list[Term] = field(default_factory=list)
    given: list[Term] = field(default_factory=list)

    def run(self) -> OneCall:
        inputs = tuple(
            self.table.input(spec.path, spec.shape, spec.dtype, spec.device)
            for spec in self.discovery.later.tensors
        )
        outputs = self._body(inputs)
        places = self.discovery.cache_leaves
        following = [outputs[output] for output in self.discovery.carried]
        for value, past in zip(following, self.carried, strict=True):
            self._refuse_other_state(value, past)
        results = {
            place: self._given(value, self.first.outputs[place])
            for place, value in enumerate(outputs)
            if place not in self.discovery.carried
        }
        firsts = tuple(inputs[place] for place in places)
        types = [(term.sizes, term.dtype, term.device) for term in following]
        types += [((_QUERY, *term.sizes), term.dtype, term.device) for term in self.given]
        line = next((term.line for term in following if term.line is not None), None)
        scan = self.table.make(
            SCAN,
            (
                _QUERY,
                tuple(self.carried),
                firsts,
                tuple(self.rows),
                tuple(self.sources),
                tuple(following),
                tuple(self.given),
            ),
            None,
            None,
            None,
            line,
            tuple(types),
        )
        return OneCall(self.discovery.later, inputs, self._results(scan, outputs, results), {})

    def _body(self, inputs: Sequence[Term]) -> tuple[Term, ...]:
        """The step's results, of what is carried and of one row of each input."""
        bound: dict[Term, Term] = {}
        for place, (one, whole) in enumerate(zip(self.step.inputs, inputs, strict=True)):
            if place in self.discovery.cache_leaves:
                continue
            axes = [axis for axis, size in enumerate(whole.sizes) if size == _QUERY]
            known = symbols_of(size for axis, size in enumerate(whole.sizes) if axis not in axes)
            is_past = known & set(past_symbols(self.discovery, _plain(self.discovery)))
            if len(axes) > 1 or _QUERY in known or is_past:
                raise _unfit(
                    f"the input {whole.args[0]} of shape "
                    f"({', '.join(map(str, whole.sizes))}) is not one row for each new token"
                )
            if axes:
                bound[one] = self._row(one, whole, axes[0])
        for place in self.discovery.cache_leaves:
            past = self.step.inputs[place]
            self.carried.append(self._bound(f"carried {len(self.carried)}", past.sizes, past))
            bound[past] = self.carried[-1]
        if any(term.op == SCAN for term in topological(self.step.outputs)):
            raise _unfit("the step has a loop of its own")
        return replaced(self.table, self.step.outputs, bound)

    def _row(self, one: Term, whole: Term, axis: int) -> Term:
        """One row of an input as the step takes it."""
        rest = [place for place in range(len(whole.sizes)) if place != axis]
        row = self._bound(f"row {len(self.rows)}", tuple(whole.sizes[at] for at in rest), whole)
        self.rows.append(row)
        self.sources.append(self._permuted(whole, (axis, *rest)))
        return self.table.like(row, "reshape", (row, one.sizes), one.sizes)

    def _given(self, value: Term, whole: Term) -> tuple[int, int | None]:
        """Which result of the scan is a result of the step, and along which axis it has rows.

        None: it is that of the last token.
        """
        sizes = whole.sizes
        axes = [axis for axis, size in enumerate(sizes) if size == _QUERY]
        facts = Facts((sympy.Ge(_QUERY, 1),))
        due = [1 if axis in axes else size for axis, size in enumerate(sizes)]
        is_alike = len(due) == len(value.sizes) and all(map(facts.equal, due, value.sizes))
        if len(axes) > 1 or not is_alike or _QUERY in symbols_of(due):
            raise _unfit(
                f"a result of shape ({', '.join(map(str, sizes))}) of the first call is of shape "
                f"({', '.join(map(str, value.sizes))}) for one token, which is no row of it",
                value.line or whole.line,
            )
        row = tuple(size for at, size in enumerate(value.sizes) if at not in axes)
        if axes:
            value = self.table.like(value, "reshape", (value, row), row)
        self.given.append(value)
        return len(self.given) - 1, axes[0] if axes else None

    def _results(
        self, scan: Term, outputs: Sequence[Term], given: dict[int, tuple[int, int | None]]
    ) -> tuple[Term, ...]:
        """The results of the one call: what is carried, and the rows in the order of the call."""
        ends = {output: place for place, output in enumerate(self.discovery.carried)}
        results = []
        for place, value in enumerate(outputs):
            if place in ends:
                results.append(self._item(scan, ends[place]))
                continue
            index, axis = given[place]
            rows = self._item(scan, len(ends) + index)
            if axis is None:
                shape = (1, *value.sizes)
                last = (rows, 0, _QUERY - 1, _QUERY, 1)
                rows = self.table.like(rows, "slice", last, shape)
                results.append(self.table.like(rows, "reshape", (rows, value.sizes), value.sizes))
                continue
            order = list(range(1, len(rows.sizes)))
            order.insert(axis, 0)
            results.append(self._permuted(rows, tuple(order)))
        return tuple(results)

    def _item(self, scan: Term, index: int) -> Term:
        shape, dtype, device = scan.payload[index]
        return self.table.make("item", (scan, index), shape, dtype, device, scan.line)

    def _bound(self, name: str, shape: tuple[Any, ...], like: Term) -> Term:
        args = (f"step's {name}", shape, like.dtype)
        return self.table.make("bound", args, shape, like.dtype, like.device, like.line)

    def _permuted(self, source: Term, order: tuple[int, ...]) -> Term:
        if order == tuple(range(len(order))):
            return source
        shape = tuple(source.sizes[axis] for axis in order)
        return self.table.like(source, "permute", (source, order), shape)

    def _refuse_other_state(self, value: Term, past: Term) -> None:
        facts = Facts(())
        is_alike = len(value.sizes) == len(past.sizes) and all(
            map(facts.equal, value.sizes, past.sizes)
        )
        if not is_alike or value.dtype != past.dtype:
            raise _unfit(
                f"a step makes a state of shape ({', '.join(map(str, value.sizes))}) and "
                f"{value.dtype} of one of shape ({', '.join(map(str, past.sizes))}) and "
                f"{past.dtype}",
                value.line,
            )


def not_tested(discovery: Discovery, step: Program) -> Refusal:
    """Why a step that fits is not taken where a proof is asked for."""
    return Refusal(
        "The first call computes all tokens at once, and later calls step a state.",
        why="That a parallel form equals its steps is a theorem about the model, which no law here "
        "shows.",
        remedy='check="test" takes the step, scanned over the tokens, if random values at many '
        "lengths show no difference from the first call; or loop over the tokens on the first "
        "call too.",
        where=_line_of(discovery, step),
    )


def not_its_steps(discovery: Discovery, step: Program) -> Refusal:
    """Why a step that fits is not taken where tests are asked for."""
    return Refusal(
        "The first call is not its steps, one token after the other.",
        why="The later path's step was scanned over the tokens, and random values show a "
        "difference from the first call, or are no numbers in one of the two.",
        remedy="Compare a first call over n tokens with one over a single token and n - 1 later "
        "calls: the two have to agree.",
        where=_line_of(discovery, step),
    )


def _plain(discovery: Discovery) -> OneCall:
    return OneCall(discovery.later, (), (), {})


def _unfit(why: str, where: SourceLine | None = None) -> UnsupportedBranchError:
    return UnsupportedBranchError(
        Refusal(
            "The later path for one token cannot be scanned over the tokens of a first call.",
            why=f"{why[0].upper()}{why[1:]}.",
            remedy="Take one row of each input and give one row of each result for a token, and "
            "carry states of fixed size; or make both paths the same code.",
            where=where,
        )
    )


def _line_of(discovery: Discovery, step: Program) -> SourceLine | None:
    """The line that makes a state."""
    states = (step.outputs[output] for output in discovery.carried)
    return next((term.line for term in states if term.line is not None), None)
