"""Decoders that step a state from token to token in a Python loop, as people write them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .case import ModelCase, calls, one_token_later, seeded, tokens

__all__ = ["LOOPS", "ONE_TOKEN_LATER"]

VOCAB = 11


class SelectiveScan(nn.Module):
    """A convolution's left context by a join, and a selective scan, token by token."""

    def __init__(self, dim=6, states=4, kernel=3):
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.conv = nn.Conv1d(dim, dim, kernel, groups=dim)
        self.x_proj, self.dt_proj = nn.Linear(dim, 2 + 2 * states), nn.Linear(2, dim)
        self.kernel, self.states = kernel, states
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, states + 1).repeat(dim, 1)))
        self.D = nn.Parameter(torch.ones(dim))

    def forward(self, x, cache=None):
        b, _, d = x.shape
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = u.transpose(1, 2)
        if cache is None:
            conv, h = u.new_zeros(b, d, self.kernel - 1), u.new_zeros(b, d, self.states)
        else:
            conv, h = cache
        u = torch.cat([conv, u], dim=2)
        conv = u[:, :, -(self.kernel - 1) :]
        u = F.silu(self.conv(u)).transpose(1, 2)
        dt, B, C = torch.split(self.x_proj(u), [2, self.states, self.states], dim=-1)
        delta = F.softplus(self.dt_proj(dt))
        y, h = self.selective_scan(u, delta, B, C, h)
        return self.out_proj((y + u * self.D) * F.silu(z)), (conv, h)

    def selective_scan(self, u, delta, B, C, h):
        A = -torch.exp(self.A_log)
        dA = torch.exp(delta.unsqueeze(-1) * A)
        dBx = delta.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1)
        ys = []
        for t in range(u.shape[1]):
            h = dA[:, t] * h + dBx[:, t]
            ys.append((h @ C[:, t, :].unsqueeze(-1)).squeeze(-1))
        return torch.stack(ys, dim=1), h


class StateSpaceDecoder(nn.Module):
    def __init__(self, dim=6, layers=2):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, dim), nn.Linear(dim, VOCAB)
        self.layers = nn.ModuleList(SelectiveScan(dim) for _ in range(layers))

    def forward(self, ids, caches=None):
        x, new = self.embed(ids), []
        for i, layer in enumerate(self.layers):
            y, cache = layer(x, None if caches is None else caches[i])
            x = x + y
            new.append(cache)
        return self.head(x), new


class TimeMixing(nn.Module):
    """Numerator, denominator and running maximum; each token's row is written in place."""

    def __init__(self, dim=6):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, dim), nn.Linear(dim, VOCAB)
        self.decay, self.bonus = nn.Parameter(torch.randn(dim)), nn.Parameter(torch.randn(dim))
        self.key, self.value = (nn.Linear(dim, dim, bias=False) for _ in range(2))

    def forward(self, ids, state=None):
        x = self.embed(ids)
        b, s, d = x.size()
        if state is None:
            aa, bb, pp = torch.zeros(b, d), torch.zeros(b, d), torch.full((b, d), -1e38)
        else:
            aa, bb, pp = state
        k, v = self.key(x), self.value(x)
        out, w = torch.empty_like(k), -torch.exp(self.decay)
        for t in range(s):
            kt, vt = k[:, t].float(), v[:, t]
            ww = self.bonus + kt
            q = torch.maximum(pp, ww)
            e1, e2 = torch.exp(pp - q), torch.exp(ww - q)
            out[:, t] = (e1 * aa + e2 * vt) / (e1 * bb + e2)
            ww = pp + w
            q = torch.maximum(ww, kt)
            e1, e2 = torch.exp(ww - q), torch.exp(kt - q)
            aa, bb, pp = e1 * aa + e2 * vt, e1 * bb + e2, q
        return self.head(out), (aa, bb, pp)


class StackedCells(nn.Module):
    """Layers within the loop, tokens from ``unbind``, rows joined by ``cat``."""

    def __init__(self, dim=6, layers=2):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, dim), nn.Linear(dim, VOCAB)
        self.cells = nn.ModuleList([nn.LSTMCell(dim, dim) for _ in range(layers)])

    def forward(self, ids, states=None):
        x = self.embed(ids)
        if states is None:
            zeros = x.new_zeros(x.size(0), x.size(2))
            states = [(zeros, zeros) for _ in self.cells]
        logits = []
        for x_t in x.unbind(1):
            new = []
            for cell, (h, c) in zip(self.cells, states, strict=True):
                x_t, c = cell(x_t, (h, c))
                new.append((x_t, c))
            states = new
            logits.append(self.head(x_t).unsqueeze(1))
        return torch.cat(logits, dim=1), states


class RunningSums(nn.Module):
    """Linear attention: sums of keys, and of keys times values."""

    def __init__(self, dim=8, heads=2):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, dim), nn.Linear(dim, VOCAB)
        self.qkv, self.heads = nn.Linear(dim, 3 * dim), heads

    def forward(self, ids, past=None):
        x = self.embed(ids)
        b, n, d = x.shape
        q, k, v = (
            p.view(b, n, self.heads, -1).transpose(1, 2) for p in self.qkv(x).chunk(3, dim=-1)
        )
        q, k = F.elu(q) + 1, F.elu(k) + 1
        width = d // self.heads
        if past is None:
            past = x.new_zeros(b, self.heads, width, width), x.new_zeros(b, self.heads, width)
        kv, norm = past
        outs = []
        for t in range(n):
            kv = kv + k[:, :, t, :, None] * v[:, :, t, None, :]
            norm = norm + k[:, :, t]
            num = torch.einsum("bhd,bhde->bhe", q[:, :, t], kv)
            outs.append(num / ((q[:, :, t] * norm).sum(-1, keepdim=True) + 1e-6))
        y = torch.stack(outs, dim=2).transpose(1, 2).reshape(b, n, d)
        return self.head(y), (kv, norm)


