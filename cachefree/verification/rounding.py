"""How much rounding alone changes a result: in float64, with weights off in their last digit."""

from __future__ import annotations

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
        copies: Makes the models in float64 whose weights differ.
    """

    def __init__(self, interface: Interface, copies: Callable[[], Sequence[Runner]]) -> None:
        self._interface, self._copies = interface, copies
        self._runners: Sequence[Runner] | None = None
        self._calls: list[Call] = []
        self._results: list[Outputs] | None = None

    def start(self) -> None:
        """Forgets the generation."""
        self._calls, self._results = [], None

    def add(self, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> None:
        """Takes note of the next call of the generation."""
        self._calls.append((tensors, sizes))
        self._results = None

    def spread(self, index: int, exact: Outputs | None) -> float:
        """How far an output of the last call is from the exact one; 0 where there is none."""
        if exact is None:
            return 0.0
        if self._results is None:
            self._results = [self._last(runner, exact) for runner in self._copies_once()]
        return max((distance(found[index], exact[index]) for found in self._results), default=0.0)

    def _copies_once(self) -> Sequence[Runner]:
        if self._runners is None:
            self._runners = self._copies()
        return self._runners

    def _last(self, runner: Runner, exact: Outputs) -> Outputs:
        runner.start()
        outputs = exact
        for tensors, sizes in self._calls:
            outputs = runner.call(tensors, sizes)
        tensors, sizes = self._calls[-1]
        return without_dropped(self._interface, outputs, exact, tensors, sizes["query"])
