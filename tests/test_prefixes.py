"""Caches that hold rows before the first token: the neutral cache has these rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import cachefree

from .models.case import seeded
from .models.prefixes import ROWS, LearnedKeysAndValues

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


@pytest.fixture(scope="module")
def model():
    return seeded(LearnedKeysAndValues)()


@pytest.fixture(scope="module")
def rewritten(model):
    return cachefree.rewrite(model)


def test_the_neutral_cache_is_the_prefix(model, rewritten) -> None:
    empty = rewritten.empty_cache(batch_size=2)
    assert empty[0][0].shape[2] == ROWS
    torch.testing.assert_close(empty[1][0], model.prefix[1, 0].expand(2, -1, -1, -1))
    torch.testing.assert_close(rewritten(IDS, empty)[0], model(IDS)[0], rtol=0, atol=0)
    assert "computed from prefix" in rewritten.interface.cache[0].neutral


def test_a_changed_prefix_is_seen() -> None:
    model = seeded(LearnedKeysAndValues)()
    rewritten = cachefree.rewrite(model)
    with torch.no_grad():
        model.prefix.mul_(-2.0)
    torch.testing.assert_close(rewritten(IDS)[0], model(IDS)[0], rtol=0, atol=0)


def test_a_cache_without_the_prefix_is_an_error(rewritten) -> None:
    cache = rewritten.empty_cache(batch_size=2)
    short = [tuple(rows[:, :, 1:] for rows in pair) for pair in cache]
    with pytest.raises(cachefree.DomainError, match="has size 3 on axis 2"):
        rewritten(IDS, short)


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["concat", "attention", "shared"])
def test_on_onnx_runtime(model, rewritten, kv, tmp_path: Path) -> None:
    cachefree.to_onnx(rewritten, tmp_path / "decoder.onnx", kv=kv)
    decoder = cachefree.load_onnx(tmp_path / "decoder.onnx", like=rewritten)
    logits, cache = decoder(IDS[:, :2])
    own, own_cache = model(IDS[:, :2])
    torch.testing.assert_close(logits, own)
    torch.testing.assert_close(decoder(IDS[:, 2:], cache)[0], model(IDS[:, 2:], own_cache)[0])
    tokens = IDS[:1]
    for _ in range(3):
        tokens = torch.cat([tokens, model(tokens)[0][:, -1:].argmax(-1)], 1)
    assert torch.equal(torch.as_tensor(decoder.generate(IDS[:1], max_new_tokens=3)), tokens)
