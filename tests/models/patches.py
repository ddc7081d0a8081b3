"""Decoders of series in patches, and of frames that a stride takes together."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from .case import LONGEST, Draw, ModelCase, calls, seeded

PATCH, WIDTH, MELS = 4, 16, 6


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x, past):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
        n, total = q.shape[1], k.shape[1]
        seen = torch.ones(n, total, dtype=torch.bool).tril(total - n)
        return scaled_dot_product_attention(q, k, v, attn_mask=seen), (k, v)


class Patches(nn.Module):
    """A series is cut into patches; the cache holds one row for each."""

    def __init__(self):
        super().__init__()
        self.embed, self.attend = nn.Linear(PATCH, WIDTH), Attention()
        self.head = nn.Linear(WIDTH, PATCH)

    def forward(self, series, past=None):
        patches = series.view(series.shape[0], series.shape[1] // PATCH, PATCH)
        y, past = self.attend(self.embed(patches), past)
        return self.head(y).flatten(1), past


class StridedFrames(nn.Module):
    """A convolution makes one frame of two; the last frame before is kept beside the rows."""

    def __init__(self):
        super().__init__()
        self.conv, self.attend = nn.Conv1d(MELS, WIDTH, 3, stride=2), Attention()
        self.head = nn.Linear(WIDTH, MELS)

    def forward(self, mel, cache=None):
        x = mel.transpose(1, 2)
        x = nn.functional.pad(x, (1, 0)) if cache is None else torch.cat([cache[2], x], dim=2)
        y, (k, v) = self.attend(gelu(self.conv(x)).transpose(1, 2), cache)
        return self.head(y), (k, v, x[..., -1:])


class RecurrentPatches(nn.Module):
    """A recurrent network over patches; samples that fill none are dropped."""

    def __init__(self):
        super().__init__()
        self.embed, self.rnn = nn.Linear(PATCH, WIDTH), nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, samples, h=None):
        n = samples.shape[1] // PATCH
        y, h = self.rnn(self.embed(samples[:, : n * PATCH].reshape(-1, n, PATCH)), h)
        return self.head(y), h


def in_units(unit: int, *width: int) -> Draw:
    """A series of which each token takes some samples, shape (B, unit·S, ...)."""

    def draw(batch: int, past: int, query: int, generator: torch.Generator) -> torch.Tensor:
        series = torch.randn(batch, unit * LONGEST, *width, generator=generator)
        return series[:, unit * past : unit * (past + query)]

    return draw


CASES = (
    ModelCase(
        "series_in_patches", seeded(Patches), **calls(in_units(PATCH)),
        patterns=("P1", "P15"), example_inputs=(torch.zeros(2, 20),),
    ),
    ModelCase(
        "strided_frames", seeded(StridedFrames), **calls(in_units(2, MELS), cache="cache"),
        patterns=("P1", "P8", "P15"), example_inputs=(torch.zeros(2, 10, MELS),),
    ),
    ModelCase(
        "recurrent_patches", seeded(RecurrentPatches), **calls(in_units(PATCH), cache="h"),
        patterns=("P8",), example_inputs=(torch.zeros(2, 20),),
    ),
)  # fmt: skip
