"""Decoders whose later calls compute something else than their first call: no cache is neutral."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .case import RefusalCase, calls, seeded, tokens


class Decoder(nn.Module):
    """A sound decoder; each model below departs from it in one place."""

    def __init__(self, vocab=33, dim=16, heads=2, depth=2):
        super().__init__()
        self.dim, self.heads = dim, heads
        self.emb, self.pos = nn.Embedding(vocab, dim), nn.Embedding(64, dim)
        self.qkv = nn.ModuleList([nn.Linear(dim, 3 * dim) for _ in range(depth)])
        self.proj = nn.ModuleList([nn.Linear(dim, dim) for _ in range(depth)])
        self.up = nn.ModuleList([nn.Linear(dim, 2 * dim) for _ in range(depth)])
        self.down = nn.ModuleList([nn.Linear(2 * dim, dim) for _ in range(depth)])
        self.norm = nn.Parameter(torch.ones(dim))
        self.head = nn.Linear(dim, vocab)

    def embed(self, ids, offset, past):
        positions = torch.arange(offset, offset + ids.shape[1], device=ids.device)
        return self.emb(ids) + self.pos(positions)

    def heads_of(self, i, x):
        qkv = self.qkv[i](x).unflatten(-1, (3, self.heads, -1))
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def join(self, k, v, past):
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        return k, v

    def visible(self, n, m, past):
        return torch.ones(n, m, dtype=torch.bool).tril(m - n)

    def attend(self, i, x, past):
        q, k, v = self.heads_of(i, x)
        k, v = self.join(k, v, past)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~self.visible(*scores.shape[-2:], past), -torch.inf)
        return self.proj[i]((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)), (k, v)

    def feed_forward(self, i, x, past):
        return self.down[i](F.gelu(self.up[i](x)))

    def finish(self, x, past):
        return self.head(F.rms_norm(x, (self.dim,), self.norm, 1e-6))

    def forward(self, ids, past=None):
        offset = past[0][0].shape[2] if past is not None else 0
        x = self.embed(ids, offset, past)
        present = []
        for i in range(len(self.qkv)):
            layer_past = past[i] if past is not None else None
            y, kv = self.attend(i, x, layer_past)
            x = x + y
            x = x + self.feed_forward(i, x, layer_past)
            present.append(kv)
        return self.finish(x, past), present


class AnotherScale(Decoder):
    """The fused decode path scales by the width of the model, not by that of a head."""

    def attend(self, i, x, past):
        q, k, v = self.heads_of(i, x)
        if past is not None:
            k, v = self.join(k, v, past)
            scores = q @ k.mT / math.sqrt(self.dim)
        else:
            scores = q @ k.mT / math.sqrt(self.dim // self.heads)
        scores = scores.masked_fill(~self.visible(*scores.shape[-2:], past), -torch.inf)
        return self.proj[i]((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)), (k, v)


class AnotherEpsilon(Decoder):
    """The decode path was ported with the default epsilon of another framework."""

    def finish(self, x, past):
        if past is None:
            h = F.rms_norm(x, (self.dim,), self.norm, 1e-6)
        else:
            h = F.rms_norm(x, (self.dim,), self.norm, 1e-5)
        return self.head(h)


class AnotherActivation(Decoder):
    """The tanh approximation of GELU on later calls."""

    def feed_forward(self, i, x, past):
        h = self.up[i](x)
        h = F.gelu(h, approximate="tanh") if past is not None else F.gelu(h)
        return self.down[i](h)


class ExtraBias(Decoder):
    """A bias for tokens that the model produced itself."""

    def __init__(self):
        super().__init__()
        self.generated = nn.Parameter(torch.full((16,), 0.3))

    def embed(self, ids, offset, past):
        x = super().embed(ids, offset, past)
        if past is not None:
            x = x + self.generated
        return x


class RoundedKeys(Decoder):
    """Later calls round their keys to bfloat16 before they are joined."""

    def join(self, k, v, past):
        if past is not None:
            k, v = k.bfloat16().to(k.dtype), v.bfloat16().to(v.dtype)
        return super().join(k, v, past)


class UnshiftedPositions(Decoder):
    """Later calls count positions from one, the first call from zero."""

    def embed(self, ids, offset, past):
        start = 0 if past is None else offset + 1
        return self.emb(ids) + self.pos(torch.arange(start, start + ids.shape[1]))


class NewestFirst(Decoder):
    """Later calls put new keys in front; the first call leaves the newest key at the end."""

    def visible(self, n, m, past):
        rows, columns = torch.arange(n)[:, None], torch.arange(m)
        return columns <= rows if past is None else columns >= n - 1 - rows

    def join(self, k, v, past):
        if past is not None:
            k = torch.cat((k.flip(2), past[0]), dim=2)
            v = torch.cat((v.flip(2), past[1]), dim=2)
        return k, v


class WindowOffByOne(Decoder):
    """The window holds four positions on the first call, and five on later calls."""

    def visible(self, n, m, past):
        rows, columns = torch.arange(m - n, m)[:, None], torch.arange(m)
        if past is None:
            near = rows - columns < 4
        else:
            near = rows - columns <= 4
        return near & (columns <= rows)


class UnnormedDecode(Decoder):
    """The last norm was forgotten in the decode path."""

    def forward_decode(self, x):
        return self.head(x * self.norm)

    def forward_prefill(self, x):
        return self.head(F.rms_norm(x, (self.dim,), self.norm, 1e-6))

    def finish(self, x, past):
        return self.forward_prefill(x) if past is None else self.forward_decode(x)


class SkippedLayer(Decoder):
    """Later calls save time: the last feed-forward layer is left out."""

    def feed_forward(self, i, x, past):
        if past is not None and i == len(self.up) - 1:
            return torch.zeros_like(x)
        return self.down[i](F.gelu(self.up[i](x)))


class SummaryOfThePast(Decoder):
    """The mean over the past is added to each new token; a mean of nothing is no number."""

    def embed(self, ids, offset, past):
        x = super().embed(ids, offset, past)
        if past is not None:
            x = x + past[0][1].mean(dim=2).flatten(1).unsqueeze(1)
        return x


class MinimumOverTime(Decoder):
    """Later calls subtract the smallest key that was seen, which the first call does not."""

    def join(self, k, v, past):
        if past is not None:
            k, v = super().join(k, v, past)
            k = k - past[0].amin(dim=2, keepdim=True)
        return k, v


class UnjoinedValues(Decoder):
    """Keys grow, and values are averaged into the values of the past."""

    def attend(self, i, x, past):
        q, k, v = self.heads_of(i, x)
        state = (k.mT @ v) / k.shape[2]
        if past is not None:
            k = torch.cat((past[0], k), dim=2)
            state = 0.5 * past[1] + 0.5 * state
        return self.proj[i]((q @ state).transpose(1, 2).flatten(2)), (k, state)


class DoublesAPossibleView(Decoder):
    """Doubles the transposed hidden states in place: of one token, these are the states."""

    def embed(self, ids, offset, past):
        x = super().embed(ids, offset, past)
        turned = x.transpose(0, 1).contiguous()
        turned.mul_(2)
        return x + turned.transpose(0, 1)


def _refused(name, build, *says):
    return RefusalCase(
        name,
        seeded(build),
        error="UnsupportedBranchError",
        says=says,
        example_inputs=(torch.tensor([[3, 1, 4], [1, 5, 9]]),),
        **calls(tokens(33), cache="past"),
    )


REFUSALS = (
    RefusalCase(
        "write_to_a_copy_that_may_be_a_view",
        seeded(DoublesAPossibleView),
        error="CaptureError",
        says=("a copy at some sizes and not at others", "turned.mul_(2)", "x.clone()"),
        example_inputs=(torch.tensor([[3, 1, 4], [1, 5, 9]]),),
    ),
    _refused("another_scale", AnotherScale, "math.sqrt(self.dim", "refused_branches.py"),
    _refused("another_epsilon", AnotherEpsilon, "F.rms_norm(x, (self.dim,)"),
    _refused("another_activation", AnotherActivation, "F.gelu(h"),
    _refused("extra_bias", ExtraBias, "x + self.generated"),
    _refused("rounded_keys", RoundedKeys, "bfloat16()"),
    _refused("positions_off_by_one", UnshiftedPositions, "start"),
    _refused("newest_first", NewestFirst, "refused_branches.py"),
    _refused("window_off_by_one", WindowOffByOne, "rows - columns <"),
    _refused("norm_forgotten_in_decode", UnnormedDecode, "forward_"),
    _refused("layer_skipped_in_decode", SkippedLayer, "feed_forward"),
    _refused("mean_of_the_past", SummaryOfThePast, ".mean(dim=2)"),
    _refused("minimum_of_the_past", MinimumOverTime, ".amin(dim=2"),
    _refused("averaged_state", UnjoinedValues, "0.5 * past[1]"),
)
