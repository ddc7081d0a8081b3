"""The weights of one graph in shards: torch's own plans, equal tokens, refusals with reasons."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tests.scale.conftest import ROOT, Started
from tests.scale.test_pipeline import IDS, greedy

PLAN = {
    "layers.*.attention.w[qkv]": "columns",
    "layers.*.attention.wo": "rows",
    "layers.*.w[13]": "columns",
    "layers.*.w2": "rows",
    "output": "columns",
}


@pytest.mark.slow
def test_two_processes_share_each_layer(start: Started, whole: Any) -> None:
    held = sum(parameter.nbytes for parameter in whole.parameters())
    for found in start(2, ids=IDS, plan=PLAN):
        assert found is not None
        assert found.get("text") is None
        assert found["tokens"] == greedy(whole, 6)
        assert found["held"] < 0.6 * held


@pytest.mark.slow
def test_plans_that_cannot_be(start: Started) -> None:
    (found,) = start(1, together=False, ids=IDS, plan={"layers.*.w9": "rows", "norm": "columns"})
    assert found is not None
    assert "The plan's 'layers.*.w9' is no linear layer or embedding" in found["text"]
    assert "The plan's 'norm' is no linear layer or embedding" in found["text"]
    assert "layers.0.attention.wk" in found["text"]


@pytest.mark.slow
def test_a_process_that_is_killed_is_an_error_at_once(start: Started) -> None:
    found = start(2, together=False, ids=IDS, new=20, timeout=8.0, plan=PLAN, dies=[1])[0]
    assert found is not None
    assert found["error"] == "StageError"
    assert found["seconds"] < 30


@pytest.mark.slow
@pytest.mark.parametrize("way", [[], ["--sharded"]])
def test_the_script_that_torchrun_starts(way: list[str]) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = ["-m", "benchmarks.pipelined", "--layers", "2", "--tokens", "4", *way]
    finished = subprocess.run(
        [sys.executable, *launch, *script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert "4 tokens on 2 processes" in finished.stdout
    assert "equal to those of one" in finished.stdout
