"""Stand-ins compute what the operators compute that they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefree.stand_ins import StandIns


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
