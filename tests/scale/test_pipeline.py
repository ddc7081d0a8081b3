"""One graph in several processes: equal tokens, weights and slots where they run, clear errors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
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


@pytest.mark.slow
def test_four_processes_named_cuts_and_drawn_tokens(start: Started, whole: Any) -> None:
    four = start(4, ids=IDS)
    assert [found and found["tokens"] for found in four] == [greedy(whole, 6)] * 4
    drawn = start(2, ids=IDS, stages=["layers.1"], options={"do_sample": True, "prefill_chunk": 2})
    assert drawn[0] is not None
    assert drawn[1] is not None
    assert drawn[0]["tokens"] == drawn[1]["tokens"]
    beams = start(2, ids=IDS, options={"num_beams": 2})
    assert beams[0] is not None
    assert beams[1] is not None
    assert beams[0]["tokens"] == beams[1]["tokens"]


@pytest.mark.slow
def test_a_process_that_is_killed_or_hangs_is_an_error_at_once(start: Started) -> None:
    for fault, most in (("dies", 30), ("stops", 40)):
        found = start(2, together=False, ids=IDS, new=20, timeout=8.0, **{fault: [1]})
        assert found[0] is not None
        assert found[1] is None
        assert found[0]["error"] == "StageError"
        assert "stage 1 of 2 (rank 0) heard no more of" in found[0]["text"]
        assert "do:    Start all processes again" in found[0]["text"]
        assert found[0]["seconds"] < most


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda shard: shard.unlink(), "The shard second.safetensors is missing"),
        (lambda shard: os.truncate(shard, shard.stat().st_size - 8), "is cut off"),
    ],
)
def test_a_shard_that_is_missing_or_cut_off_is_an_error_everywhere(
    fault: Any, said: str, start: Started, folder: Path
) -> None:
    fault(folder / "second.safetensors")
    for found in start(2, together=False, ids=IDS):
        assert found is not None
        assert found["error"] == "CacheFreeError"
        assert "Stage 1 of 2 was not made" in found["text"]
        assert said in found["text"]


@pytest.mark.slow
def test_one_process_with_fewer_weights_or_other_ids_is_an_error_everywhere(
    start: Started,
) -> None:
    whole = ["model.safetensors.index.json", "tables.pt"]
    lacking = start(2, together=False, ids=IDS, weights=[whole, ["first.safetensors", "tables.pt"]])
    for found in lacking:
        assert found is not None
        assert "Stage 2 of 2 was not made: The weight layers.1." in found["text"]
    for found in start(2, together=False, ids=IDS, other_ids=[1]):
        assert found is not None
        assert found["error"] == "DomainError"
        assert "In this call tokens has other values in some processes" in found["text"]
