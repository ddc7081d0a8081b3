"""State inside a tuple that the model holds, and lengths of a user's own cache with slots."""

from __future__ import annotations

import torch
from torch import nn

import cachefree

from .models.case import seeded
from .small import IDS, Small


class SwitchAndTensors(Small):
    """Keeps ``(is_on, {"keys": …, "values": …})``, whose tensors have one axis at first."""

    def __init__(self):
        super().__init__()
        self.held = (True, {"keys": torch.tensor([]), "values": torch.tensor([])})

    def forward(self, ids):
        is_on, held = self.held
        past = None
        if is_on and held["keys"].numel() != 0:
            past = held["keys"], held["values"]
        logits, (held["keys"], held["values"]) = super().forward(ids, past)
        return logits


class Pair:
    __slots__ = ("keys", "values")

    def __init__(self):
        self.keys = self.values = None

    def __len__(self):
        return 0 if self.keys is None else self.keys.shape[1]

    def joined(self, keys, values):
        if self.keys is not None:
            keys = torch.cat((self.keys, keys), dim=1)
            values = torch.cat((self.values, values), dim=1)
        self.keys, self.values = keys, values
        return keys, values


class AsksForItsLength(Small):
    def forward(self, ids, cache=None):
        cache = Pair() if cache is None else cache
        start = len(cache)
        x = self.emb(ids) + self.pos(torch.arange(start, start + ids.shape[1]))
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        k, v = cache.joined(k, v)
        return self.out(self.attend(q, k) @ v), cache


def test_what_a_tuple_on_the_model_holds_is_state() -> None:
    model, other = seeded(SwitchAndTensors)().double(), seeded(SwitchAndTensors)().double()
    rewritten = cachefree.rewrite(model)
    assert rewritten.report.verdict.name == "PROVED_EXACT"
    assert model.held[1]["keys"].numel() == 0
    for ids in (IDS, IDS[:, :1], IDS[:, :3]):
        torch.testing.assert_close(rewritten(ids), other(ids), rtol=1e-9, atol=1e-9)
    rewritten.reset()
    other.held = (True, {"keys": torch.tensor([]), "values": torch.tensor([])})
    torch.testing.assert_close(rewritten(IDS[:1]), other(IDS[:1]), rtol=1e-9, atol=1e-9)


def test_the_length_of_a_cache_with_slots_stays_a_size() -> None:
    model: nn.Module = seeded(AsksForItsLength)().double()
    rewritten = cachefree.rewrite(model)
    assert rewritten.report.verdict.name == "PROVED_EXACT"
    one = other = None
    for ids in (IDS, IDS[:, :1], IDS[:, :3]):
        (actual, one), (expected, other) = rewritten(ids, one), model(ids, other)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
        assert len(one) == len(other)
