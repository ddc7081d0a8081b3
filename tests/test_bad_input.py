"""Caches of another sequence, another model, another thread: told, and nothing is written."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import cachefree
from cachefree import DomainError

from .assertions import same, says_what_to_do
from .models import kept
from .models.case import seeded
from .models.kept import IDS

TOKEN = torch.tensor([[2], [6]])


class WideDecoder(kept.NumberedDecoder):
    """The same layers by the same numbers, with one head more in each."""

    def forward(self, ids, kv_cache):
        x = self.embed(ids, kv_cache[0][0].shape[2] if 0 in kv_cache else 0)
        for i, layer in enumerate(self.layers):
            q, k, v = (torch.cat([part, part[:, :1]], 1) for part in layer.qkv(x))
            if i in kv_cache:
                k = torch.cat((kv_cache[i][0], k), 2)
                v = torch.cat((kv_cache[i][1], v), 2)
            kv_cache[i] = (k, v)
            x = x + layer.out(kept.attend(q, k, v)[..., : kept.WIDTH])
        return self.head(x), kv_cache


@pytest.fixture(scope="module")
def by_number() -> Any:
    return cachefree.rewrite(seeded(kept.NumberedDecoder)(), (IDS, {}))


@pytest.fixture(scope="module")
def keeping() -> Any:
    return cachefree.rewrite(seeded(kept.KeepingDecoder)(), (IDS,))


def told(call: Any, *says: str) -> None:
    with pytest.raises(DomainError) as caught:
        call()
    for text in says:
        assert text in str(caught.value), str(caught.value)
    says_what_to_do(caught.value)


def test_cache_of_another_model_is_told(by_number: Any) -> None:
    cache: dict[Any, Any] = {}
    with torch.no_grad():
        seeded(WideDecoder)()(IDS, cache)
    before = dict(cache)
    told(lambda: by_number(TOKEN, cache), "size 3 on axis 1", "2")
    assert cache.keys() == before.keys()
    assert all(cache[key] is before[key] for key in before)


def test_failing_call_writes_nothing_into_a_dict(by_number: Any) -> None:
    cache: dict[Any, Any] = {}
    by_number(IDS, cache)
    before = dict(cache)
    with pytest.raises(IndexError):
        by_number(torch.full((2, 1), 99), cache)
    assert all(cache[key] is before[key] for key in before)
    empty: dict[Any, Any] = {}
    with pytest.raises(IndexError):
        by_number(torch.full((2, 1), 99), empty)
    assert empty == {}


def test_failing_call_leaves_the_kept_state(keeping: Any) -> None:
    keeping.reset()
    keeping(IDS)
    held = dict(keeping.keeper.held)
    with pytest.raises(IndexError):
        keeping(torch.full((2, 1), 99))
    assert all(keeping.keeper.held[label] is value for label, value in held.items())
    after = keeping(TOKEN)
    keeping.reset()
    keeping(IDS)
    same(keeping(TOKEN), after)


def test_forgotten_reset_is_told_for_another_batch(keeping: Any) -> None:
    keeping.reset()
    keeping(IDS)
    told(lambda: keeping(IDS[:1]), "batch", "reset()")
    told(lambda: keeping(torch.cat([IDS, IDS])), "batch", "reset()")


def test_missing_layer_is_told_at_every_place(by_number: Any) -> None:
    cache: dict[Any, Any] = {}
    by_number(IDS, cache)
    for missing in cache:
        partial = {key: value for key, value in cache.items() if key != missing}
        told(lambda partial=partial: by_number(TOKEN, partial), f"kv_cache[{missing}]", "missing")
        assert missing not in partial
    halved = {**cache, 1: (cache[1][0], None)}
    told(lambda: by_number(TOKEN, halved), "kv_cache")
    assert halved[1][1] is None


def test_many_threads_give_whole_results_or_an_error(keeping: Any) -> None:
    keeping.reset()
    expected = keeping(IDS)
    keeping.reset()
    results: list[Any] = []

    def call() -> None:
        try:
            with torch.no_grad():
                results.append(keeping(IDS))
        except DomainError as error:
            results.append(error)

    threads = [threading.Thread(target=call) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = [result for result in results if isinstance(result, torch.Tensor)]
    assert len(results) == 6
    assert whole
    same(whole[0], expected)
    lengths = keeping.keeper.held["layers.0.cache_k"].shape[2]
    assert lengths == len(whole) * IDS.shape[1]
    assert all("same time" in str(result) for result in results if isinstance(result, DomainError))
