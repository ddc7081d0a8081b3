"""Caches whose first value is seen by attention, learned, or told by an empty tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .case import ModelCase, calls, frames, seeded, tokens


class MemoryLayer(nn.Module):
    def __init__(self, dim, heads=2):
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x, mem):
        seen = torch.cat([mem, x], dim=1)
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(seen).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        n, m = q.shape[2], k.shape[2]
        mask = torch.ones(n, m, dtype=torch.bool, device=x.device).tril(m - n)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.out(y.transpose(1, 2).flatten(2)), seen


class ZeroMemories(nn.Module):
    """Memories of a fixed number of rows, zeros at first, which attention does see."""

    def __init__(self, vocab=28, dim=12, depth=2, mem_len=4):
        super().__init__()
        self.mem_len = mem_len
        self.embed = nn.Embedding(vocab, dim)
        self.layers = nn.ModuleList([MemoryLayer(dim) for _ in range(depth)])
        self.head = nn.Linear(dim, vocab)

    def init_mems(self, x):
        return [x.new_zeros(x.size(0), self.mem_len, x.size(2)) for _ in self.layers]

    def forward(self, ids, mems=None):
        x = self.embed(ids)
        if not mems:
            mems = self.init_mems(x)
        new_mems = []
        for layer, mem in zip(self.layers, mems):
            x, seen = layer(x, mem)
            new_mems.append(seen[:, -self.mem_len :].detach())
        return self.head(x), new_mems


class LearnedMemories(nn.Module):
    """The rows that stand in front of the first tokens are learned, one set a layer."""

    def __init__(self, vocab=26, dim=12, depth=2, mem_len=3):
        super().__init__()
        self.mem_len = mem_len
        self.embed = nn.Embedding(vocab, dim)
        self.start = nn.Parameter(torch.empty(depth, mem_len, dim))
        self.layers = nn.ModuleList([MemoryLayer(dim) for _ in range(depth)])
        self.head = nn.Linear(dim, vocab)

    def forward(self, ids, memory=None):
        x = self.embed(ids)
        kept = []
        for i, layer in enumerate(self.layers):
            if memory is None:
                mem = self.start[i].unsqueeze(0).expand(x.shape[0], -1, -1)
            else:
                mem = memory[:, i]
            x, seen = layer(x, mem)
            kept.append(seen[:, -self.mem_len :])
        return self.head(x), torch.stack(kept, dim=1)


class EmptyCacheTensor(nn.Module):
    """No cache is an empty tensor of rank 3; the convolution asks for its length."""

    def __init__(self, bins=9, dim=12, kernel=3):
        super().__init__()
        self.lorder = kernel - 1
        self.inp, self.out = nn.Linear(bins, dim), nn.Linear(dim, bins)
        self.conv = nn.Conv1d(dim, dim, kernel, groups=dim)

    def forward(self, x, cache=None):
        if cache is None:
            cache = torch.zeros((0, 0, 0), dtype=x.dtype, device=x.device)
        y = self.inp(x).transpose(1, 2)
        if cache.size(2) == 0:
            y = F.pad(y, (self.lorder, 0), "constant", 0.0)
        else:
            assert cache.size(0) == y.size(0)
            assert cache.size(1) == y.size(1)
            y = torch.cat((cache, y), dim=2)
        new_cache = y[:, :, -self.lorder :]
        return x + self.out(F.silu(self.conv(y)).transpose(1, 2)), new_cache


class TwoScales(nn.Module):
    """Three kinds of state in one tuple: a convolution's, a sum and a learned vector."""

    def __init__(self, vocab=24, dim=12, kernel=4):
        super().__init__()
        self.kernel = kernel
        self.embed = nn.Embedding(vocab, dim)
        self.conv = nn.Conv1d(dim, dim, kernel, groups=dim)
        self.bias0 = nn.Parameter(torch.randn(dim))
        self.gate, self.head = nn.Linear(dim, dim), nn.Linear(dim, vocab)

    def forward(self, ids, state=None):
        x = self.embed(ids).transpose(1, 2)
        b, d, n = x.shape
        if state is not None:
            conv_state, total, last = state
        else:
            conv_state = torch.zeros(b, d, self.kernel - 1, device=x.device, dtype=x.dtype)
            total = x.new_zeros((b, d))
            last = torch.sigmoid(self.bias0)[None].repeat(b, 1)
        joined = torch.cat([conv_state, x], dim=-1)
        y = F.silu(self.conv(joined)).transpose(1, 2)
        before = torch.cat([last[:, None], y[:, :-1]], dim=1)
        sums = total[:, None] + y.cumsum(1)
        out = self.head(self.gate(before) * torch.tanh(sums))
        return out, (joined[..., n:], sums[:, -1], y[:, -1])


class CutsToTheLast(nn.Module):
    """The model takes everything, and with a cache looks at the last token only."""

    def __init__(self, vocab=23, dim=12):
        super().__init__()
        self.embed, self.pos = nn.Embedding(vocab, dim), nn.Embedding(64, dim)
        self.qkv, self.head = nn.Linear(dim, 3 * dim), nn.Linear(dim, vocab)

    def forward(self, idx, past=None):
        start = 0
        if past is not None:
            idx = idx[:, -1:]
            start = past[0].shape[1]
        x = self.embed(idx) + self.pos(torch.arange(start, start + idx.shape[1]))
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
        n, m = q.shape[1], k.shape[1]
        hidden = torch.ones(n, m, dtype=torch.bool, device=idx.device).triu(1 + m - n)
        y = (q @ k.transpose(1, 2)).masked_fill(hidden, -1e9).softmax(-1) @ v
        return self.head(x + y), (k, v)


class OneTokenWithAState(nn.Module):
    """A network over any number of tokens that asserts one where there is a state."""

    def __init__(self, vocab=21, dim=12):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab, dim), nn.Linear(dim, vocab)
        self.rnn = nn.LSTM(dim, dim, batch_first=True)

    def forward(self, ids, hx=None):
        if hx is not None:
            assert ids.shape[1] == 1, "one token at a time"
        y, hx = self.rnn(self.embed(ids), hx)
        return self.head(y), hx


def one_token_later(batch, past, query):
    return past == 0 or query == 1


CASES = (
    ModelCase(
        "cut_to_the_last_token",
        seeded(CutsToTheLast),
        **calls(tokens(23)),
        patterns=("P1", "P2", "P16"),
        domain=one_token_later,
    ),
    ModelCase(
        "one_token_with_a_state",
        seeded(OneTokenWithAState),
        **calls(tokens(21)),
        patterns=("P8", "P9"),
        domain=one_token_later,
    ),
    ModelCase(
        "memories_of_zeros",
        seeded(ZeroMemories),
        **calls(tokens(28)),
        patterns=("P5", "P8", "P22"),
        chunk_invariant=False,
    ),
    ModelCase(
        "memories_that_are_learned",
        seeded(LearnedMemories),
        **calls(tokens(26)),
        patterns=("P8", "P22"),
        chunk_invariant=False,
    ),
    ModelCase(
        "empty_tensor_for_no_state",
        seeded(EmptyCacheTensor),
        **calls(frames(9)),
        patterns=("P8", "P18"),
        example_inputs=(torch.linspace(-1, 1, 45).view(1, 5, 9),),
    ),
    ModelCase(
        "states_of_three_kinds",
        seeded(TwoScales),
        **calls(tokens(24)),
        patterns=("P8",),
    ),
)
