"""Decoders with states that have no first value, or that are stepped token by token in Python."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .case import RefusalCase, calls, frames, seeded
from .from_inputs import StartsFromTheMean


class CausalConv(nn.Module):
    """A convolution over the frames and those that were kept."""

    def __init__(self, bins=9, dim=12, kernel=3):
        super().__init__()
        self.left = kernel - 1
        self.inp, self.out = nn.Linear(bins, dim), nn.Linear(dim, bins)
        self.conv = nn.Conv1d(dim, dim, kernel)

    def first(self, y):
        raise NotImplementedError

    def forward(self, x, cache=None):
        y = self.inp(x).transpose(1, 2)
        y = self.first(y) if cache is None else torch.cat([cache, y], dim=2)
        return self.out(self.conv(y).transpose(1, 2)), y[:, :, -self.left :]


class PadsOnBothSides(CausalConv):
    def first(self, y):
        return F.pad(y, (1, 1))


class MirrorsTheFirstFrames(CausalConv):
    def first(self, y):
        return F.pad(y, (self.left, 0), mode="reflect")


class TwoStarts(nn.Module):
    """The last frame stands for what was before it, twice, with two first values."""

    def __init__(self, bins=9):
        super().__init__()
        self.out = nn.Linear(bins, bins)

    def forward(self, x, state=None):
        if state is None:
            a, b = F.pad(x, (0, 0, 1, 0)), F.pad(x, (0, 0, 1, 0), value=1.0)
        else:
            a = b = torch.cat([state, x], dim=1)
        return self.out(a[:, :-1] * 3 + torch.tanh(b[:, :-1])), x[:, -1:]


class ScalesTheFirstChunk(StartsFromTheMean):
    """The state is zeros at first, but what is done with the output differs."""

    def forward(self, ids, hidden=None):
        y, state = self.gru(self.embed(ids), hidden)
        if hidden is None:
            y = 2 * y
        return self.head(y), state


class CellByCell(nn.Module):
    """A Python loop over the tokens whose body is another one for the first of them."""

    def __init__(self, vocab=23, dim=12):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab, dim), nn.Linear(dim, vocab)
        self.cell = nn.LSTMCell(dim, dim)

    def forward(self, ids, state=None):
        x = self.embed(ids)
        if state is None:
            state = (x.new_zeros(x.shape[0], x.shape[2]), x.new_zeros(x.shape[0], x.shape[2]))
        ys = []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t] if t < 4 else 2 * x[:, t], state)
            ys.append(state[0])
        return self.head(torch.stack(ys, dim=1)), state


class CrowdedMaximum(nn.Module):
    """A first call without a maximum, later ones with half of the last: no number is neutral."""

    def __init__(self, bins=8):
        super().__init__()
        self.score = nn.Linear(bins, 1)

    def forward(self, x, state=None):
        s = self.score(x)
        m = s.cummax(dim=1).values
        if state is not None:
            m = torch.maximum(m, torch.tanh(state))
        return s - m, m[:, -1:]


FRAMES = torch.linspace(-1, 1, 45).view(1, 5, 9)

REFUSALS = (
    RefusalCase(
        "padded_on_both_sides",
        seeded(PadsOnBothSides),
        "UnsupportedBranchError",
        ("first call", "later calls"),
        example_inputs=(FRAMES,),
    ),
    RefusalCase(
        "first_frames_mirrored",
        seeded(MirrorsTheFirstFrames),
        "UnsupportedBranchError",
        ("pad.default", "reflect"),
        example_inputs=(FRAMES,),
    ),
    RefusalCase(
        "two_first_values_of_one_state",
        seeded(TwoStarts),
        "UnsupportedBranchError",
        ("The cache state has no neutral value", "1.0", "0.0"),
        example_inputs=(FRAMES,),
    ),
    RefusalCase(
        "first_chunk_scaled",
        seeded(ScalesTheFirstChunk),
        "UnsupportedBranchError",
        ("y = 2 * y",),
    ),
    RefusalCase(
        "loop_over_tokens",
        seeded(CellByCell),
        "CaptureError",
        ("asks which token it is at", "token 0 < 4", "if t < 4 else"),
    ),
    RefusalCase(
        "no_number_is_neutral",
        seeded(CrowdedMaximum),
        "UnsupportedBranchError",
        ("cummax",),
        example_inputs=(FRAMES[..., :8],),
        rewrite_options={"cache": "state"},
        or_correct=True,
        **calls(frames(8), cache="state"),
    ),
)
