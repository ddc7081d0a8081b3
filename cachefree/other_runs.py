"""Whether a captured path is the path that the model takes in other runs.

A symbolic size is no ``int``: ``isinstance(n, int)``, ``type(n)``, ``str(n)`` or an ``except`` may
send the code another way while it is captured, without a question being asked. So the model is run
again with plain numbers: at the example's sizes, around the numbers that its code names where it is
hard to hear, with every size 1, and with many more tokens where it loops over them. Each time it
has to call the same functions of torch with the same tensors.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from cachefree.calls import Call
from cachefree.errors import CaptureError, Refusal, SourceLine
from cachefree.explaining import explained
from cachefree.faithful import CallLog, TorchCall, refuse_another_path
from cachefree.fake_runs import (
    for_inference,
    marks_on,
    negated,
    of_one_row,
    run_on_fakes,
    scattered,
    tracked,
)
from cachefree.jumps import Jumps, unwatched, watched_jumps
from cachefree.loops import Loop
from cachefree.other_sizes import many_rounds, other_sizes
from cachefree.plain_results import refuse_another_result
from cachefree.repeated_calls import places_of, repeated
from cachefree.sameness import asks_for_sameness, refuse_sameness
from cachefree.sizes import SizeEnvironment, compiled, size_symbol
from cachefree.structure import Structure, flatten

__all__ = ["CapturedCalls"]

log = logging.getLogger(__name__)


class _WatchedLog(CallLog):
    """The calls of torch functions in code whose jumps are watched: torch's own are not."""

    def called(self, *call: Any) -> Any:
        with unwatched():
            return super().called(*call)


