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


@pytest.mark.parametrize("build", [WithoutHeads, OneHeadForAll, AnglesForEveryText])
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
