"""How much rounding alone changes a result: each operator's output is off in its last digit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from cachefree.spec import Interface
from cachefree.verification.padding import without_dropped
from cachefree.verification.runners import Runner
from cachefree.verification.tolerance import distance

__all__ = ["RandomRounding", "Rounding"]

Outputs = list[torch.Tensor]
Call = tuple[Mapping[str, torch.Tensor], Mapping[str, int]]
RUNS = 3
"""How often each generation is rounded anew."""


class RandomRounding(TorchDispatchMode):
    """Every operator's floating-point result is off by up to the last digit of a dtype.

    Random rounding tells how far apart computations may come out that differ in the order of their
    sums alone. What is computed of sizes alone stays: a position is not rounded to its neighbour.

    Args:
        dtype: Whose last digit.
        seed: Of the rounding.
        start: The tensors that are no positions or masks: parameters, features, the cache.
    """

    def __init__(self, dtype: torch.dtype, seed: int, start: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._digit = torch.finfo(dtype).eps
        self._generator = torch.Generator().manual_seed(seed)
        self._computed = WeakTensorKeyDictionary()
        for tensor in start:
            if tensor.dtype.is_floating_point:
                self._computed[tensor] = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs an operator and rounds what comes out, unless it is a view."""
        result = func(*args, **(kwargs or {}))
        given = (x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
        if not any(tensor in self._computed for tensor in given):
            return result
        if not any(returned.alias_info is not None for returned in func._schema.returns):
            result = tree_map_only(torch.Tensor, self._rounded, result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.dtype.is_floating_point:
                self._computed[tensor] = True
        return result

    def _rounded(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.dtype.is_floating_point:
            return tensor
        noise = torch.rand(tensor.shape, generator=self._generator, dtype=torch.float64)
        off = 1 + self._digit * (2 * noise - 1).to(tensor.device)
        return (tensor * off).to(tensor.dtype)


class Rounding:
    """Repeats a generation with random rounding, where that is asked for.

    Args:
        interface: Of the graph.
        dtype: The coarsest of the computation; None where it has no floating-point numbers.
    """

    def __init__(self, interface: Interface, dtype: torch.dtype | None) -> None:
        self._interface, self._dtype = interface, dtype
        self._calls: list[Call] = []
        self._results: dict[str, list[Outputs]] = {}

    def start(self) -> None:
        """Forgets the generation."""
        self._calls, self._results = [], {}

    def add(self, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> None:
        """Takes note of the next call of the generation."""
        self._calls.append((tensors, sizes))
        self._results = {}

    def spread(self, index: int, runner: Runner, reference: Outputs) -> float:
        """How far an output of the last call comes out from what a runner gave without rounding.

        Args:
            index: Of the output.
            runner: The model, best in float64.
            reference: What it gave.
        """
        if self._dtype is None:
            return 0.0
        if runner.name not in self._results:
            self._results[runner.name] = [self._last(runner, reference, k) for k in range(RUNS)]
        found = self._results[runner.name]
        return max(distance(outputs[index], reference[index]) for outputs in found)

    def _last(self, runner: Runner, reference: Outputs, seed: int) -> Outputs:
        kept, outputs = runner.cache, reference
        runner.start()
        assert self._dtype is not None
        model = runner.model
        parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
        for number, (tensors, sizes) in enumerate(self._calls):
            start = [*parameters, *tensors.values(), *(runner.cache or ())]
            with RandomRounding(self._dtype, seed * len(self._calls) + number, start):
                outputs = runner.call(tensors, sizes)
        runner.cache = kept
        tensors, sizes = self._calls[-1]
        return without_dropped(self._interface, outputs, reference, tensors, sizes["query"])
