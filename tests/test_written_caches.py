"""Caches that a later call writes to in place, and hands back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import cachefree

from .models.case import seeded


class Context(nn.Module):
    """A causal convolution whose left context is written to where it lies."""

    def __init__(self, width: int = 4, kernel: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, 1, kernel))

    def forward(self, x: torch.Tensor, past: Any = None) -> Any:
        batch, _, width = x.shape
        kept = self.weight.shape[-1] - 1
        if past is None:
            past = (x.new_zeros(batch, width, kept),)
        whole = torch.cat([past[0], x.mT], -1)
        past[0].copy_(whole[..., -kept:])
        return torch.conv1d(whole, self.weight, groups=width).mT, past


class Forgets(Context):
    """Writes to its cache, and hands back another one."""

    def forward(self, x: torch.Tensor, past: Any = None) -> Any:
        y, past = super().forward(x, past)
        return y, (past[0] * 2,)


def test_a_cache_that_is_written_to_is_the_one_that_is_returned() -> None:
    model = seeded(Context)()
    rewritten = cachefree.rewrite(model, (torch.zeros(2, 5, 4),))
    assert rewritten.report.verdict.name.startswith("PROVED")
    assert "the model writes to its cache; the graph returns a new one" in rewritten.report.notes
    x = torch.randn(3, 12, 4, generator=torch.Generator().manual_seed(0))
    for chunks in ((1, 1, 4), (5, 1, 3), (2, 7, 1)):
        theirs = mine = None
        for part in x.split([*chunks, 12 - sum(chunks)], 1):
            expected, theirs = model(part, theirs)
            given = mine
            before = None if given is None else given[0].clone()
            result, mine = rewritten(part, given)
            assert torch.equal(result, expected)
            assert torch.equal(mine[0], theirs[0])
            assert given is None or torch.equal(given[0], before)  # a graph writes to no input


def test_what_is_written_and_not_returned_is_refused() -> None:
    with pytest.raises(cachefree.CaptureError, match=r"writes in place to 'past\[0\]'"):
        cachefree.rewrite(seeded(Forgets)(), (torch.zeros(2, 5, 4),))


class Kept(nn.Module):
    """Adds to a part of what a cast gives, which is the tensor itself where nothing is cast."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, past: Any = None) -> Any:
        k = self.lin(x)
        k = k if past is None else torch.cat([past, k], 1)
        y = k.cumsum(1)[:, -x.shape[1] :].clone()
        part = y.type_as(x)
        part[..., 1:] += x[..., 1:]
        return y, k


def test_a_write_through_a_cast_that_casts_nothing() -> None:
    model = seeded(Kept)()
    rewritten = cachefree.rewrite(model, (torch.zeros(2, 5, 3),))
    x = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    result, past = rewritten(x[:, :4])
    assert torch.equal(result, model(x[:, :4])[0])
    result, _ = rewritten(x[:, 4:], past)
    torch.testing.assert_close(result, model(x[:, 4:], past)[0])
