"""States that are handed on in another order than taken in, or under names of their own."""

from __future__ import annotations

import torch
from torch import nn

from .case import ModelCase, calls, seeded, tokens

__all__ = ["OWN_NAMES", "STATES_BY_NAME", "KeysAndTwoTraces"]

VOCAB, DIM = 11, 6


class Trace(nn.Module):
    """Fast and slow traces of what was seen, which change places with every call."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB)
        self.mix = nn.Linear(DIM, DIM)

    def forward(self, ids, traces=None):
        x = self.embed(ids)
        if traces is None:
            traces = x.new_zeros(x.shape[0], DIM), x.new_ones(x.shape[0], DIM)
        fast, slow = traces
        fast = torch.tanh(self.mix(x.sum(1)) + slow)
        return self.head(x + fast[:, None] + slow[:, None]), (slow, fast)


class RotatingTraces(nn.Module):
    """Four traces, of which each call writes over the oldest one."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB)
        self.mix = nn.Linear(DIM, DIM)

    def forward(self, ids, ring=None):
        x = self.embed(ids)
        ring = [x.new_full((x.shape[0], DIM), 0.5 * i) for i in range(4)] if ring is None else ring
        oldest, *rest = ring
        newest = torch.tanh(self.mix(oldest + x.sum(1)))
        return self.head(x + newest[:, None]), (*rest, newest)


class ReturnsCellFirst(nn.Module):
    """Takes ``h`` and ``c`` of one size, and returns the new ones the other way round."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB)
        self.cell = nn.LSTMCell(DIM, DIM)

    def forward(self, ids, h=None, c=None):
        x = self.embed(ids)
        if h is None:
            h, c = x.new_zeros(x.shape[0], DIM), x.new_zeros(x.shape[0], DIM)
        new_h, new_c = self.cell(x.mean(1), (h, c))
        return self.head(x + new_h[:, None]), new_c, new_h


class KeysAndTwoTraces(nn.Module):
    """Two states of one size behind keys, of which nothing tells which is which."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, DIM)

    def forward(self, ids, ka=None, kb=None, s1=None, s2=None):
        x = self.embed(ids)
        keys, more = x, self.mix(x)
        if ka is not None:
            keys, more = torch.cat([ka, keys], dim=1), torch.cat([kb, more], dim=1)
        if s1 is None:
            s1, s2 = x.new_zeros(x.shape[0], DIM), x.new_zeros(x.shape[0], DIM)
        fast, slow = torch.tanh(self.mix(s1 + x.mean(1))), s2 + x.mean(1)
        return (keys * more).mean(1) + fast - slow, *(keys, more), slow * 1, fast * 1


OWN_NAMES: tuple[ModelCase, ...] = tuple(
    ModelCase(
        name,
        seeded(model),
        **calls(tokens(VOCAB), cache=cache),
        patterns=("P8",),
        chunk_invariant=False,
    )
    for name, model, cache in (
        ("trace", Trace, "traces"),
        ("rotating_traces", RotatingTraces, "ring"),
    )
)
STATES_BY_NAME = seeded(ReturnsCellFirst)
