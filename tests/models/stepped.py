"""Decoders that compute a prompt in a parallel form, and step a state from there on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .case import ModelCase, calls, one_token_later, seeded, tokens

__all__ = ["STEPPED"]

VOCAB = 11


class MultiScaleRetention(nn.Module):
    """A matrix of decays at first; heads of different decays, a table of which is a buffer."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.width = heads, dim // heads
        self.q, self.k, self.v, self.gate, self.out = (nn.Linear(dim, dim) for _ in range(5))
        self.norm = nn.LayerNorm(self.width)
        self.register_buffer("decay", torch.log(1 - 2 ** (-2.0 - torch.arange(heads))))

    def _split(self, x):
        return x.view(x.shape[0], x.shape[1], self.heads, self.width).transpose(1, 2)

    def parallel(self, q, k, v):
        index = torch.arange(q.shape[2]).to(q)
        distance = index[:, None] - index[None, :]
        mask = torch.exp(distance[None] * self.decay[:, None, None])
        mask = mask.masked_fill(distance[None] < 0, 0.0)
        out = (q @ k.transpose(-1, -2) * mask) @ v
        left = torch.exp((q.shape[2] - 1 - index) * self.decay[:, None])
        return out, (k * left[..., None]).transpose(-1, -2) @ v

    def recurrent(self, q, k, v, state):
        state = torch.exp(self.decay)[:, None, None] * state + k.transpose(-1, -2) @ v
        return q @ state, state

    def forward(self, x, state=None):
        q, k, v = (self._split(part(x)) for part in (self.q, self.k, self.v))
        k = k * self.width**-0.5
        if state is None:
            out, state = self.parallel(q, k, v)
        else:
            out, state = self.recurrent(q, k, v, state)
        out = self.norm(out).transpose(1, 2).flatten(2)
        return self.out(F.silu(self.gate(x)) * out), state


class Retentive(nn.Module):
    """Two layers with a list of states."""

    def __init__(self, dim=8, heads=2, layers=2):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, dim), nn.Linear(dim, VOCAB)
        self.layers = nn.ModuleList(MultiScaleRetention(dim, heads) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))

    def forward(self, ids, states=None):
        x, new = self.embed(ids), []
        for place, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            y, state = layer(norm(x), None if states is None else states[place])
            x = x + y
            new.append(state)
        return self.head(x), new


class LinearAttention(nn.Module):
    """Causal linear attention: running sums at first; the sums are the state."""

    def __init__(self, dim=6):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, dim), nn.Linear(dim, VOCAB)
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, ids, past=None):
        q, k, v = self.qkv(self.embed(ids)).chunk(3, dim=-1)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        if past is None:
            kv = torch.cumsum(k.unsqueeze(-1) * v.unsqueeze(-2), dim=1)
            norm = torch.cumsum(k, dim=1)
            num = torch.einsum("bnd,bnde->bne", q, kv)
            den = (q * norm).sum(-1, keepdim=True)
            past = (kv[:, -1], norm[:, -1])
        else:
            assert ids.shape[1] == 1
            kv = past[0] + k[:, 0].unsqueeze(-1) * v[:, 0].unsqueeze(-2)
            norm = past[1] + k[:, 0]
            num = torch.einsum("bd,bde->be", q[:, 0], kv).unsqueeze(1)
            den = (q[:, 0] * norm).sum(-1, keepdim=True).unsqueeze(1)
            past = (kv, norm)
        return self.head(num / (den + 1e-6)), past


