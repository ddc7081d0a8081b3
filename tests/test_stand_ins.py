"""Stand-ins compute what the operators compute that they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import cachefree
from cachefree.stand_ins import StandIns

from .models.case import seeded
from .models.own_ways import Pointers


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(0, 30), st.integers(0, 10**6))
def test_each_row_is_multiplied_by_the_weight_of_its_group(
    groups: int, rows: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, groups, (rows,), generator=generator).sort().values
    ends = torch.stack([(ids <= group).sum() for group in range(groups)]).to(torch.int32)
    x = torch.randn(rows, 4, generator=generator)
    weights = torch.randn(groups, 4, 8, generator=generator)
    with StandIns() as used:
        found = F.grouped_mm(x, weights, offs=ends)
    expected = torch.stack([*(x[row] @ weights[ids[row]] for row in range(rows)), torch.zeros(8)])
    torch.testing.assert_close(found, expected[:-1])
    assert list(used.used) == ["_grouped_mm"]


@pytest.mark.parametrize("bins", [2, 3, 7, 8, 60, 128])
def test_counts_are_those_of_histc(bins: int) -> None:
    ids = torch.randint(-1, bins + 1, (300,), generator=torch.Generator().manual_seed(bins))
    expected = torch.histc(ids.float(), bins=bins, min=0, max=bins - 1)
    with StandIns():
        found = torch.histc(ids.float(), bins=bins, min=0, max=bins - 1)
    assert torch.equal(found, expected)


def test_what_it_does_not_know_is_left_alone() -> None:
    values = torch.tensor([0.5, 1.5, 4.0])
    with StandIns():
        assert torch.equal(torch.histc(values, bins=4), torch.tensor([1.0, 1.0, 0.0, 1.0]))


def test_one_hot_of_as_many_classes_as_an_input_has_rows() -> None:
    model = seeded(Pointers)()
    rewritten = cachefree.rewrite(model, (torch.zeros(2, 16), torch.zeros(2, 5, 16)))
    assert any("one_hot" in note for note in rewritten.report.notes)
    generator = torch.Generator().manual_seed(4)
    for batch, count in ((1, 4), (3, 9)):
        items = torch.randn(batch, count, 16, generator=generator)
        state = own = None
        for _ in range(3):
            x = torch.randn(batch, 16, generator=generator)
            weights, state = rewritten(x, items, state)
            due, own = model(x, items, own)
            torch.testing.assert_close(weights, due)
            assert torch.equal(state[2], own[2])
        assert own[2].sum() == 3 * batch
