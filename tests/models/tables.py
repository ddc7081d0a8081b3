"""Decoders that build masks and tables at first use, keep them, and grow them on demand."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .case import ModelCase, RefusalCase, calls, seeded, tokens

__all__ = ["REFUSED_TABLES", "TABLES"]

VOCAB = 17


def _turned(x):
    one, other = x.chunk(2, dim=-1)
    return torch.cat([-other, one], dim=-1)


class RotaryGrown(nn.Module):
    """Built by the first call, and again by a longer one."""

    def __init__(self, dim=4):
        super().__init__()
        inverse = 1.0 / (100 ** (torch.arange(0, dim, 2).float() / dim))
        self.register_buffer("inv_freq", inverse, persistent=False)
        self.max_seq_len_cached = 0
        self.cos = self.sin = None

    def rebuild(self, length):
        angles = torch.outer(torch.arange(length, dtype=self.inv_freq.dtype), self.inv_freq)
        angles = torch.cat([angles, angles], dim=-1)
        self.cos, self.sin, self.max_seq_len_cached = angles.cos(), angles.sin(), length

    def forward(self, start, end):
        if end > self.max_seq_len_cached:
            self.rebuild(end)
        return self.cos[start:end], self.sin[start:end]


class RotaryOfTheLastLength(RotaryGrown):
    """Built again whenever the length is another one."""

    def forward(self, start, end):
        if end != self.max_seq_len_cached:
            self.rebuild(end)
        return self.cos[start:end], self.sin[start:end]


class RotaryStretched(RotaryGrown):
    """The longest call so far decides the frequencies: short calls after it differ."""

    def rebuild(self, length):
        scaled = self.inv_freq / (1 + 0.1 * length)
        angles = torch.outer(torch.arange(length, dtype=scaled.dtype), scaled)
        angles = torch.cat([angles, angles], dim=-1)
        self.cos, self.sin, self.max_seq_len_cached = angles.cos(), angles.sin(), length


class RotaryInABuffer(nn.Module):
    """A buffer of 64 rows, of which the first ones are written by the calls that need them."""

    def __init__(self, dim=4):
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / (100 ** (torch.arange(0, dim, 2).float() / dim)))
        self.register_buffer("angles", torch.zeros(64, dim), persistent=False)
        self.rows = 0

    def frequencies(self, end):
        return self.inv_freq

    def forward(self, start, end):
        if end <= self.rows:
            angles = self.angles[:end]
        else:
            places = torch.arange(end, dtype=self.inv_freq.dtype)
            angles = torch.einsum("..., f -> ... f", places, self.frequencies(end))
            angles = angles.unsqueeze(-1).expand(*angles.shape, 2).reshape(end, -1)
            if end <= 64:
                self.angles[:end] = angles.detach()
                self.rows = end
        return angles[start:].cos(), angles[start:].sin()


class RotaryStretchedInABuffer(RotaryInABuffer):
    """The longest call so far decides the frequencies."""

    def frequencies(self, end):
        return self.inv_freq / (1 + 0.1 * end)


class RotaryFilledOnce(RotaryInABuffer):
    """The first call fills the buffer; longer ones read rows that nobody wrote."""

    def forward(self, start, end):
        if self.rows == 0:
            return super().forward(start, end)
        return self.angles[start:end].cos(), self.angles[start:end].sin()


class RotaryInSharedMemory(RotaryInABuffer):
    """The buffer that calls write to has its second row in another one, which they read."""

    def __init__(self, dim=4):
        super().__init__(dim)
        self.register_buffer("second", self.angles[1:2], persistent=False)

    def forward(self, start, end):
        cos, sin = super().forward(start, end)
        return cos + self.second, sin


class Block(nn.Module):
    def __init__(self, rotary=None, dim=8):
        super().__init__()
        self.heads, self.rotary = 2, rotary() if rotary is not None else None
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mask = None

    def causal(self, past, total):
        """Grown on demand, True where a query may look."""
        if self.mask is None or self.mask.shape[-1] < total:
            self.mask = torch.tril(torch.ones(total, total, dtype=torch.bool))
        return self.mask[past:total, :total]

    def forward(self, x, past=None):
        batch, length, dim = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        seen = 0 if past is None else past[0].shape[2]
        if self.rotary is not None:
            cos, sin = self.rotary(seen, seen + length)
            q, k = q * cos + _turned(q) * sin, k * cos + _turned(k) * sin
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~self.causal(seen, seen + length), float("-inf"))
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, dim)
        return self.out(mixed), (k, v)


class BlockWithAMaskEachTime(Block):
    """The mask is no table: only the rotary angles are kept."""

    def causal(self, past, total):
        return torch.tril(torch.ones(total, total, dtype=torch.bool))[past:]


class BlockWithABuffer(Block):
    """The mask is registered anew, as a buffer."""

    def causal(self, past, total):
        if not hasattr(self, "bias") or self.bias.size(-1) < total:
            mask = torch.tril(torch.ones(total, total, dtype=torch.bool))
            self.register_buffer("bias", mask, persistent=False)
        return self.bias[past:total, :total]


class BlockWithAMaskForSixty(Block):
    """The mask is there from the start, for no more than sixty rows: so are the calls."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        seen = torch.tril(torch.ones(60, 60, dtype=torch.bool))
        self.register_buffer("seen", seen, persistent=False)

    def causal(self, past, total):
        return self.seen[past:total, :total]