class StateSpaceBlock(nn.Module):
    """A causal convolution, then a selective state space: a decay mask first, a step later."""

    def __init__(self, dim, states=3, kernel=4):
        super().__init__()
        self.kernel = kernel
        self.in_proj, self.out_proj = nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.conv = nn.Conv1d(dim, dim, kernel, groups=dim, padding=kernel - 1)
        self.x_proj = nn.Linear(dim, 1 + 2 * states)
        self.dt_bias, self.D = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(dim))
        self.A_log = nn.Parameter(torch.zeros(1))

    def forward(self, x, cache):
        u, z = self.in_proj(x).chunk(2, dim=-1)
        if cache is None:
            y, cache = self._prompt(u.transpose(1, 2))
        else:
            y, cache = self._token(u[:, 0], cache)
        return self.out_proj(y * F.silu(z)), cache

    def _selected(self, u):
        dt, B, C = self.x_proj(u).split([1, 3, 3], dim=-1)
        dt = F.softplus(dt + self.dt_bias)
        return dt, -torch.exp(self.A_log) * dt, B, C

    def _prompt(self, u):
        n = u.shape[-1]
        conv = F.pad(u, (self.kernel, 0))[..., -self.kernel :]
        u = F.silu(self.conv(u)[..., :n]).transpose(1, 2)
        dt, dA, B, C = self._selected(u)
        total = torch.cumsum(dA.squeeze(-1), dim=-1)
        segments = total[:, :, None] - total[:, None, :]
        keep = torch.ones(n, n, dtype=torch.bool).tril()
        decay = torch.exp(segments.masked_fill(~keep, -torch.inf))
        y = torch.einsum("bin,bjn,bij,bjd->bid", C, B, decay, dt * u)
        ssm = torch.einsum("bjn,bj,bjd->bdn", B, torch.exp(total[:, -1:] - total), dt * u)
        return y + self.D * u, {"conv": conv, "ssm": ssm}

    def _token(self, u, cache):
        conv = torch.cat([cache["conv"][..., 1:], u.unsqueeze(-1)], dim=-1)
        u = F.silu((conv * self.conv.weight[:, 0]).sum(-1) + self.conv.bias)
        dt, dA, B, C = self._selected(u)
        ssm = torch.exp(dA)[..., None] * cache["ssm"] + (dt * u)[..., None] * B[:, None]
        y = (ssm * C[:, None]).sum(-1) + self.D * u
        return y.unsqueeze(1), {"conv": conv, "ssm": ssm}


class StateSpace(nn.Module):
    """Blocks with a dict each, in a dict by layer."""

    def __init__(self, dim=6, layers=2):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, dim), nn.Linear(dim, VOCAB)
        self.blocks = nn.ModuleList(StateSpaceBlock(dim) for _ in range(layers))

    def forward(self, ids, cache=None):
        x, new = self.embed(ids), {}
        for place, block in enumerate(self.blocks):
            y, new[place] = block(x, None if cache is None else cache[place])
            x = x + y
        return self.head(x), new


class TimeMixing(nn.Module):
    """Weighted averages with a bonus for the token itself; the state keeps a maximum apart."""

    def __init__(self, dim=6):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, dim), nn.Linear(dim, VOCAB)
        self.k, self.v, self.r = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.mix, self.w, self.u = (nn.Parameter(torch.rand(dim)) for _ in range(3))

    def _mixed(self, x, before):
        x = x * self.mix + before * (1 - self.mix)
        return self.k(x), self.v(x), torch.sigmoid(self.r(x))

    def forward(self, ids, state=None):
        x = self.embed(ids)
        w = -torch.exp(self.w)
        if state is None:
            n = x.shape[1]
            k, v, r = self._mixed(x, F.pad(x, (0, 0, 1, -1)))
            index = torch.arange(n)
            ago = (index[:, None] - index[None, :] - 1)[..., None]
            score = k[:, None] + ago * w  # of token j for the state that token i finds
            score = score.masked_fill(ago < 0, -torch.inf)
            score = torch.where(ago == -1, (k + self.u)[:, None], score)
            wkv = (score.softmax(2) * v[:, None]).sum(2)
            left = k + (n - 1 - index)[:, None] * w
            most = left.amax(1)
            weight = torch.exp(left - most[:, None])
            state = (x[:, -1], (weight * v).sum(1), weight.sum(1), most)
            return self.head(r * wkv), state
        before, num, den, most = state
        k, v, r = (part.squeeze(1) for part in self._mixed(x, before.unsqueeze(1)))
        top = torch.maximum(most, k + self.u)
        old, new = torch.exp(most - top), torch.exp(k + self.u - top)
        wkv = (old * num + new * v) / (old * den + new)
        top = torch.maximum(most + w, k)
        old, new = torch.exp(most + w - top), torch.exp(k - top)
        state = (x[:, -1], old * num + new * v, old * den + new, top)
        return self.head((r * wkv).unsqueeze(1)), state


