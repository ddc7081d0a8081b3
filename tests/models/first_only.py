"""Decoders that see or hear something before the text, on the first call alone."""

from __future__ import annotations

import torch
from tests.small import Small
from torch import nn


class Listener(Small):
    """Sounds of any length stand before the text: (ids, sounds, past) → (logits, past)."""

    def __init__(self, vocab: int = 12, dim: int = 6) -> None:
        super().__init__(vocab, dim)
        self.hear = nn.Linear(3, dim)

    def forward(self, ids, sounds=None, past=None):
        x = self.emb(ids)
        if sounds is not None:
            x = torch.cat([self.hear(sounds).tanh(), x], dim=1)
        return self.decode(x, past)

    def decode(self, x, past):
        start = 0 if past is None else past[0].shape[1]
        x = x + self.pos(torch.arange(start, start + x.shape[1]))
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=1), torch.cat((past[1], v), dim=1)
        return self.out(self.attend(q, k) @ v), (k, v)


class OtherwiseWithoutSounds(Listener):
    """A call without sounds is no call with none: its tokens count double."""

    def forward(self, ids, sounds=None, past=None):
        logits, past = super().forward(ids, sounds, past)
        return (2 * logits if sounds is None else logits), past


class SummingListener(Listener):
    """The sounds are summed up, so that their number leaves no trace in a size."""

    def forward(self, ids, sounds=None, past=None):
        if sounds is not None:
            sounds = sounds.mean(dim=1, keepdim=True)
        return super().forward(ids, sounds, past)


class Onlooker(Small):
    """A picture stands before the text, as one row for each patch."""

    def __init__(self, vocab: int = 12, dim: int = 6) -> None:
        super().__init__(vocab, dim)
        self.patches, self.project = nn.Conv2d(1, dim, 2, 2), nn.Linear(dim, dim)

    def forward(self, ids, picture=None, past=None):
        x = self.emb(ids)
        if picture is not None:
            seen = self.patches(picture).flatten(2).transpose(1, 2)
            x = torch.cat([self.project(seen.softmax(1)), x], dim=1)
        start = 0 if past is None else past[0].shape[1]
        x = x + self.pos(torch.arange(start, start + x.shape[1]))
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=1), torch.cat((past[1], v), dim=1)
        return self.out(self.attend(q, k) @ v), (k, v)


class TwicePrefixed(Onlooker):
    """A second value of the picture goes another way around the first."""

    def forward(self, ids, picture=None, past=None):
        logits, past = super().forward(ids, picture, past)
        return (logits if picture is None else logits + picture.mean()), past


class TwoEyes(Onlooker):
    """Two pictures that are seen as one."""

    def forward(self, ids, left=None, right=None, past=None):
        return super().forward(ids, None if left is None else left + right, past)


class Captioner(Listener):
    """Sounds are joined where nothing is past, and not looked at otherwise."""

    def forward(self, ids, sounds=None, past=None):
        x = self.emb(ids)
        if past is None and sounds is not None:
            x = torch.cat((self.hear(sounds).tanh(), x), dim=1)
        elif past is not None:
            x = self.later(x)
        return self.decode(x, past)

    def later(self, x):
        return x


class CaptionerOfTheText(Captioner):
    """What the sounds give themselves is dropped."""

    def forward(self, ids, sounds=None, past=None):
        logits, new = super().forward(ids, sounds, past)
        is_heard = past is None and sounds is not None
        return (logits[:, sounds.shape[1] :] if is_heard else logits), new


class CaptionerThatDoublesLater(Captioner):
    """What stands where the join would be is another value on later calls."""

    def later(self, x):
        return 2 * x


class CaptionerThatAsksLater(Captioner):
    """Later calls that are given sounds count their rows, though they do not read them."""

    def forward(self, ids, sounds=None, past=None):
        logits, new = super().forward(ids, sounds, past)
        return (logits if past is None or sounds is None else sounds.shape[1] * logits), new
