"""Which argument takes which part of a result, where order and names leave it open."""

from __future__ import annotations

import pytest
import torch

import cachefree

from .assertions import equal_calls, same
from .models import ModelCase
from .models.own_names import OWN_NAMES, STATES_BY_NAME, KeysAndTwoTraces


@pytest.mark.parametrize("case", OWN_NAMES, ids=str)
def test_a_state_is_told_by_what_later_calls_compute_of_it(case: ModelCase) -> None:
    model = case.build()
    rewritten = cachefree.rewrite(model)
    assert rewritten.report.verdict.name == "PROVED_EXACT"
    assert equal_calls(case, model, rewritten) > 0
    assert "taken for the cache: a later call computes something" in rewritten.report.text()


def test_states_are_paired_by_the_names_that_they_are_returned_under() -> None:
    model = STATES_BY_NAME()
    rewritten = cachefree.rewrite(model)
    slots = {slot.past.path: slot.present.path for slot in rewritten.report.interface.cache}
    assert slots == {"h": "[2]", "c": "[1]"}
    ids, more = torch.arange(8).view(2, 4), torch.arange(6).view(2, 3)
    _, c, h = expected = model(ids)
    same(rewritten(ids), expected)
    same(rewritten(more, h, c), model(more, h, c))
    same(rewritten(more, c=c, h=h), model(more, h, c))


def test_what_is_taken_and_computes_nothing_is_no_state() -> None:
    class Ignores(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(11, 6)

        def forward(self, ids, state=None):
            x = self.embed(ids)
            return x, x.mean(1)

    with pytest.raises(cachefree.CacheNotFoundError) as refused:
        cachefree.rewrite(Ignores().eval())
    assert "state: a later call runs, but it computes nothing of what is past" in str(refused.value)


def test_order_alone_does_not_pair_states_of_one_size() -> None:
    with pytest.raises(cachefree.CacheNotFoundError):
        cachefree.rewrite(KeysAndTwoTraces().eval())