class LongConvolution(nn.Module):
    """A state space as a convolution over the whole prompt, by FFT."""

    def __init__(self, dim=4, states=3):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, dim), nn.Linear(dim, VOCAB)
        self.a, self.b, self.c = (nn.Parameter(torch.randn(dim, states)) for _ in range(3))
        self.d = nn.Parameter(torch.ones(dim))

    def forward(self, ids, h=None):
        u, a = self.embed(ids), torch.sigmoid(self.a)
        if h is not None:
            h = a * h + self.b * u[:, -1, :, None]
            return self.head(((h * self.c).sum(-1) + self.d * u[:, -1]).unsqueeze(1)), h
        n = u.shape[1]
        powers = a[..., None] ** torch.arange(n)
        kernel = (powers * (self.b * self.c)[..., None]).sum(1)
        signal = torch.fft.rfft(u.transpose(1, 2), n=2 * n) * torch.fft.rfft(kernel, n=2 * n)
        y = torch.fft.irfft(signal, n=2 * n)[..., :n].transpose(1, 2)
        h = torch.einsum("dsn,bnd->bds", powers.flip(-1), u) * self.b
        return self.head(y + self.d * u), h


class MinimalGated(nn.Module):
    """A gated unit whose gates see the token alone; cumulative products at first."""

    def __init__(self, dim=6):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, dim), nn.Linear(dim, VOCAB)
        self.z, self.h = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, ids, hidden=None):
        x = self.embed(ids)
        z, new = torch.sigmoid(self.z(x)), self.h(x)
        if hidden is None:
            total = torch.cumsum(torch.log(1 - z), dim=1)
            ys = torch.cumsum(z * new * torch.exp(-total), dim=1) * torch.exp(total)
            return self.head(ys), ys[:, -1:]
        hidden = (1 - z) * hidden + z * new
        return self.head(hidden), hidden


class LearnedStart(nn.Module):
    """The state that a prompt starts from is a parameter, and decays as others do."""

    def __init__(self, dim=6):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, dim), nn.Linear(dim, VOCAB)
        self.start, self.rate = nn.Parameter(torch.randn(dim)), nn.Parameter(torch.randn(dim))

    def forward(self, ids, state=None):
        x, a = self.embed(ids), torch.sigmoid(self.rate)
        if state is None:
            t = torch.arange(x.shape[1])
            decay = a ** (t[:, None] - t[None, :]).clamp(min=0)[..., None]
            decay = decay * (t[:, None] >= t[None, :])[..., None]
            ys = torch.einsum("ijd,bjd->bid", decay, x) + self.start * a ** (t + 1)[:, None]
            return self.head(ys), ys[:, -1]
        state = a * state + x[:, 0]
        return self.head(state).unsqueeze(1), state


def _case(name, build, cache, **options):
    prompt = torch.arange(10).view(2, 5)
    return ModelCase(
        name,
        seeded(build),
        patterns=("P8",),
        example_inputs=(prompt,),
        rewrite_options={"check": "test"},
        expects_proof=False,
        domain=one_token_later,
        **calls(tokens(VOCAB), cache=cache),
        **options,
    )


STEPPED: tuple[ModelCase, ...] = (
    _case("retention", Retentive, "states"),
    _case("linear_attention", LinearAttention, "past"),
    _case("conv_and_state_space", StateSpace, "cache"),
    _case("time_mixing", TimeMixing, "state"),
    _case("long_convolution", LongConvolution, "h"),
    _case("minimal_gated", MinimalGated, "hidden"),
    _case("learned_start", LearnedStart, "state"),
)
