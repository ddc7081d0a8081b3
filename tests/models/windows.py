"""Decoders that keep, or see, a limited number of earlier positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .case import ModelCase, calls, seeded, tokens


class SlidingWindowBlock(nn.Module):
    def __init__(self, dim, heads, window):
        super().__init__()
        self.heads, self.window = heads, window
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x, past=None):
        b, n, d = x.shape
        h = self.norm(x)
        q, k, v = (
            proj(h).view(b, n, self.heads, d // self.heads).transpose(1, 2)
            for proj in (self.to_q, self.to_k, self.to_v)
        )
        if past is not None:
            k = torch.cat((past[0], k), dim=2)
            v = torch.cat((past[1], v), dim=2)
        present = (k[:, :, -self.window :], v[:, :, -self.window :])
        j = k.shape[2]
        rows = torch.arange(j - n, j, device=x.device).unsqueeze(-1)
        cols = torch.arange(j, device=x.device).unsqueeze(0)
        visible = (cols <= rows) & (rows - cols <= self.window)
        slope = torch.tensor([2.0 ** -(i + 1) for i in range(self.heads)], dtype=x.dtype)
        bias = slope.view(-1, 1, 1) * (cols - rows)
        bias = bias.masked_fill(~visible, torch.finfo(x.dtype).min)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return x + self.to_out(y.transpose(1, 2).reshape(b, n, d)), present


class SlidingWindowLM(nn.Module):
    """Keys and values are cut to the last `window` positions after they were used."""

    def __init__(self, vocab=36, dim=16, heads=2, depth=2, window=5):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList([SlidingWindowBlock(dim, heads, window) for _ in range(depth)])
        self.unembed = nn.Linear(dim, vocab, bias=False)

    def forward(self, ids, past=None):
        x = self.embed(ids)
        presents = []
        for i, block in enumerate(self.blocks):
            x, present = block(x, past[i] if past is not None else None)
            presents.append(present)
        return self.unembed(x), presents


class LocalAttention(nn.Module):
    def __init__(self, width, heads, look_back):
        super().__init__()
        self.heads, self.look_back = heads, look_back
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, cache=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = torch.cat((cache[0], k), -2), torch.cat((cache[1], v), -2)
        n, m = q.shape[-2], k.shape[-2]
        mask = torch.ones(n, m, dtype=torch.bool, device=x.device)
        mask = mask.tril(m - n) & mask.triu(m - n - self.look_back)
        sim = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        out = sim.masked_fill(mask.logical_not(), -torch.finfo(sim.dtype).max).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).flatten(2)), torch.stack((k, v))


class AlternatingModel(nn.Module):
    """Local and global layers in turn; the cache is kept whole, and the window is in the mask."""

    def __init__(self, vocab=44, width=16, heads=2, depth=4, look_back=3):
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocab, width), nn.Embedding(64, width)
        self.layers = nn.ModuleList(
            [LocalAttention(width, heads, look_back if i % 2 else 1000) for i in range(depth)]
        )
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(depth)])
        self.head = nn.Linear(width, vocab)

    def forward(self, ids, caches=None):
        past_len = caches[0].shape[-2] if caches is not None else 0
        caches = caches if caches is not None else [None] * len(self.layers)
        x = self.tok(ids) + self.pos.weight[past_len : past_len + ids.shape[-1]]
        updated = []
        for layer, norm, cache in zip(self.layers, self.norms, caches):
            y, cache = layer(norm(x), cache)
            x = x + y
            updated.append(cache)
        return self.head(x), updated


CASES = (
    ModelCase(
        "sliding_window_cache",
        seeded(SlidingWindowLM),
        **calls(tokens(36)),
        patterns=("P1", "P5"),
        # a chunk starts with window earlier positions: just those that its first token may see
    ),
    ModelCase(
        "sliding_window_mask",
        seeded(AlternatingModel),
        **calls(tokens(44), cache="caches"),
        patterns=("P1", "P2", "P3"),
    ),
)
