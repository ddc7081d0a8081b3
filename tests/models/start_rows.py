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
)  # fmt: skip
