"""Containers that a model fills and returns: who goes on with the one that was given is right."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import cachefree

from .models.case import seeded


class Cache:
    """Keeps what it is given, and gives all of it."""

    def __init__(self) -> None:
        self.keys: Any = None

    def update(self, keys: torch.Tensor) -> torch.Tensor:
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], 1)
        return self.keys


class Result(NamedTuple):
    rows: torch.Tensor
    cache: Any


class WithUpdate(nn.Module):
    empty: Any = Cache

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, cache: Any = None) -> Any:
        cache = self.empty() if cache is None else cache
        keys = self.joined(self.lin(x), cache)
        return self.result(keys.cumsum(1)[:, -x.shape[1] :], cache)

    def joined(self, keys: torch.Tensor, cache: Any) -> torch.Tensor:
        return cache.update(keys)

    def result(self, rows: torch.Tensor, cache: Any) -> Any:
        return Result(rows, cache)


class WithList(WithUpdate):
    empty = list

    def joined(self, keys: torch.Tensor, cache: Any) -> torch.Tensor:
        if cache:
            cache[0] = torch.cat([cache[0], keys], 1)
        else:
            cache.append(keys)
        return cache[0]


class WithDict(WithUpdate):
    empty = dict

    def joined(self, keys: torch.Tensor, cache: Any) -> torch.Tensor:
        cache["k"] = torch.cat([cache["k"], keys], 1) if cache else keys
        return cache["k"]

    def result(self, rows: torch.Tensor, cache: Any) -> Any:
        return {"rows": rows, "cache": cache}


class WithNewList(WithUpdate):
    """Returns a list of its own, and leaves the one that it is given as it is."""

    empty = list

    def forward(self, x: torch.Tensor, cache: Any = None) -> Any:
        keys = self.lin(x)
        keys = torch.cat([cache[0], keys], 1) if cache else keys
        return keys.cumsum(1)[:, -x.shape[1] :], [keys]


@pytest.mark.parametrize("build", [WithUpdate, WithList, WithDict])
def test_the_container_that_was_given_is_filled(build: type[WithUpdate]) -> None:
    model = seeded(build)()
    rewritten = cachefree.rewrite(model, (torch.zeros(2, 5, 3),))
    x = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    mine, theirs = model.empty(), model.empty()
    for part in x.split([2, 1, 3], 1):
        result, expected = rewritten(part, mine), model(part, theirs)
        rows, cache = result.values() if isinstance(result, dict) else result
        assert torch.equal(
            rows, next(iter(expected.values())) if build is WithDict else expected[0]
        )
        assert type(result) is type(expected)
        assert cache is mine
    without = rewritten(x)
    assert (without["cache"] if build is WithDict else without[1]) is not mine


def test_a_container_that_the_model_does_not_fill_is_left_as_it_is() -> None:
    rewritten = cachefree.rewrite(seeded(WithNewList)(), (torch.zeros(2, 5, 3),))
    x, empty = torch.zeros(2, 2, 3), []
    _, cache = rewritten(x, empty)
    assert empty == []
    _, longer = rewritten(x, cache)
    assert cache[0].shape[1] == 2
    assert longer[0].shape[1] == 4
