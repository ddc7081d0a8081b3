"""Running sums, maxima and counts: chunks that are scanned at once, from a state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .case import ModelCase, calls, frames, seeded, tokens


class LinearAttention(nn.Module):
    """Sums over all tokens so far, as a cumulative sum over the chunk plus what came before."""

    def __init__(self, dim, heads=2):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, state=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        kv = torch.einsum("bshd,bshe->bshde", k, v).cumsum(1)
        z = k.cumsum(1)
        if state is not None:
            kv = kv + state[0].unsqueeze(1)
            z = z + state[1].unsqueeze(1)
        y = torch.einsum("bshd,bshde->bshe", q, kv)
        y = y / (torch.einsum("bshd,bshd->bsh", q, z).unsqueeze(-1) + 1e-6)
        return self.out(y.flatten(2)), (kv[:, -1], z[:, -1])


class LinearTransformer(nn.Module):
    def __init__(self, vocab=31, dim=12, depth=2):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.layers = nn.ModuleList([LinearAttention(dim) for _ in range(depth)])
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(depth)])
        self.head = nn.Linear(dim, vocab)

    def forward(self, ids, states=None):
        x = self.embed(ids)
        new = []
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms)):
            y, s = layer(norm(x), None if states is None else states[i])
            x = x + y
            new.append(s)
        return self.head(x), new


class RunningNorm(nn.Module):
    """Frames scaled by the largest value so far; the count is a tensor of one number a row."""

    def __init__(self, bins=8, dim=12):
        super().__init__()
        self.inp, self.out = nn.Linear(bins, dim), nn.Linear(dim, bins)

    def forward(self, x, cache=None):
        h = self.inp(x)
        if cache is None:
            peak = torch.full((x.shape[0], 1, h.shape[-1]), -1e38, device=x.device, dtype=h.dtype)
            total, count = h.new_zeros(x.shape[0], 1, h.shape[-1]), h.new_zeros(x.shape[0], 1)
        else:
            peak, total, count = cache
        peaks = torch.maximum(h.cummax(dim=1).values, peak)
        totals = total + h.cumsum(1)
        counts = count + torch.arange(1, x.shape[1] + 1, device=x.device, dtype=h.dtype)
        y = (h - totals / counts.unsqueeze(-1)) * torch.sigmoid(peaks)
        return self.out(y), (peaks[:, -1:], totals[:, -1:], counts[:, -1:])


class StreamingSoftmax(nn.Module):
    """Attention pooling with a running maximum, without a maximum before the first call."""

    def __init__(self, bins=8, dim=12):
        super().__init__()
        self.score, self.value = nn.Linear(bins, 1), nn.Linear(bins, dim)
        self.out = nn.Linear(dim, bins)

    def forward(self, x, state=None):
        s, v = self.score(x), self.value(x)
        m = s.cummax(dim=1).values
        if state is not None:
            m = torch.maximum(m, state[0])
        p = torch.exp(s - m[:, -1:])
        num, den = (p * v).sum(1, keepdim=True), p.sum(1, keepdim=True)
        if state is not None:
            scale = torch.exp(state[0] - m[:, -1:])
            num, den = num + state[1] * scale, den + state[2] * scale
        return self.out(torch.tanh(num / den) + v), (m[:, -1:], num, den)


class PositionCounter(nn.Module):
    """A position a row, counted in a tensor, beside keys and values."""

    def __init__(self, vocab=33, dim=12, heads=2):
        super().__init__()
        self.heads = heads
        self.embed, self.pos = nn.Embedding(vocab, dim), nn.Embedding(64, dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, vocab)

    def forward(self, ids, past=None):
        b, n = ids.shape
        if past is None:
            offset = torch.zeros(b, dtype=torch.long, device=ids.device)
        else:
            offset = past[2]
        x = self.embed(ids) + self.pos(offset[:, None] + torch.arange(n, device=ids.device))
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        m = k.shape[2]
        mask = torch.ones(n, m, dtype=torch.bool, device=ids.device).tril(m - n)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2)), (k, v, offset + n)


class Retention(nn.Module):
    """The chunk-wise form: decayed sums inside the chunk, and the state of all before."""

    def __init__(self, vocab=24, dim=12, heads=2):
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(vocab, dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, vocab)
        self.register_buffer("decay", torch.tensor([0.9, 0.7]))

    def forward(self, ids, state=None):
        x = self.embed(ids)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        n = ids.shape[1]
        if state is None:
            state = torch.zeros(
                ids.shape[0], self.heads, k.shape[-1], v.shape[-1], dtype=x.dtype, device=x.device
            )
        place = torch.arange(n, device=ids.device)
        gap = (place[:, None] - place).clamp(min=0)
        inner = self.decay[:, None, None] ** gap * (place[:, None] >= place)
        y = (q @ k.transpose(-1, -2) * inner) @ v
        y = y + (q * self.decay[:, None, None] ** (place[:, None] + 1)) @ state
        left = self.decay[:, None, None] ** (n - 1 - place)[:, None]
        state = state * self.decay[:, None, None] ** n + (k * left).transpose(-1, -2) @ v
        return self.out(y.transpose(1, 2).flatten(2)), state


CASES = (
    ModelCase(
        "linear_attention_sums",
        seeded(LinearTransformer),
        **calls(tokens(31)),
        patterns=("P8",),
    ),
    ModelCase(
        "running_maximum_sum_and_count",
        seeded(RunningNorm),
        **calls(frames(8)),
        patterns=("P8",),
        example_inputs=(torch.linspace(-1, 1, 40).view(1, 5, 8),),
    ),
    ModelCase(
        "streaming_softmax",
        seeded(StreamingSoftmax),
        **calls(frames(8), cache="state"),
        patterns=("P8",),
        example_inputs=(torch.linspace(-1, 1, 40).view(1, 5, 8),),
        may_refuse=True,  # nothing below all numbers is subtracted from itself
        expects_proof=False,
        chunk_invariant=False,
    ),
    ModelCase(
        "position_counted_in_a_tensor",
        seeded(PositionCounter),
        **calls(tokens(33)),
        patterns=("P1", "P8"),
    ),
    ModelCase(
        "retention_by_chunks",
        seeded(Retention, scale=0.4),
        **calls(tokens(24)),
        patterns=("P8",),
    ),
)
