"""Decoders whose cache holds rows before the first token: learned ones, rows of zeros."""

from __future__ import annotations

import torch
from torch import nn

from .case import ModelCase, calls, seeded, tokens
from .counted import HEADS, VOCAB, WIDTH, Base

ROWS = 4


class Prefixed(Base):
    def causal(self, n, held):
        return torch.full((n, held + n), float("-inf")).triu(held + 1)


class LearnedKeysAndValues(Prefixed):
    def __init__(self):
        super().__init__()
        self.prefix = nn.Parameter(torch.randn(2, 2, HEADS, ROWS, WIDTH // HEADS))

    def forward(self, ids, past=None):
        if past is None:
            past = [
                (k.expand(ids.shape[0], -1, -1, -1), v.expand(ids.shape[0], -1, -1, -1))
                for k, v in self.prefix
            ]
        return self.run(self.emb(ids), past, self.causal(ids.shape[1], past[0][0].shape[2]))


class PromptEncoder(Prefixed):
    """The rows are computed from virtual tokens; each layer's are one tensor, positions go on."""

    def __init__(self):
        super().__init__()
        self.virtual = nn.Embedding(ROWS, WIDTH)
        self.project = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4 * WIDTH)
        )

    def prompt(self, batch):
        rows = self.project(self.virtual(torch.arange(ROWS)))
        rows = rows.view(1, ROWS, 4, HEADS, -1).expand(batch, -1, -1, -1, -1)
        return rows.permute(2, 0, 3, 1, 4).split(2)

    def forward(self, input_ids, past_key_values=None):
        if past_key_values is None:
            past_key_values = self.prompt(input_ids.shape[0])
        held, n = past_key_values[0].shape[-2], input_ids.shape[1]
        x = self.emb(input_ids) + self.pos(torch.arange(held, held + n))
        logits, new = self.run(x, past_key_values, self.causal(n, held))
        return logits, tuple(torch.stack(pair) for pair in new)


class RowsOfZeros(Prefixed):
    """Attention may always look at two rows of zeros."""

    def forward(self, ids, cache=None):
        if cache is None:
            empty = torch.zeros(ids.shape[0], HEADS, 2, WIDTH // HEADS)
            cache = [(empty, empty) for _ in self.layers]
        return self.run(self.emb(ids), cache, self.causal(ids.shape[1], cache[0][0].shape[2]))


CASES = (
    ModelCase(
        "learned_keys_before_the_tokens", seeded(LearnedKeysAndValues), **calls(tokens(VOCAB)),
        patterns=("P1", "P22"),
    ),
    ModelCase(
        "prompt_computed_from_parameters", seeded(PromptEncoder),
        **calls(tokens(VOCAB), cache="past_key_values"), patterns=("P1", "P22"),
    ),
    ModelCase(
        "rows_of_zeros_before_the_tokens", seeded(RowsOfZeros),
        **calls(tokens(VOCAB), cache="cache"), patterns=("P1", "P22"),
    ),
)  # fmt: skip
