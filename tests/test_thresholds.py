"""Tests in place of a proof meet rows of zeros and the numbers that code compares with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import cachefree

from .models.case import seeded


class Decays(nn.Module):
    """Weighs all tokens at once on the first call, and steps a state later."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.decay = nn.Parameter(torch.rand(4) * 0.5 + 0.3)

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def forward(self, x: torch.Tensor, past: Any = None) -> Any:
        if past is not None:
            state = past * self.decay + self.lin(x)[:, 0]
            return state[:, None], state
        place = torch.arange(x.shape[1])
        far = (place[:, None] - place).clamp(min=0)[..., None]
        weights = self.decay**far * (place[:, None] >= place)[..., None]
        y = (weights * self.seen(x)[:, None]).sum(2)
        return y, y[:, -1]


class Plain(Decays):
    def seen(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)


class LeavesOutPadding(Decays):
    def seen(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x) * (x.abs().sum(-1, keepdim=True) != 0)


class Clamps(Decays):
    def seen(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x).clamp(-60, 60)


class ClampsTokens(Plain):
    """What is clamped comes of token ids and weights: no input is large."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 4)

    def forward(self, ids: torch.Tensor, past: Any = None) -> Any:
        x = self.table(ids)
        return super().forward(x.clamp(-60, 60) if past is None else x, past)


class ForgetsLess(Plain):
    """Tokens more than 40 apart weigh as much as 40 apart, which small weights do not show."""

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.full((4,), 2.0))

    def forward(self, x: torch.Tensor, past: Any = None) -> Any:
        decay = self.decay.sigmoid()
        if past is not None:
            state = past * decay + self.lin(x)[:, 0]
            return state[:, None], state
        place = torch.arange(x.shape[1])
        far = (place[:, None] - place).clamp(min=0, max=40)[..., None]
        weights = decay**far * (place[:, None] >= place)[..., None]
        y = (weights * self.seen(x)[:, None]).sum(2)
        return y, y[:, -1]


def rewritten(make: Any) -> Any:
    return cachefree.rewrite(seeded(make)(), (torch.randn(2, 5, 4),), check="test")


def test_what_differs_nowhere_is_tested() -> None:
    assert rewritten(Plain).report.verdict.name == "TESTED"


@pytest.mark.parametrize("make", [LeavesOutPadding, Clamps, ForgetsLess])
def test_what_differs_at_zeros_or_beyond_a_number_is_refused(make: Any) -> None:
    with pytest.raises(cachefree.UnsupportedBranchError):
        rewritten(make)


class ByMark(Decays):
    """Halves what a mark of 12 marks, on the first call alone."""

    def forward(self, x: torch.Tensor, marks: torch.Tensor, past: Any = None) -> Any:
        if past is None:
            x = x * torch.where(marks == 12, 0.5, 1.0)[..., None]
        x = x * marks[..., None]
        y, state = super().forward(self.lin(x) if past is None else x, past)
        return y, state


def test_what_differs_for_one_integer_is_refused() -> None:
    example = (torch.randn(2, 5, 4), torch.ones(2, 5, dtype=torch.long))
    with pytest.raises(cachefree.UnsupportedBranchError):
        cachefree.rewrite(seeded(ByMark)(), example, check="test")


def test_what_differs_for_large_weights_is_refused() -> None:
    example = (torch.zeros(2, 5, dtype=torch.long),)
    with pytest.raises(cachefree.UnsupportedBranchError):
        cachefree.rewrite(seeded(ClampsTokens)(), example, check="test")
