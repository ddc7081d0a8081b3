"""One generation through all implementations side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cachefree.onnx.domain import concrete
from cachefree.sizes import size_symbol
from cachefree.spec import Interface
from cachefree.verification.plan import Plan
from cachefree.verification.runners import Runner
from cachefree.verification.tolerance import Comparison, compare
from cachefree.verification.values import InputValues, is_mask, kept_positions
from cachefree.vocabulary import vocabulary_sizes

__all__ = ["Difference", "OriginalFailedError", "Tally", "Trial"]

_QUERY = size_symbol("query")
Outputs = list[torch.Tensor]


class OriginalFailedError(Exception):
    """The original model itself does not run on a generation."""


@dataclass(frozen=True)
class Difference:
    """Where an implementation is not the original.

    Attributes:
        backend: Which.
        place: In words: the output and the call.
        why: What differs.
        shapes: The shapes of the call's inputs.
    """

    backend: str
    place: str
    why: str
    shapes: str = ""


@dataclass
class Tally:
    """What was run so far.

    Attributes:
        generations: Plans that ran.
        calls: Calls of the original.
        invariant: Generations whose chunks gave what one long call gives, in the original.
        chunked: Generations for which this was asked.
        differences: Backend → the largest absolute difference.
        exact: Backend → outputs with the original's bits.
        outputs: Backend → outputs compared.
    """

    generations: int = 0
    calls: int = 0
    invariant: int = 0
    chunked: int = 0
    differences: dict[str, float] = field(default_factory=dict)
    exact: Counter[str] = field(default_factory=Counter)
    outputs: Counter[str] = field(default_factory=Counter)

    def add(self, backend: str, comparison: Comparison) -> None:
        """Counts one output."""
        self.outputs[backend] += 1
        self.exact[backend] += comparison.has_same_bits
        self.differences[backend] = max(self.differences.get(backend, 0.0), comparison.difference)


class Trial:
    """Runs generations.

    Args:
        original: The model.
        exact: The model in float64, or None.
        others: What must agree with it.
        module: The one graph, for the ranges of integer inputs.
        device: Where inputs are made.
    """

    def __init__(
        self,
        original: Runner,
        exact: Runner | None,
        others: Sequence[Runner],
        module: torch.fx.GraphModule,
        device: torch.device,
    ) -> None:
        self.original = original
        self.exact = exact
        self.others = others
        self.interface: Interface = original.own_call.interface
        self.vocabulary = vocabulary_sizes(module)
        self.device = device
        self.tally = Tally()

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
        difference = self._run_calls(plan.queries, plan, values, chunks)
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
        start = 0
        for number, query in enumerate(queries):
            sizes = {**plan.sizes, **self._past_sizes(), "query": query}
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
            expected = self.original.call(tensors, sizes)
        except Exception as error:
            raise OriginalFailedError(f"{type(error).__name__}: {error}") from error
        if all(output.isnan().all() for output in expected if output.is_floating_point()):
            raise OriginalFailedError("It gives no numbers, only nan.")
        self.tally.calls += 1
        exact = self._exact_call(tensors, sizes)
        results = {self.original.name: expected, **({"float64": exact} if exact else {})}
        said = ", ".join(
            f"{name} {tuple(tensor.shape)}"
            for name, tensor in (*tensors.items(), *self._cache_shapes(sizes))
        )
        for runner in self.others:
            try:
                results[runner.name] = runner.call(tensors, sizes)
            except Exception as error:
                why = f"it raises {type(error).__name__}: {error}"
                return Difference(runner.name, place, why, said)
            visible = results[runner.name]
            if runner.name != "eager":
                visible = self._without_dropped(visible, expected, tensors, sizes["query"])
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
        except (
            Exception
        ):  # some code names its dtypes; then there is no exact result to compare with
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
            )
            self.tally.add(runner.name, comparison)
            if not comparison.is_same:
                return Difference(
                    runner.name,
                    f"the output{spec.path and ' ' + spec.path}, {place}",
                    comparison.why,
                )
        return None

    def _without_dropped(
        self, actual: Outputs, expected: Outputs, tensors: dict[str, torch.Tensor], new: int
    ) -> Outputs:
        """The outputs without positions that a padding mask drops, for which runtimes differ.

        A dropped token that sees nothing attends to nothing: torch gives zeros there, others a mean or ``nan``. Nobody reads it.
        """
        for spec in self.interface.inputs:
            kept = None if spec.is_cache else kept_positions(spec, tensors[spec.name])
            if kept is None or bool(kept.all()):
                continue
            for index, output in enumerate(self.interface.outputs):
                aligned = _aligned(kept, spec.shape, output.shape, new)
                if aligned is not None and actual[index].shape == expected[index].shape:
                    actual = [
                        *actual[:index],
                        torch.where(aligned, actual[index], expected[index]),
                        *actual[index + 1 :],
                    ]
        return actual

    def _past_sizes(self) -> dict[str, int]:
        """How long the original's cache is."""
        sizes = dict.fromkeys(self.interface.past_symbols, 0)
        for slot, tensor in zip(self.interface.cache, self.original.cache or (), strict=False):
            for axis in slot.growing_axes:
                if str(slot.past.shape[axis]) in sizes:
                    sizes[str(slot.past.shape[axis])] = tensor.shape[axis]
        return sizes

    def _cache_shapes(self, sizes: dict[str, int]) -> list[tuple[str, torch.Tensor]]:
        slot = self.interface.cache[0]
        return [(slot.past.path, torch.empty(concrete(slot.past.shape, sizes), device="meta"))]

    def _check_chunks(
        self, plan: Plan, values: InputValues, chunks: dict[str, list[Outputs]]
    ) -> Difference | None:
        """Whether chunks give what one long call gives; asked of the others only where the original does so."""
        sizes = {**plan.sizes, **dict.fromkeys(self.interface.past_symbols, 0), "query": plan.total}
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
        original = whole[self.original.name][0]
        if any(
            not same.is_same
            for _, same in self._joined(chunks[self.original.name], original, original, exact)
        ):
            return None
        self.tally.invariant += 1
        for runner in self.others:
            for path, same in self._joined(
                chunks[runner.name], whole[runner.name][0], original, exact
            ):
                if not same.is_same:
                    place = f"the output{path and ' ' + path}, {len(plan.queries)} calls against one long call"
                    return Difference(runner.name, place, same.why)
        return None

    def _joined(
        self, chunks: list[Outputs], whole: Outputs, original: Outputs, exact: Outputs | None
    ) -> list[tuple[str, Comparison]]:
        """Each output of the chunks, joined, against that of the long call."""
        found = []
        for index, spec in enumerate(self.interface.outputs):
            axes = [axis for axis, size in enumerate(spec.shape) if size == _QUERY]
            others = [
                size
                for size in spec.shape
                if size != _QUERY and _QUERY in getattr(size, "free_symbols", ())
            ]
            if spec.is_cache:
                joined = chunks[-1][index]
            elif len(axes) == 1 and not others:
                joined = torch.cat([outputs[index] for outputs in chunks], axes[0])
            else:
                continue
            if exact is None:
                reference = whole[index]
                found.append((spec.path, compare(joined, reference, None, skip_nan=True)))
            else:
                found.append(
                    (spec.path, compare(joined, original[index], exact[index], skip_nan=True))
                )
        return found


def _aligned(
    kept: torch.Tensor, mask_shape: tuple[Any, ...], shape: tuple[Any, ...], new: int
) -> torch.Tensor | None:
    """A (batch, past + query) mask along the same axes of another tensor; None where that has no such axes."""
    batch, length = mask_shape
    lengths = [axis for axis, size in enumerate(shape) if size in (length, _QUERY)]
    if batch not in shape or len(lengths) != 1:
        return None
    rows, axis = shape.index(batch), lengths[0]
    if shape[axis] == _QUERY:
        kept = kept[:, kept.shape[1] - new :]
    view = [1] * len(shape)
    view[rows], view[axis] = kept.shape[0], kept.shape[1]
    return (kept if rows < axis else kept.T).reshape(view)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
