"""Streaming convolutions: the first call pads, later calls join what the last one kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .case import ModelCase, calls, frames, seeded, tokens


class CausalConv1d(nn.Module):
    def __init__(self, channels, kernel_size, dilation=1, groups=1):
        super().__init__()
        self.left = (kernel_size - 1) * dilation
        self.conv = nn.Conv1d(channels, channels, kernel_size, dilation=dilation, groups=groups)

    def forward(self, x, cache=None):
        if cache is None:
            x = F.pad(x, (self.left, 0))
        else:
            x = torch.cat([cache, x], dim=2)
        new_cache = x[:, :, x.size(2) - self.left :]
        return self.conv(x), new_cache


class WaveDecoder(nn.Module):
    """A stack of dilated causal convolutions, one left context each; one of kernel size 1."""

    def __init__(self, vocab=30, channels=12):
        super().__init__()
        self.embed = nn.Embedding(vocab, channels)
        shapes = ((3, 1), (3, 2), (1, 1), (2, 4))
        self.layers = nn.ModuleList([CausalConv1d(channels, k, d) for k, d in shapes])
        self.head = nn.Linear(channels, vocab)

    def forward(self, ids, conv_cache=None):
        x = self.embed(ids).transpose(1, 2)
        new_cache = []
        for i, layer in enumerate(self.layers):
            y, kept = layer(x, None if conv_cache is None else conv_cache[i])
            x = x + torch.tanh(y)
            new_cache.append(kept)
        return self.head(x.transpose(1, 2)), new_cache


class ConvolutionModule(nn.Module):
    """A conformer's convolution: pointwise, gate, depthwise over a left context, pointwise."""

    def __init__(self, channels, kernel_size=5):
        super().__init__()
        self.pointwise_conv1 = nn.Conv1d(channels, 2 * channels, 1)
        self.depthwise_conv = nn.Conv1d(channels, channels, kernel_size, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.pointwise_conv2 = nn.Conv1d(channels, channels, 1)
        self.lorder = kernel_size - 1

    def forward(self, x, cache=None):
        x = x.transpose(1, 2)
        if cache is None:
            x = nn.functional.pad(x, (self.lorder, 0), "constant", 0.0)
        else:
            assert cache.size(0) == x.size(0)
            assert cache.size(1) == x.size(1)
            x = torch.cat((cache, x), dim=2)
        new_cache = x[:, :, -self.lorder :]
        x = F.glu(self.pointwise_conv1(x), dim=1)
        x = self.depthwise_conv(x).transpose(1, 2)
        x = F.silu(self.norm(x)).transpose(1, 2)
        return self.pointwise_conv2(x).transpose(1, 2), new_cache


class StreamingAttention(nn.Module):
    def __init__(self, dim, heads=2):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, cache=None):
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)
        )
        if cache is not None:
            past_k, past_v = torch.split(cache, cache.size(-1) // 2, dim=-1)
            k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
        new_cache = torch.cat((k, v), dim=-1)
        t, s = q.size(2), k.size(2)
        mask = torch.ones(t, s, dtype=torch.bool, device=x.device).tril(s - t)
        scores = (q @ k.transpose(-1, -2) / q.size(-1) ** 0.5).masked_fill(~mask, -float("inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)), new_cache


class StreamingConformer(nn.Module):
    """Attention keys and values that grow, and convolution states that do not."""

    def __init__(self, bins=10, dim=16, depth=2):
        super().__init__()
        self.inp = nn.Linear(bins, dim)
        self.attn = nn.ModuleList([StreamingAttention(dim) for _ in range(depth)])
        self.conv = nn.ModuleList([ConvolutionModule(dim) for _ in range(depth)])
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(2 * depth)])
        self.out = nn.Linear(dim, bins)

    def forward(self, xs, att_cache=None, cnn_cache=None):
        x = self.inp(xs)
        new_att, new_cnn = [], []
        for i, (attn, conv) in enumerate(zip(self.attn, self.conv)):
            y, a = attn(self.norms[2 * i](x), att_cache[i] if att_cache is not None else None)
            x = x + y
            y, c = conv(self.norms[2 * i + 1](x), cnn_cache[i] if cnn_cache is not None else None)
            x = x + y
            new_att.append(a)
            new_cnn.append(c)
        return self.out(x), torch.stack(new_att), torch.stack(new_cnn)


def _conformer_calls(draw):
    def prefill(batch, query, generator):
        return (draw(batch, 0, query, generator),), {}

    def step(outputs, batch, past, query, generator):
        return (draw(batch, past, query, generator), *outputs[1:]), {}

    return {"prefill": prefill, "step": step}


class ShortConv(nn.Module):
    """Padding by the convolution itself, cut at the end; the state is in front on later calls."""

    def __init__(self, dim, kernel_size=4):
        super().__init__()
        self.kernel_size = kernel_size
        self.conv = nn.Conv1d(dim, dim, kernel_size, groups=dim, padding=kernel_size - 1)

    def forward(self, x, state=None):
        seqlen = x.shape[-1]
        if state is None:
            # the last inputs, zeros in front where there are too few
            new_state = F.pad(x, (self.kernel_size - 1 - seqlen, 0))
            y = self.conv(x)[..., :seqlen]
        else:
            x = torch.cat([state, x], dim=-1)
            new_state = x[..., -(self.kernel_size - 1) :]
            y = F.conv1d(x, self.conv.weight, self.conv.bias, groups=x.shape[1])
        return F.silu(y), new_state


class GatedConvLM(nn.Module):
    """Short convolutions between gates, in the manner of long-convolution language models."""

    def __init__(self, vocab=27, dim=12, depth=2):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.in_proj = nn.ModuleList([nn.Linear(dim, 3 * dim) for _ in range(depth)])
        self.conv = nn.ModuleList([ShortConv(dim) for _ in range(depth)])
        self.out_proj = nn.ModuleList([nn.Linear(dim, dim) for _ in range(depth)])
        self.head = nn.Linear(dim, vocab, bias=False)

    def forward(self, ids, state=None):
        x = self.embed(ids)
        states = []
        for i, conv in enumerate(self.conv):
            b, c, u = self.in_proj[i](x).transpose(1, 2).chunk(3, dim=1)
            y, s = conv(b * u, None if state is None else state[i])
            x = x + self.out_proj[i]((c * y).transpose(1, 2))
            states.append(s)
        return self.head(x), tuple(states)


class TokenShift(nn.Module):
    """Each token mixed with the one before: zeros before the first, the last one on later calls."""

    def __init__(self, vocab=25, dim=12, depth=2):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.mix = nn.ParameterList([nn.Parameter(torch.empty(1, 1, dim)) for _ in range(depth)])
        self.key = nn.ModuleList([nn.Linear(dim, 2 * dim, bias=False) for _ in range(depth)])
        self.value = nn.ModuleList([nn.Linear(2 * dim, dim, bias=False) for _ in range(depth)])
        self.shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.head = nn.Linear(dim, vocab, bias=False)

    def forward(self, ids, state=None):
        x = self.embed(ids)
        kept = []
        for i in range(len(self.key)):
            h = F.layer_norm(x, x.shape[-1:])
            if state is None:
                before = self.shift(h)
            else:
                before = torch.cat([state[i].unsqueeze(1), h[:, :-1]], dim=1)
            kept.append(h[:, -1])
            mixed = h * self.mix[i] + before * (1 - self.mix[i])
            x = x + self.value[i](torch.relu(self.key[i](mixed)) ** 2)
        return self.head(x), kept


class FrameStack(nn.Module):
    """Two-dimensional convolutions over time and bins, a strided view of the bins, time padded."""

    def __init__(self, bins=8, channels=6):
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, (3, 3), padding=(0, 1))
        self.conv2 = nn.Conv2d(channels, channels, (2, 3), padding=(0, 1))
        self.out = nn.Linear(channels * bins, bins)

    def forward(self, xs, cache=None):
        x = xs.unsqueeze(1)
        if cache is None:
            x = F.pad(x, (0, 0, 2, 0))
        else:
            x = torch.cat((cache[0], x), dim=2)
        first = x[:, :, -2:]
        x = torch.relu(self.conv1(x))
        x = F.pad(x, (0, 0, 1, 0)) if cache is None else torch.cat((cache[1], x), dim=2)
        second_ = x[:, :, -1:]
        x = torch.relu(self.conv2(x)).transpose(1, 2).flatten(2)
        return self.out(x), (first, second_)


