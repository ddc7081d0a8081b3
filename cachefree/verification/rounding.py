"""How much rounding alone changes a result: what weights off in their last digit make of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch

from cachefree.spec import Interface
from cachefree.verification.padding import without_dropped
from cachefree.verification.runners import Runner
from cachefree.verification.tolerance import distance

__all__ = ["Rounding"]

Outputs = list[torch.Tensor]
Call = tuple[Mapping[str, torch.Tensor], Mapping[str, int]]


class Rounding:
    """Repeats a generation with weights that differ in their last digit, where that is asked for.

    Args:
        interface: Of the graph.
        copies: Makes the models whose weights differ, in float64 or as the original is.
    """

    def __init__(self, interface: Interface, copies: Callable[[bool], Sequence[Runner]]) -> None:
        self._interface, self._copies = interface, functools.cache(copies)
        self._calls: list[Call] = []
        self._results: dict[bool, list[Outputs]] = {}

    def start(self) -> None:
        """Forgets the generation."""
        self._calls, self._results = [], {}

    def add(self, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> None:
        """Takes note of the next call of the generation."""
        self._calls.append((tensors, sizes))
        self._results = {}

    def spread(self, index: int, exact: Outputs | None, original: Outputs) -> float:
        """How far an output of the last call comes out from the exact one, or from the original.

        Args:
            index: Of the output.
            exact: What the original gives in float64; None where that cannot be had.
            original: What it gives.
        """
        is_exact, reference = exact is not None, original if exact is None else exact
        if is_exact not in self._results:
            self._results[is_exact] = [
                self._last(runner, reference) for runner in self._copies(is_exact)
            ]
        found = self._results[is_exact]
        return max((distance(outputs[index], reference[index]) for outputs in found), default=0.0)

    def _last(self, runner: Runner, reference: Outputs) -> Outputs:
        runner.start()
        outputs = reference
        for tensors, sizes in self._calls:
            outputs = runner.call(tensors, sizes)
        tensors, sizes = self._calls[-1]
        return without_dropped(self._interface, outputs, reference, tensors, sizes["query"])
