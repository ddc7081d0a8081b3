"""A memory of the last rows, to which the past's are joined only where there are too few new."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cachefree
from cachefree.rules.last_rows_of_both import LastRowsOfBoth
from tests.assertions import equal_calls, says_what_to_do
from tests.models.case import ModelCase, calls, frames, seeded

LEFT = 2


class CausalConv(nn.Conv1d):
    """Pads on the left what its memory lacks."""

    def forward(self, x, memory=None):
        missing = LEFT
        if memory is not None:
            x = torch.cat([memory, x], dim=2)
            missing -= memory.shape[2]
        return super().forward(F.pad(x, (missing, 0)))


class Vocoder(nn.Module):
    """Two causal convolutions, whose memories are a list that is filled by index."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(CausalConv(4, 4, LEFT + 1) for _ in range(2))

    def forward(self, frames, memories=None):
        memories = [None] * len(self.convs) if memories is None else list(memories)
        x = frames.transpose(1, 2)
        for place, conv in enumerate(self.convs):
            kept = self.kept(x, memories[place])
            x = torch.tanh(conv(x, memories[place]))
            memories[place] = kept
        return x.transpose(1, 2), memories

    def kept(self, x, memory):
        kept = x[:, :, -LEFT:].clone()
        if kept.shape[2] < LEFT and memory is not None:
            kept = torch.cat([memory[:, :, -1:], kept], dim=2)
        return kept


class FirstOfThePast(Vocoder):
    """Joins the past's first row, which is the last one only where the past has one row."""

    def kept(self, x, memory):
        kept = x[:, :, -LEFT:].clone()
        if kept.shape[2] < LEFT and memory is not None:
            kept = torch.cat([memory[:, :, :1], kept], dim=2)
        return kept


class Halved(Vocoder):
    def kept(self, x, memory):
        kept = x[:, :, -LEFT:].clone()
        if kept.shape[2] < LEFT and memory is not None:
            kept = torch.cat([memory[:, :, -1:] * 0.5, kept], dim=2)
        return kept


def _case(build: type) -> ModelCase:
    drawn = calls(frames(4, dtype=torch.float64), cache="memories")
    return ModelCase(build.__name__, seeded(build), **drawn, patterns=("P8",))


EXAMPLE = (torch.zeros(2, 3, 4, dtype=torch.float64),)


def test_all_calls_are_one_graph() -> None:
    case = _case(Vocoder)
    model = case.build().double()
    rewritten = cachefree.rewrite(model, EXAMPLE)
    assert rewritten.report.verdict.name == "PROVED_EXACT"
    assert LastRowsOfBoth.name in {branch.rule for branch in rewritten.report.branches}
    assert equal_calls(case, model, rewritten) >= 20
    _, memories = rewritten(torch.zeros(2, 1, 4, dtype=torch.float64))
    assert [memory.shape[2] for memory in memories] == [1, 1]
    _, memories = rewritten(torch.zeros(2, 1, 4, dtype=torch.float64), memories)
    assert [memory.shape[2] for memory in memories] == [2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("build", [FirstOfThePast, Halved])
def test_other_rows_are_refused_or_no_part_of_the_domain(build: type) -> None:
    case = _case(build)
    model = case.build().double()
    try:
        rewritten = cachefree.rewrite(model, EXAMPLE)
    except cachefree.CacheFreeError as error:
        says_what_to_do(error)
        return
    equal_calls(case, model, rewritten, may_raise=cachefree.DomainError)
