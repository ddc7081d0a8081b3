"""Decoders for which something else than None stands for "no cache yet"."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .case import ModelCase, calls, frames, seeded, tokens


class RelPositionMultiHeadedAttention(nn.Module):
    def __init__(self, n_head, n_feat):
        super().__init__()
        self.d_k = n_feat // n_head
        self.h = n_head
        self.linear_q = nn.Linear(n_feat, n_feat)
        self.linear_k = nn.Linear(n_feat, n_feat)
        self.linear_v = nn.Linear(n_feat, n_feat)
        self.linear_pos = nn.Linear(n_feat, n_feat, bias=False)
        self.linear_out = nn.Linear(n_feat, n_feat)

    def forward(self, x, pos_emb, cache):
        n_batch = x.size(0)
        q = self.linear_q(x).view(n_batch, -1, self.h, self.d_k).transpose(1, 2)
        k = self.linear_k(x).view(n_batch, -1, self.h, self.d_k).transpose(1, 2)
        v = self.linear_v(x).view(n_batch, -1, self.h, self.d_k).transpose(1, 2)
        if cache.size(0) > 0:
            key_cache, value_cache = torch.split(cache, cache.size(-1) // 2, dim=-1)
            k = torch.cat([key_cache, k], dim=2)
            v = torch.cat([value_cache, v], dim=2)
        new_cache = torch.cat((k, v), dim=-1)
        p = self.linear_pos(pos_emb).view(1, -1, self.h, self.d_k).transpose(1, 2)
        scores = torch.matmul(q, (k + p).transpose(-2, -1)) / math.sqrt(self.d_k)
        t1, t2 = scores.shape[-2:]
        chunk_mask = torch.ones(t1, t2, device=x.device, dtype=torch.bool).tril(t2 - t1)
        attn = scores.masked_fill(~chunk_mask, -float("inf")).softmax(dim=-1)
        y = torch.matmul(attn, v).transpose(1, 2).contiguous().view(n_batch, -1, self.h * self.d_k)
        return self.linear_out(y), new_cache


class StreamingEncoder(nn.Module):
    """WeNet's `forward_chunk`: `torch.zeros((0, 0, 0, 0))` stands for an absent cache."""

    def __init__(self, input_size=10, output_size=16, attention_heads=2, num_blocks=2):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(input_size, output_size), nn.LayerNorm(output_size))
        self.encoders = nn.ModuleList(
            [
                RelPositionMultiHeadedAttention(attention_heads, output_size)
                for _ in range(num_blocks)
            ]
        )
        self.after_norm = nn.LayerNorm(output_size)
        position = torch.arange(0, 64, dtype=torch.float32).unsqueeze(1)
        div_term = torch.exp(torch.arange(0, output_size, 2) * -(math.log(1e4) / output_size))
        pe = torch.cat([torch.sin(position * div_term), torch.cos(position * div_term)], dim=-1)
        self.register_buffer("pe", pe.unsqueeze(0))

    def forward(self, xs, att_cache: torch.Tensor = torch.zeros((0, 0, 0, 0, 0))):
        xs = self.embed(xs)
        elayers, cache_t1 = att_cache.size(0), att_cache.size(3)
        pos_emb = self.pe[:, : cache_t1 + xs.size(1)]
        r_att_cache = []
        for i, layer in enumerate(self.encoders):
            # shape(att_cache[i]) is (b, head, cache_t1, d_k * 2)
            cache = att_cache[i] if elayers > 0 else att_cache
            y, new_att_cache = layer(xs, pos_emb, cache)
            xs = xs + y
            r_att_cache.append(new_att_cache.unsqueeze(0))
        return self.after_norm(xs), torch.cat(r_att_cache, dim=0)


