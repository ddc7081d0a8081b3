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


class CausalConv3d(nn.Conv3d):
    """Over time, the first frame stands before itself; the cache is the last frames."""

    def __init__(self, inner, outer, kernel=3):
        super().__init__(inner, outer, (kernel, 3, 3), padding=(0, 1, 1))
        self.left = kernel - 1

    def forward(self, x, conv_cache=None):
        before = [conv_cache] if conv_cache is not None else [x[:, :, :1]] * self.left
        x = torch.cat([*before, x], dim=2)
        return super().forward(x), x[:, :, -self.left :].clone()


class VideoEncoder(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.conv_in, self.conv_out = CausalConv3d(2, width), CausalConv3d(width, 2)

    def forward(self, sample, conv_cache=None):
        new, conv_cache = {}, conv_cache or {}
        y, new["conv_in"] = self.conv_in(sample, conv_cache=conv_cache.get("conv_in"))
        y, new["conv_out"] = self.conv_out(F.silu(y), conv_cache=conv_cache.get("conv_out"))
        return y, new


class PolicyOfRecentObservations(nn.Module):
    """The first observation fills the history; each later one pushes the oldest out."""

    def __init__(self, seen=6, dim=8, horizon=4):
        super().__init__()
        self.encode, self.act = nn.Linear(seen, dim), nn.Linear(horizon * dim, 2)
        self.horizon = horizon

    def forward(self, obs, history=None):
        z = torch.relu(self.encode(obs)).unsqueeze(1)
        if history is None:
            history = z.repeat(1, self.horizon, 1)
        else:
            history = torch.cat([history[:, 1:], z], dim=1)
        return self.act(history.flatten(1)), history


class PolicyThatLooksBack(PolicyOfRecentObservations):
    """The oldest observation is looked at before it is pushed out; at first it is the first."""

    def __init__(self):
        super().__init__()
        self.look = nn.Linear(8, 2)

    def forward(self, obs, history=None):
        z = torch.relu(self.encode(obs)).unsqueeze(1)
        oldest = z[:, 0] if history is None else history[:, 0]
        before = [z] * (self.horizon - 1) if history is None else [history[:, 1:]]
        history = torch.cat([*before, z], dim=1)
        return self.act(history.flatten(1)) + self.look(oldest), history


def videos(batch, past, query, generator):
    pixels = frames(2 * 4 * 5)(batch, past, query, generator)
    return pixels.unflatten(-1, (2, 4, 5)).transpose(1, 2)


def observations(batch, past, query, generator):
    return frames(6)(batch, past, 1, generator)[:, 0]


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
        "first_frame_before_a_video",
        seeded(VideoEncoder),
        **calls(videos),
        patterns=("P8", "P21"),
        example_inputs=(torch.linspace(-1, 1, 200).view(1, 2, 5, 4, 5),),
    ),
    ModelCase(
        "history_filled_with_the_first",
        seeded(PolicyOfRecentObservations),
        **calls(observations),
        patterns=("P5", "P21"),
        chunk_invariant=False,
    ),
    ModelCase(
        "history_looked_back_at",
        seeded(PolicyThatLooksBack),
        **calls(observations),
        patterns=("P5", "P21"),
        chunk_invariant=False,
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
