"""Counts that Python code hides from a loop over tokens: each is found, and refused."""

from __future__ import annotations

import array
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import cachefree

NOT_ALIKE = "The body of a loop over the tokens changes"
OTHER_LATER = "A loop over the tokens does something else for a later token"


class Counting(nn.Module):
    """Doubles the state from some token on."""

    def __init__(self, is_late: Callable[[Any, list[Any]], bool], rows: int | None = None) -> None:
        super().__init__()
        self.cell = nn.Linear(4, 4)
        self.is_late = is_late
        self.counter = types.SimpleNamespace(count=0)
        self.numbers = array.array("l", [0])
        self.limit = 64
        self.register_buffer("places", None if rows is None else torch.zeros(rows, 4))

    def forward(
        self, x: torch.Tensor, past: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        state = torch.zeros(x.shape[0], 4) if past is None else past
        if self.places is not None:
            x = x + self.places[: x.shape[1]]
        self.counter.count = self.numbers[0] = 0
        given: list[torch.Tensor] = []
        for t in range(x.shape[1]):
            state = torch.tanh(self.cell(x[:, t]) + state)
            if self.is_late(self, given):
                state = state * 2
            given.append(state)
        self.counter.count = self.numbers[0] = 0
        return torch.stack(given, 1), state


def counted_by_an_object(model: Any, given: list[Any]) -> bool:
    model.counter.count += 1
    return bool(model.counter.count > 4000)


def counted_in_an_array(model: Any, given: list[Any]) -> bool:
    model.numbers[0] += 1
    return bool(model.numbers[0] > 4000)


def long_list(model: Any, given: list[Any]) -> bool:
    return bool(given[400:])


def list_as_long_as_an_attribute(model: Any, given: list[Any]) -> bool:
    return bool(given[model.limit :])


def list_walked(model: Any, given: list[Any]) -> bool:
    return sum(1 for _ in given) > 20


@pytest.mark.parametrize(
    ("is_late", "rows", "told"),
    [
        (counted_by_an_object, None, NOT_ALIKE),
        (counted_in_an_array, None, NOT_ALIKE),
        (long_list, None, OTHER_LATER),
        (list_as_long_as_an_attribute, None, OTHER_LATER),
        (list_walked, 32, OTHER_LATER),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_hidden_count_is_refused(
    is_late: Callable[[Any, list[Any]], bool], rows: int | None, told: str
) -> None:
    model = Counting(is_late, rows).eval()
    with pytest.raises(cachefree.CacheFreeError, match=told):
        cachefree.rewrite(model, (torch.zeros(2, 5, 4),), progress=False)


def test_a_loop_in_few_rows_is_taken() -> None:
    model = Counting(lambda model, given: False, 32).eval()
    rewritten = cachefree.rewrite(model, (torch.zeros(2, 5, 4),), progress=False)
    x = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rewritten(x), model(x))
