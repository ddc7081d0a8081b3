"""Random tests of two programs, for where no proof is to be had and the user accepts less."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cachefree.fakes import has_no_values
from cachefree.graph import emit
from cachefree.recipes import Recipe
from cachefree.sizes import size_symbol
from cachefree.terms import Term, topological

__all__ = ["agree_on_samples"]

_ROUNDS = 4
_SEED = 0


def agree_on_samples(
    model: torch.nn.Module,
    one: Sequence[Term],
    other: Sequence[Term],
    inputs: Sequence[Term],
    sizes: Sequence[Mapping[str, int]],
    neutral: Mapping[str, Term],
) -> bool:
    """Whether two programs agree on random inputs and random weights.

    The weights are drawn anew, so that a weight which happens to be 0 or 1 hides nothing.

    Args:
        model: Whose parameters the programs use.
        one: Outputs of the one graph.
        other: Outputs of the model's own path.
        inputs: Inputs of both, those of the one graph.
        sizes: Sizes to try.
        neutral: The values of inputs that only the one graph has, by path.
    """
    if any(
        term.op == "attribute" and has_no_values(term.payload)
        for term in topological([*one, *other])
    ):
        return False
    generator = torch.Generator().manual_seed(_SEED)
    theirs = [term for term in topological(other) if term.op == "input"]
    recipes = {path: Recipe.of(term) for path, term in neutral.items()}
    graphs = (
        emit(model, [(f"x{place}", term) for place, term in enumerate(inputs)], _named(one)),
        emit(model, [(f"x{place}", term) for place, term in enumerate(theirs)], _named(other)),
    )
    for round_sizes in list(sizes) * _ROUNDS:
        values = {term.args[0]: _drawn(term, round_sizes, generator) for term in inputs}
        weights = {
            name: _like(tensor, generator)
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        }
        for path, recipe in recipes.items():
            values[path] = recipe.value(
                functools.partial(_number, round_sizes), weights.__getitem__, torch.device("cpu")
            )
        args = (
            [values[term.args[0]] for term in inputs],
            [values[term.args[0]] for term in theirs],
        )
        try:
            results = [
                torch.func.functional_call(graph, weights, tuple(a), strict=False)
                for graph, a in zip(graphs, args, strict=True)
            ]
        except Exception:  # noqa: BLE001 - what does not run on the samples is not shown to agree
            return False
        for mine, their in zip(*results, strict=True):
            try:
                torch.testing.assert_close(mine, their, equal_nan=True)
            except AssertionError:
                return False
    return True


def _named(outputs: Sequence[Term]) -> list[tuple[str, Term]]:
    return [(f"y{place}", term) for place, term in enumerate(outputs)]


def _drawn(term: Term, sizes: Mapping[str, int], generator: torch.Generator) -> torch.Tensor:
    shape = [_number(sizes, size) for size in term.sizes]
    assert term.dtype is not None
    if term.dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(term.dtype)
    return torch.randint(0, 2, shape, generator=generator).to(term.dtype)


def _number(sizes: Mapping[str, int], size: Any) -> int:
    values = {size_symbol(name): number for name, number in sizes.items()}
    return int(size.subs(values)) if hasattr(size, "subs") else int(size)


def _like(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if not tensor.dtype.is_floating_point:
        return tensor
    return (torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.3).to(
        tensor.dtype
    )
