"""A decoder as small as one can be, for tests of what surrounds the proof."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import cachefree

from .models.case import seeded

CALLS: list[int] = []
"""What a model of another file may count in."""
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9]])


class Small(nn.Module):
    """One head, one layer: (ids, past) → (logits, (keys, values))."""

    def __init__(self, vocab: int = 12, dim: int = 6) -> None:
        super().__init__()
        self.emb, self.pos = nn.Embedding(vocab, dim), nn.Embedding(64, dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, vocab)

    def forward(self, ids: torch.Tensor, past: Any = None) -> Any:
        start = 0 if past is None else past[0].shape[1]
        x = self.emb(ids) + self.pos(torch.arange(start, start + ids.shape[1], device=ids.device))
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=1), torch.cat((past[1], v), dim=1)
        return self.out(self.attend(q, k) @ v), (k, v)

    def attend(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        n, m = q.shape[1], k.shape[1]
        hidden = torch.ones(n, m, dtype=torch.bool, device=q.device).triu(m - n + 1)
        return (q @ k.mT).masked_fill(hidden, -torch.inf).softmax(-1)


def small(build: Callable[[], nn.Module] = Small) -> nn.Module:
    """The decoder, in eval mode, with reproducible weights."""
    return seeded(build)()


def rewritten_small(model: nn.Module, **options: Any) -> cachefree.Rewritten:
    """The decoder's one graph."""
    return cachefree.rewrite(model, (IDS[:2, :3],), **options)
