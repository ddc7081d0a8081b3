"""One graph in several processes: equal tokens, weights and slots where they run, errors at once."""

from __future__ import annotations

from typing import Any

import torch

from tests.scale.conftest import Started

IDS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]


def greedy(model: Any, new: int) -> list[list[int]]:
    """What the model itself continues with, without a cache."""
    ids = torch.tensor(IDS)
    with torch.no_grad():
        for _ in range(new):
            ids = torch.cat([ids, model(ids)[0][:, -1].argmax(-1, keepdim=True)], 1)
    return ids.tolist()


def test_two_processes_give_the_tokens_of_one(start: Started, whole: Any) -> None:
    first, second = start(2, ids=IDS)
    assert first is not None
    assert second is not None
    assert first["tokens"] == second["tokens"] == greedy(whole, 6)
    assert not first["meta"]
    assert {name.split(".")[1] for name in first["weights"] if "layers" in name} == {"0"}
    assert {name.split(".")[1] for name in second["weights"] if "layers" in name} == {"1"}
    assert "tok_embeddings.weight" not in second["weights"]
    assert first["slots"] == ["past_key_values[0][0]", "past_key_values[0][1]"]
    assert second["slots"] == ["past_key_values[1][0]", "past_key_values[1][1]"]
