"""Loops over tokens as one term: a scan, whose body is one round.

A path is captured with its loops run a few times. The rounds are laid side by side, value by value:
where all of them apply the same operator, so does the body; what a round finds already made is
carried; what is the same in all of them is a constant; ``x[:, t]`` is a row that the scan hands in.
So the body is what every round that was run computes, the first one among them, from what the one
before left. That it is so for all other rounds follows, since the code cannot tell them apart
(`cachefree.loops`).

Before: ``for t in range(n): h = step(x[:, t], h); ys.append(h)`` and ``stack(ys, 1)``.

After: ``scan(n, step, h, x)``: the last ``h``, and all of them.

Why equal: by induction over the tokens. What is given before the first round is the same, and each
round does the same to what it finds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx

from cachefree.errors import CaptureError, Refusal
from cachefree.loops import LOOP, Loop
from cachefree.one_round import Made, OneRound, irregular
from cachefree.placed_rows import has_token
from cachefree.provenance import LINE
from cachefree.terms import SCAN, Table, Term, operands, outer_operands, topological
from cachefree.token_rows import rows_operator

__all__ = ["Rounds", "loops_in"]


class Rounds:
    """What the rounds of a path's loops made, written down while the path is read.

    Args:
        table: Where the terms are made.
        loops: The loops.
    """

    def __init__(self, table: Table, loops: Sequence[Loop]) -> None:
        self.loops = loops
        self.made = Made(
            table,
            [[{} for _ in range(loop.rounds)] for loop in loops],
            [[set() for _ in range(loop.rounds)] for loop in loops],
        )
        self.at = (-1, 0)
        self.members: dict[fx.Node, tuple[int, int]] = {}

    def enter(self, node: fx.Node) -> None:
        """Refuses a node that reads what only one of the rounds made, but the last or its own.

        Raises:
            CaptureError: it does.
        """
        place = node.meta.get(LOOP)
        if place is not None:
            self.at = place[:2]
        elif self.at[1] >= 0 and self.at[0] >= 0:
            self.at = (self.at[0], self.loops[self.at[0]].rounds)
        found: set[tuple[int, int]] = set()
        for operand in node.all_input_nodes:
            made = self.members.get(operand)
            if made is None or operand.op == "get_attr":
                continue
            loop = self.loops[made[0]]
            if place is not None and made[0] == place[0]:
                if made[1] < place[1] - 1:
                    self._refuse_reach(loop, node)
            elif made[1] < loop.rounds - 1 or (made[1] == loop.rounds - 1 and found):
                found.add(made)
        if place is not None:
            if found:
                self._refuse_reach(self.loops[next(iter(found))[0]], node)
            self.members[node] = place[:2]
        elif found and node.target is not rows_operator():
            if len(found) > 1 or node.op == "output":
                self._refuse_reach(self.loops[next(iter(found))[0]], node)
            self.members[node] = found.pop()

    def _refuse_reach(self, loop: Loop, node: fx.Node) -> None:
        raise CaptureError(
            Refusal(
                "A value of one round of a loop over the tokens is read elsewhere.",
                why="Each round may read what the one before it left, and after the loop there is "
                "what the last one left, and all of them put together by torch.stack.",
                remedy="Carry it from token to token, or stack what all of them gave.",
                where=node.meta.get(LINE) or loop.where,
            )
        )

    def note(self, node: fx.Node, terms: Iterable[Term], *, is_write: bool = False) -> None:
        """Writes down what a node made: its value, and what it was written to."""
        terms = list(terms)
        for term in terms:
            self._born(term)
        place = node.meta.get(LOOP)
        if place is None:
            return
        number, turn, order = place
        if is_write:
            self.made.writes[number][turn].add(order)
        for which, term in enumerate(terms):
            self.made.values[number][turn][order, bool(which)] = term

    def _born(self, term: Term) -> None:
        pending = [term]
        while pending:
            below = pending.pop()
            if below not in self.made.born:
                self.made.born[below] = self.at
                pending += operands(below)

    def closed(self, outputs: Sequence[Term]) -> tuple[Term, ...]:
        """The outputs with a scan in place of each loop.

        Raises:
            CaptureError: the rounds are not alike, or more is read of them than a scan gives.
        """
        results = tuple(outputs)
        for loop in self.loops:
            later = [
                value
                for made in self.made.values[loop.number + 1 :]
                for turn in made
                for value in turn.values()
            ]
            closed = OneRound(self.made, loop).run((*results, *later))
            results = tuple(closed[term] for term in results)
            for made in self.made.values[loop.number + 1 :]:
                for turn in made:
                    for key, value in turn.items():
                        turn[key] = closed[value]
            for old, new in closed.items():
                if old in self.made.born:
                    self.made.born.setdefault(new, self.made.born[old])
        for term in topological(results):
            if has_token(term, None):
                raise irregular(
                    self.loops[0], term.line, "what comes after it depends on a token's place"
                )
        return results


def loops_in(outputs: Iterable[Term]) -> tuple[str, ...]:
    """The loops over tokens of a graph, in words."""
    found = [term for term in topological(outputs, outer_operands) if term.op == SCAN]
    return tuple(
        f"{term.args[0]} tokens one by one, {len(term.args[2])} tensor"
        f"{'s' if len(term.args[2]) != 1 else ''} carried (Scan in ONNX)"
        + (f"; {term.line.file}:{term.line.line}" if term.line is not None else "")
        for term in found
    )
