"""Decoders whose arithmetic depends on a size, a value, a count of calls or chance.

A threshold may be refused; it may also be kept, as the domain of what was rewritten or in one graph
that is right on both sides.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .case import LONGEST, RefusalCase, calls, seeded, tokens
from .gpt import GPTConfig, NanoGPT
from .refused_branches import Decoder


class LogScaledQueries(Decoder):
    """Queries grow with the logarithm of the length, but only beyond the length of training."""

    train_length = 16

    def heads_of(self, i, x):
        q, k, v = super().heads_of(i, x)
        return q * self.log_scale, k, v

    def forward(self, ids, past=None):
        past_len = past[0][0].shape[2] if past is not None else 0
        self.log_scale = 1.0
        if past_len > self.train_length:
            self.log_scale = math.log(past_len) / math.log(self.train_length)
        return super().forward(ids, past)


class AnotherScaleForLongPasts(Decoder):
    def attend(self, i, x, past):
        q, k, v = self.heads_of(i, x)
        k, v = self.join(k, v, past)
        scale = q.shape[-1] ** -0.5
        if k.shape[2] > 6:
            scale = scale * 0.5
        scores = q @ k.mT * scale
        scores = scores.masked_fill(~self.visible(*scores.shape[-2:], past), -torch.inf)
        return self.proj[i]((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)), (k, v)


class SingleSentencePath(Decoder):
    """A batch of one takes a path that was tuned by itself."""

    def feed_forward(self, i, x, past):
        if x.shape[0] == 1:
            return self.down[i](F.relu(self.up[i](x)))
        return super().feed_forward(i, x, past)


class SingleTokenPath(Decoder):
    """One token takes a simpler path, which forgets to scale; on the first call, too."""

    def attend(self, i, x, past):
        if x.shape[1] == 1:
            q, k, v = self.heads_of(i, x)
            k, v = self.join(k, v, past)
            scores = q @ k.mT
            return self.proj[i]((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)), (k, v)
        return super().attend(i, x, past)


class EmptyHistoryPath(nn.Module):
    """An empty history is asked for, and is not neutral: without one the keys are not rotated."""

    def __init__(self, vocab=31, dim=16):
        super().__init__()
        self.emb = nn.Embedding(vocab, dim)
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, vocab)

    def forward(self, ids, past):
        x = self.emb(ids)
        if past.shape[1] == 0:
            seen = x
        else:
            seen = torch.cat([past, x], dim=1)
            seen = torch.roll(seen, 1, dims=-1)
        k, v = self.kv(seen).chunk(2, dim=-1)
        n, m = x.shape[1], seen.shape[1]
        hidden = torch.ones(n, m, dtype=torch.bool).triu(m - n + 1)
        scores = (self.q(x) @ k.mT / 4).masked_fill(hidden, -1e9)
        return self.out(scores.softmax(-1) @ v), torch.cat([past, x], dim=1)


def _history_calls():
    later = calls(tokens(31))

    def prefill(batch, query, generator):
        ids = torch.randint(31, (batch, LONGEST), generator=generator)[:, :query]
        return (ids, torch.zeros(batch, 0, 16)), {}

    return {"prefill": prefill, "step": later["step"]}


class DynamicRope(Decoder):
    """Dynamic NTK scaling: the base of the rotation changes with a length beyond the limit."""

    def rotate(self, x, offset, total):
        base = 10000.0
        if total > 7:
            base = base * (2.0 * total / 7 - 1.0) ** (x.shape[-1] / (x.shape[-1] - 2))
        half = x.shape[-1] // 2
        angle = torch.arange(offset, offset + x.shape[2])[:, None] / base ** (
            torch.arange(half) / half
        )
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)

    def attend(self, i, x, past):
        q, k, v = self.heads_of(i, x)
        offset = past[0].shape[2] if past is not None else 0
        total = offset + x.shape[1]
        q, k = self.rotate(q, offset, total), self.rotate(k, offset, total)
        k, v = self.join(k, v, past)
        mask = self.visible(x.shape[1], total, past)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj[i](y.transpose(1, 2).flatten(2)), (k, v)


class LastLogitsOnly(Decoder):
    """All logits on the first call, and on later calls those of the last token only."""

    def finish(self, x, past):
        if past is not None:
            x = x[:, -1:]
        return super().finish(x, past)


class EightBitCache(Decoder):
    """Keys and values are kept as int8, and turned back when they are read."""

    def attend(self, i, x, past):
        q, k, v = self.heads_of(i, x)
        kept = tuple((t * 32).round().clamp(-128, 127).to(torch.int8) for t in (k, v))
        if past is not None:
            k = torch.cat((past[0].to(k.dtype) / 32, k), dim=2)
            v = torch.cat((past[1].to(v.dtype) / 32, v), dim=2)
            kept = tuple(torch.cat(pair, dim=2) for pair in zip(past, kept))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~self.visible(*scores.shape[-2:], past), -torch.inf)
        return self.proj[i]((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)), kept


class StopsAtEndOfText(Decoder):
    """A branch on the values of the tokens."""

    def finish(self, x, past):
        logits = super().finish(x, past)
        if (logits.argmax(-1) == 0).all():
            logits = logits - 1.0
        return logits


class NoisyEmbeddings(Decoder):
    """Noise is added in eval mode, too."""

    def embed(self, ids, offset, past):
        x = super().embed(ids, offset, past)
        return x + 0.1 * torch.randn_like(x)


class CountsItsCalls(Decoder):
    """The temperature falls with each call, counted on the module."""

    def __init__(self):
        super().__init__()
        self.num_calls = 0

    def finish(self, x, past):
        self.num_calls += 1
        return super().finish(x, past) / (1.0 + 0.25 * self.num_calls)


class DropsOutAlways(Decoder):
    """`F.dropout` without its `training` argument drops in eval mode, too."""

    def feed_forward(self, i, x, past):
        return F.dropout(super().feed_forward(i, x, past), 0.2)


def in_training():
    return seeded(lambda: NanoGPT(GPTConfig(dropout=0.2)))().train()


EXAMPLE = (torch.tensor([[3, 1, 4], [1, 5, 9]]),)


def _threshold(
    name, build, *says, drawn=None, example_inputs=EXAMPLE, error="UnsupportedBranchError"
):
    return RefusalCase(
        name,
        seeded(build),
        error=error,
        says=says,
        example_inputs=example_inputs,
        or_correct=True,
        **(drawn or calls(tokens(33), cache="past")),
    )


REFUSALS = (
    # what it leaves on the module is as good a reason as the threshold behind it
    _threshold("log_scaled_queries", LogScaledQueries, "log_scale", error="CacheFreeError"),
    _threshold("another_scale_for_long_pasts", AnotherScaleForLongPasts, "k.shape[2] > 6"),
    _threshold("batch_of_one", SingleSentencePath, "x.shape[0] == 1"),
    _threshold("one_token", SingleTokenPath, "x.shape[1] == 1"),
    _threshold(
        "empty_history",
        EmptyHistoryPath,
        "seen = torch.cat([past, x], dim=1)",
        drawn=_history_calls(),
        example_inputs=(EXAMPLE[0], torch.zeros(2, 0, 16)),
    ),
    _threshold("dynamic_rope", DynamicRope, "total > 7"),
    _threshold("last_logits_only", LastLogitsOnly, "x[:, -1:]"),
    _threshold("eight_bit_cache", EightBitCache, "past"),
    RefusalCase(
        "branch_on_values",
        seeded(StopsAtEndOfText),
        error="CaptureError",
        says=("if (logits.argmax(-1) == 0).all():", "refused_regimes.py"),
        example_inputs=EXAMPLE,
    ),
    RefusalCase(
        "noise_in_eval_mode",
        seeded(NoisyEmbeddings),
        error="CacheFreeError",
        says=("torch.randn_like(x)",),
        example_inputs=EXAMPLE,
    ),
    RefusalCase(
        "dropout_in_eval_mode",
        seeded(DropsOutAlways),
        error="CacheFreeError",
        says=("F.dropout(",),
        example_inputs=EXAMPLE,
    ),
    RefusalCase(
        "counter_on_the_module",
        seeded(CountsItsCalls),
        error="CacheFreeError",
        says=("num_calls",),
        example_inputs=EXAMPLE,
    ),
    RefusalCase("training_with_dropout", in_training, error="CacheFreeError", says=("training",)),
)