class PaddedWithMinus(nn.Module):
    """A running maximum over the last frames, padded with a number below all of them."""

    def __init__(self, bins=8, dim=12, span=3):
        super().__init__()
        self.inp, self.out, self.span = nn.Linear(bins, dim), nn.Linear(dim, bins), span

    def forward(self, xs, cache=None):
        x = self.inp(xs).transpose(1, 2)
        if cache is None:
            x = F.pad(x, (self.span - 1, 0), value=-1e30)
        else:
            x = torch.cat((cache, x), dim=-1)
        kept = x[..., -(self.span - 1) :]
        return self.out(x.unfold(-1, self.span, 1).amax(-1).transpose(1, 2)), kept


CASES = (
    ModelCase(
        "dilated_causal_convolutions",
        seeded(WaveDecoder),
        **calls(tokens(30)),
        patterns=("P8",),
    ),
    ModelCase(
        "conformer_attention_and_convolution_states",
        seeded(StreamingConformer),
        **_conformer_calls(frames(10)),
        patterns=("P1", "P8"),
        example_inputs=(torch.linspace(-1, 1, 50).view(1, 5, 10),),
    ),
    ModelCase(
        "convolution_that_pads_itself",
        seeded(GatedConvLM, scale=0.4),
        **calls(tokens(27), cache="state"),
        patterns=("P8",),
    ),
    ModelCase(
        "token_shift",
        seeded(TokenShift),
        **calls(tokens(25), cache="state"),
        patterns=("P8",),
    ),
    ModelCase(
        "convolutions_over_time_and_bins",
        seeded(FrameStack),
        **calls(frames(8)),
        patterns=("P8",),
        example_inputs=(torch.linspace(-1, 1, 40).view(1, 5, 8),),
    ),
    ModelCase(
        "maximum_padded_with_a_low_number",
        seeded(PaddedWithMinus),
        **calls(frames(8)),
        patterns=("P8",),
        example_inputs=(torch.linspace(-1, 1, 40).view(1, 5, 8),),
    ),
)
