"""Random tests of two programs, for where no proof is to be had and the user accepts less.

They run in float64, in which a difference over the real numbers is no rounding; and once more as
they are, since a number may be too large, or lost, in the model's own dtype.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from cachefree.doubled import coarsest, doubled, has_wide_form, widened
from cachefree.fakes import has_no_values
from cachefree.graph import emit
from cachefree.recipes import Recipe
from cachefree.sizes import size_symbol
from cachefree.terms import Term, topological
from cachefree.thresholds import enlarged, named_numbers, varied
from cachefree.vocabulary import vocabulary_sizes

__all__ = ["Samples", "agree_on_samples"]

log = logging.getLogger(__name__)
_SEED = 0
_INTEGERS = (11, 2)
"""How many integers there are to draw from, where no table tells: as many as a small one has rows,
else two."""
_MOST_NUMBERS = 8
_MOST_VARIED = 4096
_NO_NUMBERS = "the values are no numbers"
_Values = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Samples:
    """What random tests were made of.

    Attributes:
        sizes: How many sizes were tried.
        kept: Names of buffers that had to keep their own values for the programs to agree.
    """

    sizes: int
    kept: tuple[str, ...] = ()


def agree_on_samples(
    model: torch.nn.Module,
    one: Sequence[Term],
    other: Sequence[Term],
    inputs: Sequence[Term],
    sizes: Sequence[Mapping[str, int]],
    neutral: Mapping[str, Term],
) -> Samples | None:
    """What random inputs and random weights showed; None where the programs differ.

    The weights are drawn anew, so that a weight which happens to be 0 or 1 hides nothing. Buffers
    are too; where the programs differ then, a buffer may be a table that the code relies on, and
    they keep their values, as integers and flags always do.

    Args:
        model: Whose parameters the programs use.
        one: Outputs of the one graph.
        other: Outputs of the model's own path.
        inputs: Inputs of both, those of the one graph.
        sizes: Sizes to try.
        neutral: The values of inputs that only the one graph has, by path.
    """
    below = topological([*one, *other])
    is_missing = any(term.op == "attribute" and has_no_values(term.payload) for term in below)
    if is_missing or [t.dtype for t in one] != [t.dtype for t in other]:
        return None
    if not has_wide_form([*one, *other]):
        return None
    pair = _Pair(model, one, other, inputs, neutral)
    read = {str(term.args[0]) for term in below if term.op == "attribute"}
    buffers = {name: tensor for name, tensor in model.named_buffers() if name in read}
    kept = {name for name, tensor in buffers.items() if tensor.dtype.is_floating_point}
    never_drawn = buffers.keys() - kept
    anew, near = _Draw(frozenset(kept)), _Draw(frozenset(kept), is_near=True)
    told = ""
    for draw in dict.fromkeys((_Draw(frozenset()), anew, near)):
        if draw is near and _NO_NUMBERS not in told:
            break  # a difference that depends on weights is one
        told = pair.differ(sizes, draw) or ""
        if not told and not draw.is_near:
            told = pair.differ(sizes, replace(draw, is_near=True), is_numbers_only=True) or ""
        if not told:
            return Samples(len(sizes), tuple(sorted(draw.kept | never_drawn)))
        log.debug("with %s: %s", draw, told)
    return None


@dataclass(frozen=True)
class _Draw:
    """How weights are drawn: which buffers keep their values, and whether weights stay near."""

    kept: frozenset[str]
    is_near: bool = False

    def weights(self, model: torch.nn.Module, generator: torch.Generator) -> _Values:
        parameters = dict(model.named_parameters())
        found = {}
        for name, tensor in (*parameters.items(), *model.named_buffers()):
            if not tensor.dtype.is_floating_point or name in self.kept:
                found[name] = tensor.detach().cpu()
            elif self.is_near:
                found[name] = _near(tensor.detach(), generator)
            else:
                found[name] = _anew(tensor, generator)
        return found


def _anew(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Numbers for which a layer's results are about as large as what it is given."""
    scale = 0.3 if tensor.dim() < 2 else 1 / math.sqrt(max(1, math.prod(tensor.shape[1:])))
    drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * scale
    return drawn.to(tensor.dtype)


