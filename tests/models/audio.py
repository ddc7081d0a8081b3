"""Decoders of music, speech and sound: several codebooks, several stacks, time anywhere."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .case import LONGEST, ModelCase, calls, seeded


class StreamingMultiheadAttention(nn.Module):
    def __init__(self, embed_dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=False)

    def forward(self, x, past_key=None, past_value=None):
        projected = F.linear(x, self.in_proj_weight)
        packed = projected.unflatten(-1, (3, self.num_heads, -1))
        q, k, v = packed.unbind(dim=2)
        if past_key is not None:
            assert past_value is not None
            k = torch.cat([past_key, k], dim=1)
            v = torch.cat([past_value, v], dim=1)
        q_t, k_t = q.shape[1], k.shape[1]
        queries_pos = torch.arange(k_t - q_t, k_t, device=q.device).view(-1, 1)
        keys_pos = torch.arange(k_t, device=q.device).view(1, -1)
        delta = queries_pos - keys_pos
        valid = torch.zeros_like(delta, dtype=q.dtype).masked_fill(delta < 0, float("-inf"))
        w = torch.einsum("bqhc,bkhc->bhqk", q * q.shape[-1] ** -0.5, k) + valid
        x = torch.einsum("bhqk,bkhc->bqhc", torch.softmax(w, dim=-1), v)
        return self.out_proj(x.flatten(2)), k, v


def create_sin_embedding(positions, dim, max_period=10000.0):
    half_dim = dim // 2
    adim = torch.arange(half_dim, device=positions.device, dtype=positions.dtype).view(1, 1, -1)
    phase = positions / (max_period ** (adim / (half_dim - 1)))
    return torch.cat([torch.cos(phase), torch.sin(phase)], dim=-1)


class MusicLM(nn.Module):
    """Codes of shape (B, K, S): one embedding and one head for each codebook."""

    def __init__(self, n_q=3, card=20, dim=16, num_heads=2, num_layers=2):
        super().__init__()
        self.n_q = n_q
        self.emb = nn.ModuleList([nn.Embedding(card + 1, dim) for _ in range(n_q)])
        self.transformer = nn.ModuleList(
            [StreamingMultiheadAttention(dim, num_heads) for _ in range(num_layers)]
        )
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(num_layers)])
        self.linears = nn.ModuleList([nn.Linear(dim, card, bias=False) for _ in range(n_q)])

    def forward(self, sequence, past=None):
        _, K, T = sequence.shape
        assert self.n_q == K, f"Sequence shape {sequence.shape} must match {self.n_q} codebooks"
        offset = past[0][0].shape[1] if past is not None else 0
        x = sum([self.emb[k](sequence[:, k]) for k in range(K)])
        positions = torch.arange(T, device=x.device).view(1, -1, 1).to(x.dtype)
        x = x + create_sin_embedding(positions + offset, x.shape[-1])
        present = []
        for index, (layer, norm) in enumerate(zip(self.transformer, self.norms)):
            past_key, past_value = past[index] if past is not None else (None, None)
            y, k, v = layer(norm(x), past_key, past_value)
            x = x + y
            present.append((k, v))
        logits = torch.stack([self.linears[k](x) for k in range(K)], dim=1)  # [B, K, T, card]
        return logits, present


def _codes(batch, past, query, generator):
    return torch.randint(20, (batch, 3, LONGEST), generator=generator)[..., past : past + query]


class Stack(nn.Module):
    def __init__(self, dim, depth, heads=2):
        super().__init__()
        self.heads = heads
        self.qkv = nn.ModuleList([nn.Linear(dim, 3 * dim, bias=False) for _ in range(depth)])
        self.out = nn.ModuleList([nn.Linear(dim, dim, bias=False) for _ in range(depth)])
        self.rel = nn.Parameter(torch.empty(heads, 64))

    def forward(self, x, past=None):
        present = ()
        for i, (qkv, out) in enumerate(zip(self.qkv, self.out)):
            h = F.rms_norm(x, x.shape[-1:], eps=1e-6)
            q, k, v = (
                t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv(h).chunk(3, -1)
            )
            if past is not None:
                k, v = torch.cat((past[i][0], k), 2), torch.cat((past[i][1], v), 2)
            present += ((k, v),)
            m = k.size(2)
            lag = torch.arange(m - q.size(2), m)[:, None] - torch.arange(m)
            bias = self.rel[:, lag.clamp(min=0)].masked_fill(lag < 0, float("-inf"))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            x = x + out(y.transpose(1, 2).flatten(2))
        return x, present


class TextToSpeechLM(nn.Module):
    """A backbone and a shallower stack on top of it, each with its own caches, nested in a pair."""

    def __init__(self, text_vocab=30, audio_vocab=25, dim=16):
        super().__init__()
        self.text_emb, self.audio_emb = (
            nn.Embedding(text_vocab, dim),
            nn.Embedding(audio_vocab, dim),
        )
        self.backbone, self.acoustic = Stack(dim, 3), Stack(dim, 1)
        self.text_head, self.audio_head = nn.Linear(dim, text_vocab), nn.Linear(dim, audio_vocab)

    def forward(self, text, audio, past=None):
        if past is not None:
            backbone_past, acoustic_past = past
        else:
            backbone_past = acoustic_past = None
        h, backbone_present = self.backbone(self.text_emb(text), backbone_past)
        a, acoustic_present = self.acoustic(h + self.audio_emb(audio), acoustic_past)
        return self.text_head(h), (backbone_present, acoustic_present), self.audio_head(a)


def _speech_calls():
    def drawn(batch, past, query, generator):
        both = torch.randint(25, (2, batch, LONGEST), generator=generator)
        return tuple(both[:, :, past : past + query].unbind(0))

    def prefill(batch, query, generator):
        return drawn(batch, 0, query, generator), {}

    def step(outputs, batch, past, query, generator):
        return (*drawn(batch, past, query, generator), outputs[1]), {}

    return {"prefill": prefill, "step": step}


class SpectrogramAttention(nn.Module):
    def __init__(self, bins, dim):
        super().__init__()
        self.scale = math.sqrt(dim)
        self.query_conv = nn.Conv2d(1, dim, (bins, 1))
        self.key_conv = nn.Conv2d(1, dim, (bins, 1))
        self.value_conv = nn.Conv2d(1, bins, (bins, 1))

    def forward(self, spec, cache=None):
        # spec: (batch, 1, bins, time); convolutions span the bins and one frame
        q, k, v = self.query_conv(spec), self.key_conv(spec), self.value_conv(spec)
        q, k, v = q.squeeze(2), k.squeeze(2), v.squeeze(2)
        if cache is not None:
            k = torch.cat((cache[0], k), dim=-1)
            v = torch.cat((cache[1], v), dim=-1)
        t, s = q.shape[-1], k.shape[-1]
        energy = torch.bmm(q.transpose(1, 2), k) / self.scale
        causal = torch.ones(t, s, dtype=torch.bool, device=spec.device).tril(diagonal=s - t)
        weights = energy.masked_fill(~causal, -1e9).softmax(dim=2)
        return torch.bmm(v, weights.transpose(1, 2)).unsqueeze(1), (k, v)


class SpectrogramFiller(nn.Module):
    """Time is the last axis of everything, the cache included."""

    def __init__(self, bins=8, dim=12, depth=2):
        super().__init__()
        self.layers = nn.ModuleList([SpectrogramAttention(bins, dim) for _ in range(depth)])
        self.mix = nn.Conv2d(1, 1, 1)

    def forward(self, spec, cache=None):
        x, new_cache = spec.unsqueeze(1), []
        for i, layer in enumerate(self.layers):
            y, kv = layer(x, cache[i] if cache else None)
            x = x + torch.tanh(y)
            new_cache.append(kv)
        return self.mix(x).squeeze(1), new_cache


def _spectrogram(batch, past, query, generator):
    return torch.randn(batch, 8, LONGEST, generator=generator)[..., past : past + query]


CASES = (
    ModelCase(
        "music_codebooks",
        seeded(MusicLM),
        **calls(_codes),
        patterns=("P1", "P2"),
        example_inputs=(torch.arange(15).view(1, 3, 5),),
    ),
    ModelCase(
        "two_stacks_in_nested_tuples",
        seeded(TextToSpeechLM),
        **_speech_calls(),
        patterns=("P1",),
        example_inputs={
            "text": torch.tensor([[1, 2, 3], [4, 5, 6]]),
            "audio": torch.tensor([[7, 8, 9], [3, 2, 1]]),
        },
    ),
    ModelCase(
        "time_on_the_last_axis",
        seeded(SpectrogramFiller),
        **calls(_spectrogram, cache="cache"),
        patterns=("P1",),
        example_inputs=(torch.linspace(-2, 2, 48).view(1, 8, 6),),
    ),
)
