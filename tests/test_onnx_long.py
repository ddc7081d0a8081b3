"""Ten thousand steps: nothing is kept that a step made."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from cachefree.onnx import OnnxDecoder, load_onnx, to_onnx

from .test_onnx import V, build, unproved

STEPS, TURNS, SETTLED = 500, 20, 5
ROOM = 3_000_000  # bytes; the caches that the steps make are 40 times as much


def resident() -> int:
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def generate(decoder: OnnxDecoder, steps: int) -> torch.Tensor:
    ids, cache = torch.tensor([[1]]), {}
    for past in range(steps):
        outputs: Any = decoder(
            input_ids=ids,
            attention_mask=torch.ones(1, past + 1, dtype=torch.int64),
            position_ids=torch.tensor([[past % 32]]),
            **cache,
        )
        cache = decoder.next_cache(outputs)
        ids = outputs["logits"][:, -1:].argmax(-1)
    return ids


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("kind", ["concat", "shared"])
def test_memory_does_not_grow(kind: Any, tmp_path: Path) -> None:
    decoder = load_onnx(to_onnx(unproved(build()), tmp_path / "m.onnx", kv=kind))
    last = {int(generate(decoder, STEPS)) for _ in range(SETTLED)}
    before = resident()
    last |= {int(generate(decoder, STEPS)) for _ in range(SETTLED, TURNS)}
    assert resident() - before < ROOM
    assert len(last) == 1, "every turn gives the same"
    assert last < set(range(V))