def _near(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Numbers of the same sign and about the same size; small positive ones in place of zeros."""
    drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    own = tensor.double().cpu()
    return torch.where(own == 0, 0.1 * drawn + 0.01, own * (0.5 + drawn)).to(tensor.dtype)


@dataclass
class _Pair:
    """Two programs side by side."""

    model: torch.nn.Module
    one: Sequence[Term]
    other: Sequence[Term]
    inputs: Sequence[Term]
    neutral: Mapping[str, Term]

    @functools.cached_property
    def theirs(self) -> list[Term]:
        """The inputs of the model's own path."""
        return [term for term in topological(self.other) if term.op == "input"]

    @functools.cached_property
    def wide(self) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Both in float64."""
        return self._emitted(*doubled(self.one, self.inputs)), self._emitted(
            *doubled(self.other, self.theirs)
        )

    @functools.cached_property
    def own(self) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Both as they are."""
        return self._emitted(self.one, self.inputs), self._emitted(self.other, self.theirs)

    @functools.cached_property
    def numbers(self) -> tuple[float, ...]:
        """The numbers that they compare values with."""
        return named_numbers([*self.one, *self.other])[:_MOST_NUMBERS]

    @functools.cached_property
    def rows(self) -> dict[str, int]:
        """How many rows the tables have in which the integers of an input are looked up."""
        sizes = zip(self.theirs, vocabulary_sizes(self.own[1]), strict=True)
        return {str(term.args[0]): size for term, size in sizes if size is not None}

    def _emitted(self, outputs: Sequence[Term], inputs: Sequence[Term]) -> fx.GraphModule:
        return emit(
            self.model,
            [(f"x{place}", term) for place, term in enumerate(inputs)],
            [(f"y{place}", term) for place, term in enumerate(outputs)],
        )

    @functools.cached_property
    def apart(self) -> tuple[float, ...]:
        """The numbers that only one of them compares values with."""
        mine, theirs = named_numbers(self.one), named_numbers(self.other)
        return tuple(n for n in (*mine, *theirs) if (n in mine) != (n in theirs))[:_MOST_NUMBERS]

    def differ(
        self, sizes: Sequence[Mapping[str, int]], draw: _Draw, *, is_numbers_only: bool = False
    ) -> str | None:
        """How they differ at the sizes, in words; None where nowhere.

        With ``is_numbers_only``, sizes at which there are no numbers to compare show nothing.
        """
        generator = torch.Generator().manual_seed(_SEED)
        ran = 0
        for point in sizes:
            weights = draw.weights(self.model, generator)
            state = generator.get_state()
            for most in _INTEGERS:
                generator.set_state(state)
                values = self._values(point, weights, generator, most)
                try:
                    expected = self._run(self.wide[1], self.theirs, values, weights, is_wide=True)
                except Exception as error:  # noqa: BLE001 - the model may have fewer rows, or places
                    log.debug("the path does not run at %s: %s", point, error)
                    continue
                told = self._differ_at(values, weights, expected, draw)
                told = told or self._differ_varied(values, weights, point, draw)
                if told == _NO_NUMBERS and is_numbers_only:
                    break
                if told is not None:
                    return f"at {dict(point)}: {told}"
                ran += 1
                break
        return None if is_numbers_only or (ran and ran * 2 >= len(sizes)) else "too few sizes ran"

    def _differ_varied(
        self, values: _Values, weights: _Values, point: Mapping[str, int], draw: _Draw
    ) -> str | None:
        """How they differ where some inputs are zeros, or as large as numbers that the code names.

        Where only one of them compares with a number, weights are about as large, too. What does
        not run there, or gives no numbers, shows nothing.
        """
        if sum(value.numel() for value in values.values()) > _MOST_VARIED:
            return None
        generator = torch.Generator().manual_seed(_SEED)
        tries: list[tuple[_Values, _Values]] = [
            *((other, weights) for other in varied(values, self.numbers, self.rows, generator)),
            *((values, enlarged(weights, n, draw.kept, generator)) for n in self.apart),
        ]
        for other, theirs in tries:
            given = {**other, **self._neutral(point, theirs)}
            try:
                expected = self._run(self.wide[1], self.theirs, given, theirs, is_wide=True)
            except Exception as error:  # noqa: BLE001 - a table may have fewer rows
                log.debug("the path does not run: %s", error)
                continue
            told = self._differ_at(given, theirs, expected, draw, is_wide_only=True)
            if told not in (None, _NO_NUMBERS):
                return told
        return None

    def _differ_at(
        self,
        values: _Values,
        weights: _Values,
        expected: Sequence[torch.Tensor],
        draw: _Draw,
        *,
        is_wide_only: bool = False,
    ) -> str | None:
        if not all(_is_telling(tensor) for tensor in expected):
            return _NO_NUMBERS
        try:
            found = self._run(self.wide[0], self.inputs, values, weights, is_wide=True)
            narrow = coarsest([*self.one, *self.other])
            pairs = [
                self._run(graph, inputs, values, weights, is_wide=False)
                for graph, inputs in zip(self.own, (self.inputs, self.theirs), strict=True)
                if not is_wide_only  # such values may be too large for the model's own dtype
            ]
        except Exception as error:  # noqa: BLE001 - what does not run is not shown to agree
            return f"{type(error).__name__}: {error}"
        rtol, atol = _limits(weights, draw)
        for mine, their in zip(found, expected, strict=True):
            try:
                torch.testing.assert_close(mine, their, rtol=rtol, atol=atol)
            except AssertionError as error:
                return str(error)
        for results in pairs:
            if not all(map(_is_believable, results, expected, itertools.repeat(narrow))):
                return f"in {narrow} less than half of the digits are left"
        return None

    def _values(
        self, point: Mapping[str, int], weights: _Values, generator: torch.Generator, most: int
    ) -> dict[str, torch.Tensor]:
        terms = {str(term.args[0]): term for term in (*self.theirs, *self.inputs)}
        rows = self.rows if most == max(_INTEGERS) else {}
        values = {
            path: _drawn(term, point, generator, rows.get(path, most))
            for path, term in terms.items()
        }
        return {**values, **self._neutral(point, weights)}

    def _neutral(self, point: Mapping[str, int], weights: _Values) -> dict[str, torch.Tensor]:
        number, cpu = functools.partial(_number, point), torch.device("cpu")
        return {
            path: Recipe.of(term).value(number, weights.__getitem__, cpu)
            for path, term in self.neutral.items()
        }

    def _run(
        self,
        graph: fx.GraphModule,
        inputs: Sequence[Term],
        values: _Values,
        weights: _Values,
        *,
        is_wide: bool,
    ) -> Sequence[torch.Tensor]:
        given = [values[str(term.args[0])] for term in inputs]
        if is_wide:
            given = [widened(tensor) for tensor in given]
            weights = {name: widened(tensor) for name, tensor in weights.items()}
        with torch.no_grad():
            results: Sequence[torch.Tensor] = torch.func.functional_call(
                graph, dict(weights), tuple(given), strict=False
            )
        return results


def _limits(weights: _Values, draw: _Draw) -> tuple[float | None, float | None]:
    """The tolerance: float64's own, but where values that were rounded to less are relied on."""
    dtypes = {weights[name].dtype for name in draw.kept} - {torch.float64}
    if not dtypes:
        return None, None
    coarse = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    rtol, atol = torch.testing._comparison.default_tolerances(coarse)
    return rtol, atol


def _is_telling(tensor: torch.Tensor) -> bool:
    """Whether a result has no NaN, and numbers in most places: else nothing is compared."""
    if not tensor.dtype.is_floating_point or not tensor.numel():
        return True
    return not tensor.isnan().any() and float(tensor.isfinite().double().mean()) > 1 / 2


def _is_believable(
    result: torch.Tensor, exact: torch.Tensor, computed_in: torch.dtype | None
) -> bool:
    """Whether half the digits of the dtype that a result was computed in agree with the exact."""
    if not exact.dtype.is_floating_point:
        return torch.equal(result, exact)
    finite, wide = exact.isfinite(), result.double()
    if not torch.equal(wide[~finite], exact[~finite]):
        return False
    if computed_in is None or not finite.any():
        return True
    gap = (wide[finite] - exact[finite]).abs().max()
    scale = exact[finite].abs().max()
    return bool(gap <= math.sqrt(torch.finfo(computed_in).eps) * scale)


def _drawn(
    term: Term, sizes: Mapping[str, int], generator: torch.Generator, most: int
) -> torch.Tensor:
    shape = [_number(sizes, size) for size in term.sizes]
    assert term.dtype is not None
    if term.dtype.is_floating_point or term.dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(term.dtype)
    most = 2 if term.dtype == torch.bool else most
    return torch.randint(0, most, shape, generator=generator).to(term.dtype)


def _number(sizes: Mapping[str, int], size: Any) -> int:
    values = {size_symbol(name): number for name, number in sizes.items()}
    return int(size.subs(values)) if hasattr(size, "subs") else int(size)
