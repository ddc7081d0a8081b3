"""Decoders whose first call alone puts rows before its own: prompts, begin tokens, silence."""

from __future__ import annotations

import torch
from torch import nn

from .case import ModelCase, calls, frames, seeded, tokens
from .counted import VOCAB, WIDTH, Base

ROWS = 3


class Prompted(Base):
    """A learned prompt is embedded once; what it gives itself is dropped."""

    def __init__(self):
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(ROWS, WIDTH))

    def forward(self, ids, past=None):
        x = self.emb(ids)
        if past is None:
            x = torch.cat([self.prompt.expand(x.shape[0], -1, -1), x], dim=1)
        held = 0 if past is None else past[0][0].shape[2]
        n = x.shape[1]
        x = x + self.pos(torch.arange(held, held + n))
        mask = torch.full((n, held + n), float("-inf")).triu(held + 1)
        logits, new = self.run(x, past, mask)
        if past is None:
            logits = logits[:, ROWS:]
        return logits, new


class BeginsByItself(Base):
    """A begin token stands before the caller's own; its logits are returned, too."""

    def forward(self, ids, past=None):
        held = 0 if past is None else past[0][0].shape[2]
        if held == 0:
            ids = torch.concatenate([torch.ones_like(ids[:, :1]), ids], axis=-1)
        n = ids.shape[1]
        x = self.emb(ids) + self.pos(torch.arange(held, held + n))
        mask = torch.full((n, held + n), float("-inf")).triu(held + 1)
        return self.run(x, past, mask)


class SilenceFirst(nn.Module):
    """Frames of silence before the first ones; every frame sees those before it."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.project, self.head = nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, frames, history=None):
        if history is None:
            frames = torch.cat((frames.new_zeros(frames.size(0), 2, frames.size(2)), frames), 1)
        k, v = self.project(frames).chunk(2, -1)
        if history is not None:
            k, v = torch.cat((history[0], k), 1), torch.cat((history[1], v), 1)
        n, total = frames.size(1), k.size(1)
        seen = torch.ones(n, total, dtype=torch.bool).tril(total - n)
        y = nn.functional.scaled_dot_product_attention(frames, k, v, attn_mask=seen)
        return self.head(y), (k, v)


class Transducer(nn.Module):
    """The network that predicts labels: zeros stand for the blank before the first one."""

    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.rnn = nn.LSTM(WIDTH, WIDTH, num_layers=2)

    def forward(self, labels, states=None):
        x = self.emb(labels).transpose(0, 1)
        if states is None:
            x = torch.cat((x.new_zeros(1, x.shape[1], x.shape[2]), x), dim=0)
        y, states = self.rnn(x, states)
        return self.head(y).transpose(0, 1), states


class BlankPadded(nn.Module):
    """The blank is padded to the labels."""

    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.rnn = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, labels, hidden=None):
        if hidden is None:
            labels = nn.functional.pad(labels, (1, 0), value=2)
        y, hidden = self.rnn(self.emb(labels), hidden)
        return self.head(y), hidden


class BeginsACell(nn.Module):
    """A learned row before the first token; what it gives is dropped."""

    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.cell, self.begin = nn.GRUCell(WIDTH, WIDTH), nn.Parameter(torch.randn(WIDTH))

    def forward(self, ids, h=None):
        x = self.emb(ids)
        if h is None:
            x = torch.cat([self.begin.expand(len(x), 1, -1), x], dim=1)
        state = x.new_zeros(len(x), WIDTH) if h is None else h
        rows = []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            rows.append(state)
        y = torch.stack(rows, dim=1)
        return self.head(y if h is not None else y[:, 1:]), state


CASES = (
    ModelCase(
        "prompt_before_the_tokens", seeded(Prompted), **calls(tokens(VOCAB)),
        patterns=("P1", "P10"),
    ),
    ModelCase(
        "begins_by_itself", seeded(BeginsByItself), **calls(tokens(VOCAB)),
        patterns=("P1", "P10"), chunk_invariant=False,
    ),
    ModelCase(
        "silence_before_the_frames", seeded(SilenceFirst),
        **calls(frames(8), cache="history"), patterns=("P1", "P10"), chunk_invariant=False,
        example_inputs=(torch.zeros(2, 5, 8),),
    ),
    ModelCase(
        "blank_before_the_labels", seeded(Transducer), **calls(tokens(VOCAB), cache="states"),
        patterns=("P8", "P22"), chunk_invariant=False,
    ),
    ModelCase(
        "blank_padded_to_the_labels", seeded(BlankPadded),
        **calls(tokens(VOCAB), cache="hidden"), patterns=("P8",), chunk_invariant=False,
    ),
    ModelCase(
        "begins_a_cell", seeded(BeginsACell), **calls(tokens(VOCAB), cache="h"),
        patterns=("P8",),
    ),
)  # fmt: skip
