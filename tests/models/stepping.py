"""Decoders that take one token a call, most of them without an axis for tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .case import seeded
from .kept import KeptCase, Say

VOCAB, WIDTH = 33, 8


class DecayStep(nn.Module):
    """A weighted mean over all that is past, kept as sums and a running maximum."""

    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.key, self.value, self.gate = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.mix = nn.Parameter(torch.rand(3, WIDTH))
        self.decay, self.first = nn.Parameter(torch.rand(WIDTH)), nn.Parameter(torch.rand(WIDTH))

    def forward(self, token, state=None):
        x = self.emb(token)
        if state is None:
            zero = torch.zeros_like(x)
            state = [zero, zero, zero, zero - 1e30]
        before, above, below, most = state
        mk, mv, mr = (torch.lerp(before, x, part) for part in self.mix)
        k, v, r = self.key(mk), self.value(mv), torch.sigmoid(self.gate(mr))
        now = torch.maximum(most, self.first + k)
        one, other = torch.exp(most - now), torch.exp(self.first + k - now)
        y = r * (one * above + other * v) / (one * below + other)
        next_most = torch.maximum(most - torch.exp(self.decay), k)
        one, other = torch.exp(most - torch.exp(self.decay) - next_most), torch.exp(k - next_most)
        return self.head(x + y), [x, one * above + other * v, one * below + other, next_most]


class Cache(NamedTuple):
    conv: torch.Tensor
    scan: torch.Tensor

    @staticmethod
    def empty(batch, width, kernel, size):
        return Cache(torch.zeros(batch, width, kernel), torch.zeros(batch, width, size))


class SelectiveBlock(nn.Module):
    def __init__(self, width=WIDTH, size=4, kernel=4):
        super().__init__()
        self.size = size
        self.inside = nn.Linear(width, 2 * width, bias=False)
        self.conv = nn.Conv1d(width, width, kernel, groups=width, padding=kernel - 1)
        self.select = nn.Linear(width, 1 + 2 * size, bias=False)
        self.rate = nn.Linear(1, width)
        self.log_a = nn.Parameter(torch.log(torch.arange(1.0, size + 1).repeat(width, 1)))
        self.out = nn.Linear(width, width, bias=False)

    def step(self, x, cache):
        x, gate = self.inside(x).chunk(2, dim=-1)
        conv = torch.roll(cache.conv, shifts=-1, dims=-1)
        conv = torch.cat([conv[:, :, :-1], x.unsqueeze(-1)], dim=-1)
        x = F.silu(torch.sum(conv * self.conv.weight.squeeze(1), dim=-1) + self.conv.bias)
        rate, b, c = self.select(x).split([1, self.size, self.size], dim=-1)
        rate = F.softplus(self.rate(rate)).unsqueeze(-1)
        scan = cache.scan * torch.exp(-rate * torch.exp(self.log_a))
        scan = scan + x.unsqueeze(-1) * rate * b.unsqueeze(1)
        y = torch.einsum("bdn,bn->bd", scan, c)
        return self.out(y * F.silu(gate)), Cache(conv, scan)


class SelectiveStep(nn.Module):
    def __init__(self, depth=2):
        super().__init__()
        self.emb, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.layers = nn.ModuleList([SelectiveBlock() for _ in range(depth)])

    def forward(self, token: torch.LongTensor, h: list[Cache] | None = None):
        x = self.emb(token)
        if h is None:
            h = [Cache.empty(token.shape[0], WIDTH, 4, 4) for _ in self.layers]
        for place, layer in enumerate(self.layers):
            y, h[place] = layer.step(x, h[place])
            x = x + y
        return self.head(x), h


class NormalisedStep(nn.Module):
    """The normaliser starts from ones."""

    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.w, self.r = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(WIDTH, 4 * WIDTH, bias=False)

    def forward(self, x, states=None):
        x = self.emb(x)
        if states is None:
            zeros = torch.zeros(len(x), WIDTH)
            states = (zeros, zeros, torch.ones(len(x), WIDTH), zeros)
        h, c, n, m = states
        i, f, z, o = (self.w(x) + self.r(h)).chunk(4, dim=-1)
        most = torch.max(f + m, i)
        i, f = torch.exp(i - most), torch.exp(f + m - most)
        c, n = f * c + i * torch.tanh(z), f * n + i
        h = torch.sigmoid(o) * c / n
        return self.head(h), (h, c, n, most)


class AttendingStep(nn.Module):
    """The keys grow by a row a call, and the position is looked up by an index that is a size."""

    def __init__(self):
        super().__init__()
        self.emb, self.pos = nn.Embedding(VOCAB, WIDTH), nn.Embedding(64, WIDTH)
        self.qkv, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, token, cache=None):
        at = 0 if cache is None else cache[0].shape[1]
        q, k, v = self.qkv(self.emb(token) + self.pos.weight[at]).chunk(3, dim=-1)
        k, v = k[:, None], v[:, None]
        if cache is not None:
            k, v = torch.cat([cache[0], k], 1), torch.cat([cache[1], v], 1)
        weights = torch.einsum("bd,btd->bt", q, k).softmax(-1)
        return self.head(torch.einsum("bt,btd->bd", weights, v)), (k, v)


class AssertedStep(AttendingStep):
    """The axis for tokens is there, and the code asserts that it holds one."""

    def forward(self, token, cache=None):
        assert token.shape[1] == 1, "one token a call"
        logits, cache = super().forward(token[:, 0], cache)
        return logits, cache


class Pointing(nn.Module):
    """Two arguments take what comes back: one is called hidden, one has a name of its own."""

    def __init__(self):
        super().__init__()
        self.emb, self.lstm = nn.Embedding(VOCAB, WIDTH), nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.memory, self.query = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.seen, self.score = nn.Linear(1, WIDTH, bias=False), nn.Linear(WIDTH, 1)
        self.out, self.gate = nn.Linear(2 * WIDTH, VOCAB), nn.Linear(2 * WIDTH, 1)

    def forward(self, token, memory, source, hidden=None, coverage=None):
        if coverage is None:
            coverage = torch.zeros(memory.shape[:2], dtype=memory.dtype)
        x, hidden = self.lstm(self.emb(token).unsqueeze(1), hidden)
        x = x.squeeze(1)
        near = self.memory(memory) + self.query(x)[:, None] + self.seen(coverage.unsqueeze(2))
        weights = self.score(torch.tanh(near)).squeeze(2).softmax(1)
        coverage = coverage + weights
        both = torch.cat([x, torch.einsum("bt,btd->bd", weights, memory)], 1)
        own = torch.sigmoid(self.gate(both))
        chances = own * self.out(both).softmax(1)
        chances = chances.scatter_add(1, source, (1 - own) * weights)
        return torch.log(chances + 1e-9), hidden, coverage


# How they are called.


def _token_by_token(name: str, *, keeps_axis: bool = False) -> Any:
    def begin(model: Any) -> tuple[Say, Any]:
        held: dict[str, Any] = {}

        def say(ids: torch.Tensor, start: int) -> torch.Tensor:
            results = []
            for token in ids.split(1, dim=1):
                result, held[name] = model(token if keeps_axis else token[:, 0], **held)
                results.append(result)
            return torch.stack(results)

        return say, None

    return begin


def _pointing(model: Any) -> tuple[Say, Any]:
    held: dict[str, Any] = {}

    def say(ids: torch.Tensor, start: int) -> torch.Tensor:
        memory, source = _memory(len(ids), 6)
        results = []
        for token in ids.unbind(1):
            result, hidden, coverage = model(token, memory, source, **held)
            held.update(hidden=hidden, coverage=coverage)
            results.append(result)
        return torch.stack(results)

    return say, None


def _memory(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    places = torch.arange(batch * length).view(batch, length)
    return torch.sin(places[..., None] * torch.arange(1, WIDTH + 1) / 5.0), places % VOCAB


STEPPING: tuple[KeptCase, ...] = (
    KeptCase("sums_and_a_maximum", seeded(DecayStep), _token_by_token("state")),
    KeptCase("window_and_scan", seeded(SelectiveStep), _token_by_token("h")),
    KeptCase("normaliser_of_ones", seeded(NormalisedStep), _token_by_token("states")),
    KeptCase("a_row_a_call", seeded(AttendingStep), _token_by_token("cache")),
    KeptCase("one_token_asserted", seeded(AssertedStep), _token_by_token("cache", keeps_axis=True)),
    KeptCase(
        "hidden_and_coverage",
        seeded(Pointing),
        _pointing,
        lambda model: (torch.zeros(3, dtype=torch.int64), *_memory(3, 5)),
    ),
)