class FrameDecoder(nn.Module):
    """An autoregressive mel decoder: float frames in, `past=()` where nothing was decoded yet."""

    def __init__(self, n_mels=8, dim=16, heads=2, depth=2):
        super().__init__()
        self.heads = heads
        self.prenet = nn.Sequential(nn.Linear(n_mels, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.to_qkv = nn.ModuleList([nn.Linear(dim, dim * 3) for _ in range(depth)])
        self.to_out = nn.ModuleList([nn.Linear(dim, dim) for _ in range(depth)])
        self.mel_out, self.stop_out = nn.Linear(dim, n_mels), nn.Linear(dim, 1)

    def forward(self, mel: torch.Tensor, past: tuple = ()):
        x = self.prenet(mel)
        B, T, C = x.shape
        present = []
        for i in range(len(self.to_qkv)):
            h = F.layer_norm(x, (C,))
            q, k, v = self.to_qkv[i](h).view(B, T, self.heads, -1).transpose(1, 2).chunk(3, -1)
            if len(past) > 0:
                pk, pv = past[2 * i], past[2 * i + 1]
                k, v = torch.cat((pk, k), -2), torch.cat((pv, v), -2)
            present += [k, v]
            n = k.size(-2)
            bias = -0.5 * (torch.arange(n - T, n)[:, None] - torch.arange(n)[None]).abs()
            bias = bias.masked_fill(torch.ones(T, n, dtype=torch.bool).triu(n - T + 1), -1e9)
            att = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(C) + bias, dim=-1)
            x = x + self.to_out[i]((att @ v).transpose(1, 2).reshape(B, T, C))
        return self.mel_out(x), torch.sigmoid(self.stop_out(x)), tuple(present)


class FlatHistoryTransformer(nn.Module):
    """A rank-1 `torch.empty(0)` for each layer, tested with `numel()`."""

    def __init__(self, vocab=30, dim=16, depth=2):
        super().__init__()
        self.emb = nn.Embedding(vocab, dim)
        self.pos = nn.Embedding(64, dim)
        self.kv = nn.ModuleList([nn.Linear(dim, 2 * dim) for _ in range(depth)])
        self.q = nn.ModuleList([nn.Linear(dim, dim) for _ in range(depth)])
        self.logits = nn.Linear(dim, vocab)

    def forward(self, token, history=None):
        if history is None:
            history = [torch.empty(0)] * len(self.kv)
        start = history[0].shape[1] if history[0].numel() > 0 else 0
        x = self.emb(token) + self.pos(torch.arange(start, start + token.shape[1]))
        new_history = []
        for q_proj, kv_proj, past in zip(self.q, self.kv, history):
            seen = x
            if past.numel() > 0:
                seen = torch.cat([past, x], dim=1)
            new_history.append(seen)
            k, v = kv_proj(seen).chunk(2, dim=-1)
            att = q_proj(x) @ k.mT / k.shape[-1] ** 0.5
            i = torch.arange(att.shape[-2])[:, None] + (att.shape[-1] - att.shape[-2])
            att = att.masked_fill(i < torch.arange(att.shape[-1]), float("-inf"))
            x = torch.tanh(x + att.softmax(-1) @ v)
        return self.logits(x), new_history


class LayerWithOwnCache(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.w_q, self.w_k, self.w_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.w_o = nn.Linear(dim, dim, bias=False)

    def forward(self, x, past_k, past_v):
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.w_q(x), self.w_k(x), self.w_v(x))
        )
        if past_k is not None:
            k = torch.cat((past_k, k), dim=-2)
        if past_v is not None:
            v = torch.cat((past_v, v), dim=-2)
        t, s = q.size(-2), k.size(-2)
        mask = torch.arange(t).view(-1, 1) + (s - t) >= torch.arange(s).view(1, -1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.w_o(y.transpose(1, 2).flatten(2)), (k, v)


class ExportFriendlyDecoder(nn.Module):
    """The caller gives the whole structure at once, with None in the place of each tensor."""

    def __init__(self, vocab=31, dim=16, heads=2, depth=3):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.layers = nn.ModuleList([LayerWithOwnCache(dim, heads) for _ in range(depth)])
        self.rms = nn.RMSNorm(dim, eps=1e-6)
        self.unembed = nn.Linear(dim, vocab, bias=False)

    def forward(self, ids, past):
        x = self.embed(ids)
        present = []
        for layer, (past_k, past_v) in zip(self.layers, past, strict=True):
            y, kv = layer(self.rms(x), past_k, past_v)
            x = x + y
            present.append(kv)
        return self.unembed(self.rms(x)), present


CASES = (
    ModelCase(
        "zero_size_tensor_as_default",
        seeded(StreamingEncoder),
        **calls(frames(10), cache="att_cache"),
        patterns=("P1", "P2", "P11", "P18"),
        example_inputs=(torch.linspace(-1, 1, 60).view(2, 3, 10),),
    ),
    ModelCase(
        "empty_tuple_as_default",
        seeded(FrameDecoder),
        **calls(frames(8), take=lambda out: out[2]),
        patterns=("P1", "P18"),
    ),
    ModelCase(
        "flat_empty_tensors",
        seeded(FlatHistoryTransformer),
        **calls(tokens(30), cache="history"),
        patterns=("P1", "P2", "P5", "P18"),
    ),
    ModelCase(
        "nones_inside_the_cache",
        seeded(ExportFriendlyDecoder),
        **calls(tokens(31), first=[(None, None)] * 3),
        patterns=("P1", "P20"),
        example_inputs=(torch.tensor([[1, 5, 9], [2, 6, 3]]), [(None, None)] * 3),
    ),
)
