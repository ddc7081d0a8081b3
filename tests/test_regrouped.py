"""Caches that come back in other containers than they are taken in."""

from __future__ import annotations

import pytest
import torch

import cachefree

from .assertions import equal_calls
from .models import ModelCase
from .models.case import seeded
from .models.regrouped import REGROUPED, TwoLayers


@pytest.mark.parametrize("case", REGROUPED, ids=str)
def test_one_graph_takes_the_model_s_own_containers(case: ModelCase) -> None:
    model = case.build().double()
    rewritten = cachefree.rewrite(model)
    assert rewritten.report.verdict.name == "PROVED_EXACT"
    assert equal_calls(case, model, rewritten) > 0


def test_each_tensor_is_fed_by_what_is_joined_to_it() -> None:
    """``(keys, values)`` of two layers would also run as two layers' ``(key, value)``."""
    rewritten = cachefree.rewrite(seeded(TwoLayers)())
    past = [torch.full((1, 3, 6), float(place)) for place in range(4)]
    _, (keys, values) = rewritten(
        torch.zeros(1, 2, dtype=torch.long), past=[(past[0], past[1]), (past[2], past[3])]
    )
    returned = {"[1][0][0]": keys[0], "[1][0][1]": keys[1], "[1][1][0]": values[0]}
    returned["[1][1][1]"] = values[1]
    given = {f"past[{i // 2}][{i % 2}]": tensor for i, tensor in enumerate(past)}
    for slot in rewritten.report.interface.cache:
        assert returned[slot.present.path][:, :3].equal(given[slot.past.path]), slot


def test_a_cache_that_only_fits_crosswise_is_refused() -> None:
    """Keys come back where values are taken: a call fed by it would be another one."""

    class Crosswise(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix = torch.nn.Embedding(11, 6), torch.nn.Linear(6, 12)

        def forward(self, ids, past=None):
            k, v = self.mix(self.embed(ids)).chunk(2, dim=-1)
            if past is not None:
                k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
            return (k * v).cumsum(1)[:, -ids.shape[1] :], (v, k)

    with pytest.raises(cachefree.CacheNotFoundError) as refused:
        cachefree.rewrite(seeded(Crosswise)())
    assert "what it joins comes back at other places" in str(refused.value)
