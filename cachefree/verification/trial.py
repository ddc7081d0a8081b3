"""One generation through all implementations side by side."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from cachefree.onnx.domain import concrete
from cachefree.sizes import size_symbol
from cachefree.spec import Interface, OutputSpec
from cachefree.verification.padding import without_dropped
from cachefree.verification.plan import Plan, length_of
from cachefree.verification.rounding import Rounding
from cachefree.verification.runners import Runner
from cachefree.verification.tally import Difference, Tally
from cachefree.verification.tolerance import Comparison, compare
from cachefree.verification.values import InputValues, is_mask
from cachefree.vocabulary import vocabulary_sizes

__all__ = ["OriginalFailedError", "Trial", "device_of"]

_QUERY = size_symbol("query")
Outputs = list[torch.Tensor]


class OriginalFailedError(Exception):
    """The original model itself does not run on a generation."""


class Trial:
    """Runs generations.

    Args:
        original: The model.
        exact: The model in float64, or None.
        others: What must agree with it.
        rewritten: What was rewritten, for the ranges of integer inputs.
        device: Where inputs are made.

    Attributes:
        tally: What was run.
        failure: Why the original did not run on a generation, if it did not.
    """

    def __init__(
        self,
        original: Runner,
        exact: Runner | None,
        others: Sequence[Runner],
        rewritten: Any,
        device: torch.device,
    ) -> None:
        self.original = original
        self.exact = exact
        self.others = others
        self.interface: Interface = original.own_call.interface
        self.vocabulary = _vocabulary(rewritten, self.interface)
        self.computed_in = _coarsest(rewritten.graph_module, self.interface)
        self.device = device
        self.tally = Tally()
        self.failure = ""
        self._rounding = Rounding(self.interface, self.computed_in)

    @property
    def has_masks(self) -> bool:
        """Whether some input is a mask."""
        return any(is_mask(spec) for spec in self.interface.inputs if not spec.is_cache)

    def run(self, plan: Plan) -> Difference | None:
        """The first difference in a generation; None where there is none.

        Raises:
            OriginalFailedError: the original does not run.
        """
        values = InputValues(self.interface, self.vocabulary, plan, self.device)
        chunks: dict[str, list[Outputs]] = {}
        try:
            difference = self._run_calls(plan.queries, plan, values, chunks)
        except OriginalFailedError as error:
            self.failure = str(error)
            raise
        if difference is None and len(plan.queries) > 1:
            difference = self._check_chunks(plan, values, chunks)
        if difference is None:
            self.tally.generations += 1
        return difference

    def _run_calls(
        self,
        queries: Sequence[int],
        plan: Plan,
        values: InputValues,
        chunks: dict[str, list[Outputs]],
    ) -> Difference | None:
        runners = [self.original, *([self.exact] if self.exact else []), *self.others]
        for runner in runners:
            runner.start()
        self._rounding.start()
        start = 0
        for number, query in enumerate(queries):
            sizes = {**plan.sizes, **self._past_sizes(), "query": query}
            sizes = self.interface.of_call(sizes, is_first=number == 0)
            tensors = values.of_call(start, sizes)
            difference = self._run_call(
                tensors, sizes, f"call {number + 1} of {len(queries)}", chunks
            )
            if difference is not None:
                return difference
            start += query
        return None

    def _run_call(
        self,
        tensors: dict[str, torch.Tensor],
        sizes: dict[str, int],
        place: str,
        chunks: dict[str, list[Outputs]],
    ) -> Difference | None:
        try:
            if not self.tally.calls:
                self.original.find_form(tensors, sizes)
                self.original.start()
            expected = self.original.call(tensors, sizes)
        except Exception as error:
            raise OriginalFailedError(f"{type(error).__name__}: {error}") from error
        if all(output.isnan().all() for output in expected if output.is_floating_point()):
            raise OriginalFailedError("It gives no numbers, only nan.")
        self.tally.calls += 1
        self._rounding.add(tensors, sizes)
        exact = self._exact_call(tensors, sizes)
        if exact:
            exact = without_dropped(self.interface, exact, expected, tensors, sizes["query"])
        results = {self.original.name: expected, **({"float64": exact} if exact else {})}
        said = ", ".join(
            f"{name} {tuple(tensor.shape)}"
            for name, tensor in (*tensors.items(), *self._cache_shapes(sizes))
        )
        for runner in self.others:
            try:
                results[runner.name] = runner.call(tensors, sizes)
            except Exception as error:  # noqa: BLE001
                why = f"it raises {type(error).__name__}: {error}"
                return Difference(runner.name, place, why, said)
            visible = results[runner.name]
            if runner.name != "eager":
                visible = without_dropped(
                    self.interface, visible, expected, tensors, sizes["query"]
                )
            difference = self._compare(runner, visible, expected, exact, place)
            if difference is not None:
                return Difference(difference.backend, difference.place, difference.why, said)
        for name, outputs in results.items():
            chunks.setdefault(name, []).append(outputs)
        return None

    def _exact_call(
        self, tensors: dict[str, torch.Tensor], sizes: dict[str, int]
    ) -> Outputs | None:
        if self.exact is None:
            return None
        try:
            return self.exact.call(tensors, sizes)
        except Exception:  # noqa: BLE001
            # some code names its dtypes; then there is no exact result to compare with
            self.exact = None
            return None

    def _compare(
        self, runner: Runner, actual: Outputs, expected: Outputs, exact: Outputs | None, place: str
    ) -> Difference | None:
        if runner.result is not None and self.original.result is not None:
            other = self.original.result.difference(runner.result, "the result")
            if other is not None:
                return Difference(runner.name, place, other)
        for index, spec in enumerate(self.interface.outputs):
            comparison = compare(
                actual[index],
                expected[index],
                exact[index] if exact else None,
                skip_nan=runner.name != "eager",
                computed_in=self.computed_in,
                spread=functools.partial(self._spread, index, exact, expected),
            )
            self.tally.add(runner.name, comparison)
            if not comparison.is_same:
                return Difference(
                    runner.name,
                    f"{_said(spec)}, {place}",
                    comparison.why,
                )
        return None

    def _spread(self, index: int, exact: Outputs | None, original: Outputs) -> float:
        """How far rounding alone takes an output of the last call."""
        if exact is None or self.exact is None:
            return self._rounding.spread(index, self.original, original)
        return self._rounding.spread(index, self.exact, exact)

    def _past_sizes(self) -> dict[str, int]:
        """How long the original's cache is."""
        sizes = dict.fromkeys(self.interface.past_symbols, 0)
        for slot, tensor in zip(self.interface.cache, self.original.cache or (), strict=False):
            for axis in slot.growing_axes:
                symbol, rows = length_of(slot.past.shape[axis])
                if symbol in sizes:
                    sizes[symbol] = tensor.shape[axis] - rows
        return sizes

    def _cache_shapes(self, sizes: dict[str, int]) -> list[tuple[str, torch.Tensor]]:
        slot = self.interface.cache[0]
        return [(slot.past.path, torch.empty(concrete(slot.past.shape, sizes), device="meta"))]

    def _check_chunks(
        self, plan: Plan, values: InputValues, chunks: dict[str, list[Outputs]]
    ) -> Difference | None:
        """Whether chunks give what one long call gives.

        Asked of the others only where the original does so.
        """
        sizes = {**plan.sizes, **dict.fromkeys(self.interface.past_symbols, 0), "query": plan.total}
        sizes = self.interface.of_call(sizes, is_first=True)
        if not self.interface.domain.holds(sizes):
            return None
        whole: dict[str, list[Outputs]] = {}
        try:
            difference = self._run_calls((plan.total,), plan, values, whole)
        except OriginalFailedError:
            return None
        if difference is not None:
            return difference
        self.tally.chunked += 1
        exact = whole["float64"][0] if "float64" in whole else None
        if plan.padding != "none":
            exact = None  # a dropped token may be anything, in float64 too
        original = self._joined(chunks["original"], whole["original"][0], exact)
        if not all(same.is_same for _, same in original):
            return None
        self.tally.invariant += 1
        for runner in self.others:
            for path, same in self._joined(chunks[runner.name], whole[runner.name][0], exact):
                if not same.is_same:
                    place = f"{path}, {len(plan.queries)} calls against one long call"
                    return Difference(runner.name, place, same.why)
        return None

    def _joined(
        self, chunks: list[Outputs], whole: Outputs, exact: Outputs | None
    ) -> list[tuple[str, Comparison]]:
        """Each output of the chunks, joined, against that of the long call."""
        found = []
        for index, spec in enumerate(self.interface.outputs):
            counting = [
                axis
                for axis, size in enumerate(spec.shape)
                if _QUERY in getattr(size, "free_symbols", ())
            ]
            if spec.is_cache:
                joined = chunks[-1][index]
            elif len(counting) == 1 and spec.shape[counting[0]] == _QUERY:
                joined = torch.cat([outputs[index] for outputs in chunks], counting[0])
            else:
                continue
            precise = exact[index] if exact else None
            same = compare(
                joined,
                whole[index],
                precise,
                skip_nan=True,
                computed_in=self.computed_in,
                spread=functools.partial(self._spread, index, exact, whole),
            )
            found.append((_said(spec), same))
        return found


def _vocabulary(rewritten: Any, interface: Interface) -> tuple[int | None, ...]:
    """The rows of the smallest table that each input is looked up in, by decoder or encoder."""
    graphs = [(rewritten.interface, rewritten.graph_module)]
    if rewritten.encoder_call is not None:
        graphs.append((rewritten.encoder_interface, rewritten.encoder))
    rows: dict[str, int] = {}
    for own, module in graphs:
        for spec, size in zip(own.inputs, vocabulary_sizes(module), strict=True):
            if size is not None:
                rows[spec.path] = min(size, rows.get(spec.path, size))
    return tuple(rows.get(spec.path) for spec in interface.inputs)


def _coarsest(module: nn.Module, interface: Interface) -> torch.dtype | None:
    """The floating-point dtype with the fewest digits among parameters, inputs and outputs."""
    dtypes = {tensor.dtype for tensor in module.parameters()}
    dtypes |= {spec.dtype for spec in interface.inputs} | {spec.dtype for spec in interface.outputs}
    floating = [dtype for dtype in dtypes if dtype.is_floating_point]
    return max(floating, key=lambda dtype: torch.finfo(dtype).eps, default=None)


def _said(spec: OutputSpec) -> str:
    return f"the output {spec.path}".rstrip()


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
