"""The first and the last rows of a memory, on both sides of the limit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cachefree
from cachefree.rules import RULES
from cachefree.rules.kept_ends import KeptEnds


class Ends(nn.Module):
    first, last = 2, 3
    gap = 0

    def forward(self, x, rows=None):
        rows = x if rows is None else torch.cat([rows, x], 1)
        n = rows.shape[1]
        y = x + rows.mean(1, keepdim=True)
        if n > self.first + self.last + self.gap:
            rows = torch.cat([rows[:, : self.first], rows[:, n - self.last :]], 1)
        return y, rows


class ManyRows(Ends):
    last = 30


class OverlappingEnds(Ends):
    """Rows between would be kept twice: where there are few, more are kept than there are."""

    gap = -2


def rewritten(model):
    return cachefree.rewrite(model.eval(), (torch.zeros(2, 5, 3),), cache="rows")


@pytest.mark.parametrize("build", [Ends, ManyRows])
def test_one_graph_serves_both_sides_of_the_limit(build):
    model = build().eval()
    one = rewritten(model)
    assert one.report.verdict.is_proof
    assert all("every size" in str(region) for region in one.report.domain.regions)
    closings = [rule for rule in RULES if isinstance(rule, KeptEnds)]
    assert len(closings) == 1
    past = theirs = None
    for length in (1, 1, 1, 1, 2, 40, 1, 3):
        x = torch.randn(2, length, 3)
        y, past = one(x) if past is None else one(x, past)
        expected, theirs = model(x) if theirs is None else model(x, theirs)
        torch.testing.assert_close(y, expected)
        assert torch.equal(past, theirs)


def test_ends_that_overlap_are_never_joined_wrongly():
    model = OverlappingEnds().eval()
    try:
        one = rewritten(model)
    except cachefree.CacheFreeError:
        return
    for length in range(1, 9):
        x = torch.randn(1, length, 3)
        try:
            y, rows = one(x)
        except cachefree.CacheFreeError:
            continue
        expected, kept = model(x)
        torch.testing.assert_close(y, expected)
        assert torch.equal(rows, kept)