class BlockWithAMaskOfSix(Block):
    """Made for six rows by the first call, and again, as a buffer, by a call that needs more."""

    rows, is_new = 6, True

    def made(self, rows):
        return torch.full((rows, rows), float("-inf")).triu(1) == 0

    def causal(self, past, total):
        if self.is_new:
            self.is_new = False
            self.register_buffer("seen", self.made(self.rows), persistent=False)
        if total > self.rows:
            self.rows = total
            self.register_buffer("seen", self.made(total), persistent=False)
        return self.seen[past:total, :total]


class BlockWithAnotherMaskBeyond(BlockWithAMaskOfSix):
    """The larger one is another one, which a short call after a long one finds."""

    def made(self, rows):
        return torch.full((rows, rows), float("-inf")).triu(1 if rows == 6 else 2) == 0


class BlockWithAMaskForGood(Block):
    """What is beyond the first mask may be looked at."""

    def causal(self, past, total):
        if self.mask is None:
            self.mask = torch.tril(torch.ones(total, total, dtype=torch.bool))
        more = max(0, total - self.mask.shape[0])
        return F.pad(self.mask, (0, more, 0, more), value=True)[past:total, :total]


class BlockThatWarmsUp(Block):
    """The first call is another one than all later ones."""

    is_warm = False

    def forward(self, x, past=None):
        if self.is_warm:
            x = 2 * x
        self.is_warm = True
        return super().forward(x, past)


class BlockThatWarmsUpLater(Block):
    """Counts only where there is a mask already, and changes after a few such calls."""

    uses = 0

    def forward(self, x, past=None):
        if self.mask is not None:
            self.uses = min(self.uses + 1, 3)
        return super().forward(2 * x if self.uses == 3 else x, past)


class BlockThatCountsInATensor(BlockWithAMaskEachTime):
    """The count is written in place, and matters from the fourth call on only."""

    count = None

    def forward(self, x, past=None):
        if self.count is None:
            self.count = torch.zeros(())
        self.count.add_(1)
        return super().forward(torch.where(self.count > 3, 2 * x, x), past)


class Uses:
    def __init__(self):
        self.count = 0


class BlockThatCountsInAnObject(BlockWithAMaskEachTime):
    """The object is made by the first call; its count matters from the fourth call on only."""

    uses = None

    def forward(self, x, past=None):
        self.uses = Uses() if self.uses is None else self.uses
        self.uses.count = min(self.uses.count + 1, 4)
        return super().forward(2 * x if self.uses.count > 3 else x, past)


class BlockThatCountsDeepInside(BlockWithAMaskEachTime):
    """Nothing is put in another's place: a number changes in a dict of an object."""

    def __init__(self, *args):
        super().__init__(*args)
        self.uses = Uses()
        self.uses.by_name = {"block": 0}

    def forward(self, x, past=None):
        count = min(self.uses.by_name["block"] + 1, 4)
        self.uses.by_name["block"] = count
        return super().forward(2 * x if count > 3 else x, past)


