"""Decoders that are told how much is past by a number, beside a cache that is an argument."""

from __future__ import annotations

import math

import torch
from torch import nn

from .case import ModelCase, calls, seeded, tokens

VOCAB, WIDTH, HEADS, LONGEST = 31, 16, 2, 64


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def split(self, x):
        return x.view(x.shape[0], x.shape[1], HEADS, -1).transpose(1, 2)

    def forward(self, x, cache, mask):
        q, k, v = self.split(self.wq(x)), self.split(self.wk(x)), self.split(self.wv(x))
        if cache is not None:
            k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        scores = scores if mask is None else scores + mask
        return x + self.wo((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)), (k, v)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.pos = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.layers = nn.ModuleList([Layer() for _ in range(2)])
        self.head = nn.Linear(WIDTH, VOCAB)

    def run(self, x, cache, mask):
        new = []
        for place, layer in enumerate(self.layers):
            x, pair = layer(x, None if cache is None else cache[place], mask)
            new.append(pair)
        return self.head(x), new


class StartPosition(Base):
    """The mask is as wide as ``start_pos`` says: a call with another number does not run."""

    def forward(self, tokens: torch.Tensor, start_pos: int, cache=None):
        n = tokens.shape[1]
        x = self.emb(tokens) + self.pos.weight[start_pos : start_pos + n]
        mask = None
        if n > 1:
            mask = torch.full((n, n), float("-inf")).triu(1)
            mask = torch.hstack([torch.zeros(n, start_pos), mask])
        return self.run(x, cache, mask)


class PastLength(Base):
    """Positions from a number, the mask from the cache; the number may be left out."""

    def forward(self, ids, past=None, past_length=0):
        n = ids.shape[1]
        x = self.emb(ids) + self.pos(torch.arange(past_length, past_length + n))
        held = 0 if past is None else past[0][0].shape[2]
        return self.run(x, past, torch.full((n, held + n), float("-inf")).triu(held + 1))


class Shifted(Base):
    """``offset`` is added to what the cache holds: it is no count, and stays 0."""

    def forward(self, ids, past=None, offset=0):
        n = ids.shape[1]
        held = 0 if past is None else past[0][0].shape[2]
        x = self.emb(ids) + self.pos(torch.arange(held + offset, held + offset + n))
        return self.run(x, past, torch.full((n, held + n), float("-inf")).triu(held + 1))


class ThreeRows(Base):
    """Each step is three tokens: a return, a state and an action, all of one time."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(1, WIDTH) for _ in range(3)])

    def forward(self, steps, past=None, start=0):
        b, n = steps.shape[:2]
        time = self.pos(torch.arange(start, start + n))
        rows = [part(steps[..., i : i + 1]) + time for i, part in enumerate(self.parts)]
        held = 0 if past is None else past[0][0].shape[2]
        mask = torch.full((3 * n, held + 3 * n), float("-inf")).triu(held + 1)
        return self.run(torch.stack(rows, 2).view(b, 3 * n, WIDTH), past, mask)


def _told(name):
    return lambda batch, past, query, generator: {name: past}


CASES = (
    ModelCase(
        "start_position_beside_the_cache", seeded(StartPosition),
        **calls(tokens(VOCAB), cache="cache", also=_told("start_pos")), patterns=("P1", "P12"),
    ),
    ModelCase(
        "past_length_as_a_number", seeded(PastLength),
        **calls(tokens(VOCAB), cache="past", also=_told("past_length")), patterns=("P1", "P2"),
    ),
    ModelCase(
        "offset_that_shifts", seeded(Shifted), **calls(tokens(VOCAB), cache="past"),
        patterns=("P1", "P2"),
    ),
)  # fmt: skip
