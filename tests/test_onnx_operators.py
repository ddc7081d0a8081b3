"""Attention and rotations that torch.onnx writes for some shapes only, equal on ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cachefree

from .small import small

pytest.importorskip("onnxruntime")


class WithoutHeads(nn.Module):
    """Attention over (batch, tokens, width) with a scale that is not the usual one."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 8)
        self.kv = nn.Linear(8, 16)

    def forward(self, ids: Any, past: Any = None) -> Any:
        x = self.emb(ids)
        k, v = self.kv(x).chunk(2, -1)
        if past is not None:
            k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
        return F.scaled_dot_product_attention(x, k, v, scale=1.7), (k, v)


class OneHeadForAll(nn.Module):
    """Four heads of queries, one of keys and values, which torch broadcasts."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 16)
        self.kv = nn.Linear(16, 8)

    def forward(self, ids: Any, past: Any = None) -> Any:
        x = self.emb(ids)
        q = x.unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = self.kv(x).unsqueeze(1).chunk(2, -1)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return F.scaled_dot_product_attention(q, k, v, scale=0.9), (k, v)


class InGroups(nn.Module):
    """``enable_gqa`` stands in the code, whatever the number of heads that it is built with."""

    heads = 4

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 16)
        self.kv = nn.Linear(16, 8 * self.heads)

    def forward(self, ids: Any, past: Any = None) -> Any:
        x = self.emb(ids)
        q = x.unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2 * self.heads, 4)).transpose(1, 2).chunk(2, 1)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True), (k, v)


class OfTwo(InGroups):
    """Two heads of queries for each of keys."""

    heads = 2


class OfAll(InGroups):
    """One head of keys."""

    heads = 1


def turned(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


class AnglesForEveryText(nn.Module):
    """Rotary positions counted from the cache: one row of angles, whatever the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 16)
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)
        self.register_buffer("frequency", 1 / 10 ** (torch.arange(4) / 4))

    def forward(self, ids: Any, past: Any = None) -> Any:
        x = self.emb(ids)
        start = 0 if past is None else past[0].shape[2]
        positions = torch.arange(start, start + ids.shape[1])[None, :, None].float()
        angles = positions * self.frequency
        angles = torch.cat((angles, angles), -1)
        cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (self.q(x), self.k(x), x))
        q, k = q * cos + turned(q) * sin, k * cos + turned(k) * sin
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return F.scaled_dot_product_attention(q, k, v), (k, v)


class Rolled(nn.Module):
    """A window whose rows move up by as many as are new; by a size, and beyond its length."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 8)

    def forward(self, ids: Any, past: Any = None) -> Any:
        x = self.emb(ids)
        window = x.new_zeros(x.shape[0], 12, 8) if past is None else past
        window = torch.roll(window, -ids.shape[1], dims=1)
        window[:, -ids.shape[1] :] = x
        return torch.roll(window, 5 * ids.shape[1], 1).cumsum(1), window


class SmallTriangle(nn.Module):
    """A causal mask that is a triangle of bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 8)

    def forward(self, ids: Any, past: Any = None) -> Any:
        x = self.emb(ids)
        seen = x if past is None else torch.cat([past, x], 1)
        new, all_ = x.shape[1], seen.shape[1]
        hidden = torch.ones(new, all_, dtype=torch.uint8).triu(1 + all_ - new).bool()
        return (x @ seen.mT).masked_fill(hidden, -torch.inf).softmax(-1) @ seen, seen


KINDS = [WithoutHeads, OneHeadForAll, AnglesForEveryText, InGroups, OfTwo, OfAll]


@pytest.mark.parametrize("build", [*KINDS, Rolled, SmallTriangle])
def test_equal_on_onnxruntime(build: type[nn.Module], tmp_path: Path) -> None:
    model = small(build)
    ids = torch.randint(20, (3, 6), generator=torch.Generator().manual_seed(3))
    rewritten = cachefree.rewrite(model, (ids[:2, :4],))
    session = cachefree.load_onnx(
        cachefree.to_onnx(rewritten, tmp_path / "model.onnx"), like=rewritten
    )
    mine = theirs = None
    with torch.no_grad():
        for start, end in ((0, 4), (4, 5), (5, 6)):
            found, mine = session(ids[:, start:end], mine)
            expected, theirs = model(ids[:, start:end], theirs)
            torch.testing.assert_close(found, expected)


class Padded(nn.Module):
    """A mask of numbers in which a padded row may hide every key."""

    def __init__(self, hidden: float) -> None:
        super().__init__()
        self.emb, self.qkv = nn.Embedding(20, 16), nn.Linear(16, 48)
        self.hidden = hidden

    def forward(self, ids: Any, attention_mask: Any, past: Any = None) -> Any:
        q, k, v = (
            t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(self.emb(ids)).chunk(3, -1)
        )
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        new, total = q.shape[2], k.shape[2]
        seen = torch.ones(new, total, dtype=torch.bool).tril(total - new)[None, None]
        seen = seen & attention_mask[:, None, None, :].bool()
        mask = torch.where(seen, 0.0, self.hidden)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask), (k, v)


@pytest.mark.parametrize("hidden", [torch.finfo(torch.float32).min, -torch.inf, -1e9])
def test_rows_that_see_nothing_are_those_of_torch(hidden: float, tmp_path: Path) -> None:
    model = small(lambda: Padded(hidden))
    ids = torch.randint(20, (3, 6), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[1, :2] = 0
    rewritten = cachefree.rewrite(model, (ids[:2, :4], mask[:2, :4]))
    path = cachefree.to_onnx(rewritten, tmp_path / "model.onnx")
    session = cachefree.load_onnx(path, like=rewritten)
    mine = theirs = None
    with torch.no_grad():
        for start, end in ((0, 4), (4, 5), (5, 6)):
            found, mine = session(ids[:, start:end], mask[:, :end], mine)
            expected, theirs = model(ids[:, start:end], mask[:, :end], theirs)
            torch.testing.assert_close(found, expected)


class ScalesThePast(nn.Module):
    """Keys that are past, scaled by what is reduced of each: the first call has none."""

    def __init__(self, reduce: Any) -> None:
        super().__init__()
        self.emb, self.reduce = nn.Embedding(20, 8), reduce

    def forward(self, ids: Any, past: Any = None) -> Any:
        k = self.emb(ids)
        scaled = k * self.reduce(k)[..., None]
        if past is not None:
            scaled = torch.cat([2 * past * self.reduce(past)[..., None], scaled], 1)
            k = torch.cat([past, k], 1)
        return scaled.mean(1), k


REDUCTIONS = {
    "sum": lambda x: x.pow(2).sum(-1),
    "mean": lambda x: x.mean(-1),
    "amax": lambda x: x.amax(-1),
    "argmax": lambda x: x.argmax(-1).float(),
    "norm": lambda x: x.norm(dim=-1),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_reduction_of_nothing_has_its_own_shape(name: str, tmp_path: Path) -> None:
    model = small(lambda: ScalesThePast(REDUCTIONS[name]))
    ids = torch.randint(20, (3, 7))
    rewritten = cachefree.rewrite(model, (ids[:2, :5],))
    cachefree.to_onnx(rewritten, tmp_path / "m.onnx")
    decoder = cachefree.load_onnx(tmp_path / "m.onnx", like=rewritten)
    found = expected = None
    for part in ids.split((1, 5, 1), 1):
        found = decoder(part, None if found is None else found[1])
        expected = model(part, None if expected is None else expected[1])
        torch.testing.assert_close(found, expected)