class DecoderThatTellsOfItsTable(nn.Module):
    """Beside the logits, whether the mask was there already."""

    def __init__(self):
        super().__init__()
        self.decoder, self.mask = Decoder(BlockWithAMaskEachTime), None

    def forward(self, ids, past=None):
        was_there = self.mask is not None
        if not was_there:
            self.mask = torch.ones(3)
        logits, past = self.decoder(ids, past)
        return logits, past, was_there


class BlockOfTheFirstLength(Block):
    """The first call's length scales all that come after it."""

    scale = None

    def forward(self, x, past=None):
        if self.scale is None:
            self.scale = 1.0 / math.sqrt(x.shape[1])
        return super().forward(x * self.scale, past)


class Decoder(nn.Module):
    def __init__(self, block=Block, rotary=None, with_table=False, dim=8):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, dim), nn.Linear(dim, VOCAB)
        self.block, self.with_table, self.table = block(rotary), with_table, None

    def positions(self, length, dim):
        """Sinusoids, written into a table that is kept."""
        if self.table is None or self.table.shape[0] < length:
            place = torch.arange(length).float()[:, None]
            rate = torch.exp(torch.arange(0, dim, 2).float() * -(math.log(100.0) / dim))
            self.table = torch.zeros(length, dim)
            self.table[:, 0::2] = torch.sin(place * rate)
            self.table[:, 1::2] = torch.cos(place * rate)
        return self.table

    def forward(self, ids, past=None):
        x = self.embed(ids)
        if self.with_table:
            seen = 0 if past is None else past[0].shape[2]
            x = x + self.positions(seen + ids.shape[1], x.shape[-1])[seen:][: ids.shape[1]]
        y, past = self.block(x, past)
        return self.head(x + y), past


def _case(name, *args, **options):
    return ModelCase(
        name, seeded(lambda: Decoder(*args)), patterns=("P3",), **calls(tokens(VOCAB)), **options
    )


def _refused(name, *args):
    return RefusalCase(
        name,
        seeded(lambda: Decoder(*args)),
        "CaptureError",
        ("keeps state on itself", "could not be shown not to", "compute it in every call"),
        **calls(tokens(VOCAB)),
    )


TABLES: tuple[ModelCase, ...] = (
    _case("mask_grown", Block),
    _case("mask_as_a_buffer", BlockWithABuffer),
    _case("mask_of_six", BlockWithAMaskOfSix),
    _case("rotary_grown", Block, RotaryGrown, expects_proof=False),
    _case(
        "rotary_of_the_last_length",
        BlockWithAMaskEachTime,
        RotaryOfTheLastLength,
        expects_proof=False,
    ),
    _case("rotary_within_bounds", BlockWithAMaskForSixty, RotaryGrown, expects_proof=False),
    _case("rotary_in_a_buffer", BlockWithAMaskEachTime, RotaryInABuffer, expects_proof=False),
    _case("sinusoids_grown", Block, None, True, expects_proof=False),
)
REFUSED_TABLES: tuple[RefusalCase, ...] = (
    _refused("rotary_stretched_in_a_buffer", BlockWithAMaskEachTime, RotaryStretchedInABuffer),
    _refused("rotary_filled_once", BlockWithAMaskEachTime, RotaryFilledOnce),
    _refused("rotary_stretched", Block, RotaryStretched),
    _refused("another_mask_beyond", BlockWithAnotherMaskBeyond),
    _refused("mask_for_good", BlockWithAMaskForGood),
    _refused("warms_up", BlockThatWarmsUp),
    _refused("warms_up_later", BlockThatWarmsUpLater),
    _refused("counts_in_a_tensor", BlockThatCountsInATensor),
    _refused("counts_in_an_object", BlockThatCountsInAnObject),
    _refused("counts_deep_inside", BlockThatCountsDeepInside),
    _refused("of_the_first_length", BlockOfTheFirstLength),
    RefusalCase(
        "tells_of_its_table",
        seeded(DecoderThatTellsOfItsTable),
        "CaptureError",
        ("keeps state on itself",),
        **calls(tokens(VOCAB)),
    ),
)