class MatrixMemory(nn.Module):
    """An exponentially gated matrix memory with a stabilizer; the step is a method."""

    def __init__(self, dim=6):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, dim), nn.Linear(dim, VOCAB)
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.gates, self.dim = nn.Linear(dim, 2), dim

    def step(self, q, k, v, i, f, state):
        C, n, m = state
        log_f = F.logsigmoid(f)
        m_new = torch.maximum(log_f + m, i)
        f, i = torch.exp(log_f + m - m_new), torch.exp(i - m_new)
        C = f[..., None] * C + i[..., None] * (k[:, :, None] * v[:, None, :])
        n = f * n + i * k
        scale = torch.clamp((q * n).sum(-1, keepdim=True).abs(), min=1.0)
        return (q[:, None, :] @ C).squeeze(1) / scale, (C, n, m_new)

    def forward(self, ids, state=None):
        x = self.embed(ids)
        b, s, _ = x.shape
        q, k, v = self.q(x), self.k(x) / math.sqrt(self.dim), self.v(x)
        i, f = self.gates(x).split(1, dim=-1)
        if state is None:
            state = x.new_zeros(b, self.dim, self.dim), x.new_zeros(b, self.dim), x.new_zeros(b, 1)
        hs = []
        for t in range(s):
            h, state = self.step(q[:, t], k[:, t], v[:, t], i[:, t], f[:, t], state)
            hs.append(h)
        return self.head(torch.stack(hs, 1)), state


class LearnedStart(nn.Module):
    """A gated unit whose first state is a parameter; two sequences are walked together."""

    def __init__(self, dim=6):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, dim), nn.Linear(dim, VOCAB)
        self.gate, self.new = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.h0 = nn.Parameter(torch.randn(1, dim))

    def forward(self, ids, h=None):
        x = self.embed(ids)
        if h is None:
            h = self.h0.expand(x.shape[0], -1)
        out = []
        for z, c in zip(torch.sigmoid(self.gate(x)).unbind(1), self.new(x).unbind(1), strict=True):
            h = (1 - z) * h + z * c
            out.append(h)
        return self.head(torch.stack(out, 1)), h


class TimeMajor(nn.Module):
    """Tokens first, cut out by slices of one."""

    def __init__(self, dim=6, states=3):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, dim), nn.Linear(dim, VOCAB)
        self.A, self.B, self.C = (nn.Parameter(-torch.rand(dim, states)) for _ in range(3))

    def forward(self, ids, state=None):
        u = self.embed(ids).transpose(0, 1)
        if state is None:
            state = torch.zeros(u.size(1), *self.A.shape, device=u.device)
        ys = []
        for t in range(u.size(0)):
            state = torch.exp(self.A) * state + self.B * u[t : t + 1].squeeze(0).unsqueeze(-1)
            ys.append((state * self.C).sum(-1)[None])
        return self.head(torch.cat(ys).transpose(0, 1)), state


class LastStep(nn.Module):
    """The first state is made by the cell itself, and the last token's output alone returned."""

    def __init__(self, dim=6):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, dim), nn.Linear(dim, VOCAB)
        self.cell = nn.GRUCell(dim, dim)

    def forward(self, ids, h=None):
        x = self.embed(ids)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h) if h is not None else self.cell(x[:, t])
            y = self.head(h)
        return y, h


class StepsLater(nn.Module):
    """A loop at first, one step later."""

    def __init__(self, dim=6):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, dim), nn.Linear(dim, VOCAB)
        self.cell, self.dim = nn.GRUCell(dim, dim), dim

    def forward(self, ids, state=None):
        x = self.embed(ids)
        if state is None:
            h, ys = x.new_zeros(x.shape[0], self.dim), []
            for t in range(x.shape[1]):
                h = self.cell(x[:, t], h)
                ys.append(h)
            return self.head(torch.stack(ys, 1)), h
        assert x.shape[1] == 1
        h = self.cell(x.squeeze(1), state)
        return self.head(h.unsqueeze(1)), h


class GatedByTheCall(nn.Module):
    """A gate from all tokens of the call, and its first token, are read in each round."""

    def __init__(self, dim=6):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, dim), nn.Linear(dim, VOCAB)
        self.cell, self.gate = nn.GRUCell(dim, dim), nn.Linear(dim, dim)

    def forward(self, ids, state=None):
        x, ys = self.embed(ids), []
        h = torch.zeros_like(x[:, 0]) if state is None else state
        gate = torch.sigmoid(self.gate(x).mean(1))
        for t in range(x.shape[1]):
            h = self.cell(gate * x[:, t] + x[:, 0], h)
            ys.append(h)
        return self.head(torch.stack(ys, 1)), h


def _case(name, build, cache, **options):
    prompt = torch.arange(10).view(2, 5)
    return ModelCase(
        name,
        seeded(build),
        patterns=("P8",),
        example_inputs=(prompt,),
        **calls(tokens(VOCAB), cache=cache),
        **options,
    )


LOOPS: tuple[ModelCase, ...] = (
    _case("selective_scan", StateSpaceDecoder, "caches"),
    _case("time_mixing", TimeMixing, "state"),
    _case("stacked_cells", StackedCells, "states"),
    _case("running_sums", RunningSums, "past"),
    _case("matrix_memory", MatrixMemory, "state"),
    _case("learned_start", LearnedStart, "h"),
    _case("time_major", TimeMajor, "state"),
    _case("last_step", LastStep, "h"),
    _case("gated_by_the_call", GatedByTheCall, "state"),
)
ONE_TOKEN_LATER = _case("steps_later", StepsLater, "state", domain=one_token_later)
