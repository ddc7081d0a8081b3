"""Caches whose first value is computed from the inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .case import ModelCase, calls, frames, seeded, tokens


class RepeatsTheFirstFrame(nn.Module):
    """Causal convolutions: the first frame stands for what was before it."""

    def __init__(self, bins=9, dim=12, depth=2, kernel=3):
        super().__init__()
        self.left = kernel - 1
        self.inp, self.out = nn.Linear(bins, dim), nn.Linear(dim, bins)
        self.convs = nn.ModuleList([nn.Conv1d(dim, dim, kernel) for _ in range(depth)])

    def before(self, y):
        return y[:, :, :1].expand(-1, -1, self.left)

    def forward(self, x, caches=None):
        y = self.inp(x).transpose(1, 2)
        kept = []
        for i, conv in enumerate(self.convs):
            left = self.before(y) if caches is None else caches[i]
            whole = torch.cat([left, y], dim=2)
            kept.append(whole[:, :, -self.left :])
            y = F.gelu(conv(whole))
        return self.out(y.transpose(1, 2)), kept


class PadsByReplication(nn.Module):
    """The same by `F.pad`, which the later path does not call."""

    def __init__(self, bins=9, dim=12, kernel=4):
        super().__init__()
        self.left = kernel - 1
        self.inp, self.out = nn.Linear(bins, dim), nn.Linear(dim, bins)
        self.conv = nn.Conv1d(dim, dim, kernel)

    def forward(self, x, cache=None):
        y = self.inp(x).transpose(1, 2)
        if cache is None:
            y = F.pad(y, (self.left, 0), mode="replicate")
        else:
            y = torch.cat([cache, y], dim=2)
        return self.out(self.conv(y).transpose(1, 2)), y[:, :, -self.left :]


class StartsFromTheMean(nn.Module):
    def __init__(self, vocab=22, dim=12):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab, dim), nn.Linear(dim, vocab)
        self.gru = nn.GRU(dim, dim, batch_first=True)

    def forward(self, ids, hidden=None):
        x = self.embed(ids)
        if hidden is None:
            hidden = x.mean(dim=1)[None]
        y, hidden = self.gru(x, hidden)
        return self.head(y), hidden


class Differences(nn.Module):
    """Frames less the ones before them; the first one less itself."""

    def __init__(self, bins=7, dim=10):
        super().__init__()
        self.inp, self.out = nn.Linear(bins, dim), nn.Linear(dim, bins)

    def forward(self, x, last_frame=None):
        if last_frame is None:
            last_frame = x[:, :1]
        change = x - torch.cat([last_frame, x[:, :-1]], dim=1)
        return self.out(torch.tanh(self.inp(change))), x[:, -1:]


class SmoothedLevel(nn.Module):
    """A running level that the first frame sets, beside keys and values that grow."""

    def __init__(self, bins=8, dim=12):
        super().__init__()
        self.qkv, self.out = nn.Linear(bins, 3 * dim), nn.Linear(dim, bins)

    def forward(self, x, state=None):
        level = x[:, 0] if state is None else state["level"]
        q, k, v = self.qkv(x - level[:, None]).chunk(3, dim=-1)
        if state is not None:
            k = torch.cat([state["k"], k], dim=1)
            v = torch.cat([state["v"], v], dim=1)
        weights = torch.softmax(q @ k.transpose(1, 2) / 3.0, dim=-1)
        level = 0.75 * level + 0.25 * x.mean(dim=1)
        return self.out(weights @ v), {"k": k, "v": v, "level": level}


def first_frames(width):
    return (torch.linspace(-1, 1, 5 * width).view(1, 5, width),)


CASES = (
    ModelCase(
        "first_frame_repeated",
        seeded(RepeatsTheFirstFrame),
        **calls(frames(9)),
        patterns=("P8", "P21"),
        example_inputs=first_frames(9),
    ),
    ModelCase(
        "padded_by_replication",
        seeded(PadsByReplication),
        **calls(frames(9)),
        patterns=("P8", "P21"),
        example_inputs=first_frames(9),
    ),
    ModelCase(
        "state_from_the_mean_of_the_inputs",
        seeded(StartsFromTheMean),
        **calls(tokens(22)),
        patterns=("P8", "P21"),
        chunk_invariant=False,
    ),
    ModelCase(
        "differences_of_frames",
        seeded(Differences),
        **calls(frames(7)),
        patterns=("P8", "P21"),
        example_inputs=first_frames(7),
    ),
    ModelCase(
        "level_of_the_first_frame",
        seeded(SmoothedLevel),
        **calls(frames(8)),
        patterns=("P1", "P8", "P21"),
        example_inputs=first_frames(8),
        chunk_invariant=False,
    ),
)