@dataclass(frozen=True)
class CapturedCalls:
    """The calls of a path while it was captured.

    Attributes:
        model: The model.
        call: How it was called.
        environment: The sizes, and what was asked about them.
        calls: The calls of torch functions, and what came of them.
        result: What was returned: tensors and symbolic numbers, and what they are in.
        loops: Loops over tokens.
        hints: The example size of each symbol.
        asked: Sizes by which the questions of Python code were answered instead.
    """

    model: torch.nn.Module
    call: Call
    environment: SizeEnvironment
    calls: Sequence[TorchCall]
    result: tuple[Sequence[Any], Structure]
    loops: Sequence[Loop]
    hints: Mapping[str, int]
    asked: Mapping[str, int]

    @property
    def _sizes(self) -> dict[str, int]:
        return {**self.hints, **self.asked}

    def compare(self, jumps: Jumps | None) -> CaptureError | None:
        """Compares them with those of other runs.

        Args:
            jumps: Where to write down which way conditional jumps go; None for nowhere.

        Returns:
            The refusal, where a loop hands on other tensors with more rounds. One that tells more
            may be found where its rounds are compared.

        Raises:
            CaptureError: they differ otherwise.
        """
        plain = self._compare_here(jumps)
        doubts = [self._compare_with_more_tokens()]
        if asks_for_sameness(self.model):
            with refuse_sameness():
                run_on_fakes(self.model, self.call, self._sizes)
        doubts += [self._compare_elsewhere(), self._compare_at_one()]
        if plain.asks_layout:
            self._compare_made(plain, scattered)
            self._compare_made(plain, of_one_row)
        if plain.asks_history:
            self._compare_made(plain, tracked)
            self._compare_made(plain, for_inference)
            self._compare_made(plain, negated)
        return next((doubt for doubt in doubts if doubt is not None), None)

    def _compare_here(self, jumps: Jumps | None) -> CallLog:
        """With a run at the example's sizes."""
        plain = CallLog() if jumps is None else _WatchedLog()
        marks: list[str] = []

        def look(leaves: list[Any], args: Any, kwargs: Any, value: Any) -> None:
            marks.extend(marks_on([*leaves, *flatten(value)[0]]))

        watched = contextlib.nullcontext() if jumps is None else watched_jumps(jumps)
        try:
            with watched:
                _, structure = run_on_fakes(self.model, self.call, self._sizes, plain, seen=look)
        except Exception as error:
            raise explained(error, "The model does not run with plain sizes.") from error
        plain.refuse_values()
        if marks:
            raise _marked(marks[0])
        values = {size_symbol(name): sympy.Integer(size) for name, size in self.hints.items()}
        refuse_another_path(
            repeated(self.calls, self.loops, self._sizes),
            plain.whole,
            {**values, **places_of(self.loops)},
            with_sizes=not self.asked,
        )
        if not self.asked:
            refuse_another_result(*self.result, structure, self._sizes)
        return plain

    def _compare_with_more_tokens(self) -> CaptureError | None:
        """The rounds of loops over tokens, with those of a run with many more."""
        symbols = {str(s) for loop in self.loops for s in sympy.sympify(loop.count).free_symbols}
        found = [self._run_with_more(name) for name in sorted(symbols)]
        runs = [run for run in found if run is not None]
        for is_last in (False, True):
            for point, many in runs:
                try:
                    refuse_another_path(
                        repeated(self.calls, self.loops, point),
                        many.whole,
                        _values(point),
                        with_sizes=is_last and not self.asked,
                        with_numbers=True,
                        with_sources=is_last,
                    )
                except CaptureError as error:
                    refusal = _another_round(error.refusals[0].where or self.loops[0].where)
                    if is_last:
                        return refusal
                    raise refusal from error
        return None

    def _run_with_more(self, name: str) -> tuple[dict[str, int], CallLog] | None:
        """A run with more tokens: as many as the path is for and the model has room for.

        None where the path is for no more of them than the example has.
        """
        numbers = self._more(name)
        if not numbers:
            return None
        best: tuple[dict[str, int], CallLog] | None = None
        start, end = 0, len(numbers)
        place = end - 1
        while start < end:
            point, many = {**self._sizes, name: numbers[place]}, CallLog()
            try:
                run_on_fakes(self.model, self.call, point, many)
            except Exception as error:  # noqa: BLE001 - the model may have room for fewer
                log.debug("the model does not run at %s: %s", point, error)
                end = place
            else:
                start, best = place + 1, (point, many)
            place = (start + end) // 2
        if best is not None:
            return best
        raise CaptureError(
            Refusal(
                f"A loop over the tokens runs for {self.loops[0].rounds} of them only.",
                why="With one or two more the model raises an error, so that nothing tells what "
                "its other rounds do.",
                remedy="Loop over any number of tokens.",
                where=self.loops[0].where,
            )
        )

    def _more(self, name: str) -> list[int]:
        """Greater numbers at which every question of the path is answered as it was."""
        facts = [
            compiled(question.fact)
            for question in self.environment.questions.values()
            if {str(symbol) for symbol in question.fact.free_symbols} <= self._sizes.keys()
        ]
        numbers = range(self._sizes[name] + 1, many_rounds(self.model) + 1)
        return [n for n in numbers if all(fact({**self._sizes, name: n}) for fact in facts)]

    def _compare_elsewhere(self) -> CaptureError | None:
        """At other sizes of the path's region, where that may matter."""
        doubt = None
        for point in other_sizes(self.model, self.environment, self._sizes):
            doubt = self._compare_at(point, with_sizes=not self.loops) or doubt
        return doubt

    def _compare_at_one(self) -> CaptureError | None:
        """With a run where every size is 1, if the path should be the same there.

        Code can tell 1 from other numbers without asking a question: ``n is ONE``.
        """
        ones = dict.fromkeys(self.environment.sizes, 1)
        questions = self.environment.questions.values()
        if self.asked or not all(compiled(question.fact)(ones) for question in questions):
            return None
        return self._compare_at(ones, with_sizes=False)

    def _compare_at(self, point: Mapping[str, int], *, with_sizes: bool) -> CaptureError | None:
        """With a run at some sizes.

        Returns:
            The refusal, where a path with loops hands on other tensors.
        """
        run = CallLog()
        try:
            _, structure = run_on_fakes(self.model, self.call, point, run)
        except Exception as error:  # noqa: BLE001 - an operator that does not run is told later
            log.debug("the model does not run at %s: %s", point, error)
            return None
        expected = repeated(self.calls, self.loops, point)
        for with_sources in (False, True) if self.loops else (True,):
            try:
                refuse_another_path(
                    expected,
                    run.whole,
                    _values(point),
                    with_sizes=with_sizes,
                    with_numbers=True,
                    with_sources=with_sources,
                )
            except CaptureError as error:
                if not self.loops or not with_sources:
                    raise
                return error
        refuse_another_result(*self.result, structure, point)
        return None

    def _compare_made(self, plain: CallLog, made: Callable[..., torch.Tensor]) -> None:
        """Two plain runs, where code asks how tensors were made: inputs may be made otherwise."""
        other = CallLog()
        try:
            run_on_fakes(self.model, self.call, self._sizes, other, made=made)
        except Exception as error:  # noqa: BLE001 - the model itself refuses such inputs
            log.debug("the model takes no inputs that are %s: %s", made.__name__, error)
            return
        refuse_another_path(plain.whole, other.whole, {}, with_sizes=False, with_numbers=True)


def _marked(name: str) -> CaptureError:
    return CaptureError(
        Refusal(
            f"The model sets the attribute {name!r} of a tensor that it is given, or returns.",
            why="A later call may be given that tensor and read it there; the tensors of a graph "
            "have no attributes.",
            remedy="Return what it says beside the tensor.",
        )
    )


def _another_round(where: SourceLine | None) -> CaptureError:
    return CaptureError(
        Refusal(
            "A loop over the tokens does something else for a later token.",
            why="With many of them it calls other functions of torch than with few, or hands "
            "other tensors to them.",
            remedy="Let every token go through the same code.",
            where=where,
        )
    )


def _values(sizes: Mapping[str, int]) -> dict[sympy.Symbol, sympy.Integer]:
    return {size_symbol(name): sympy.Integer(size) for name, size in sizes.items()}
