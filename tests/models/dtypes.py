"""The same kinds of decoder in other dtypes, and without storage."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .case import ModelCase, calls, frames, seeded, tokens
from .gpt import GPTConfig, NanoGPT
from .rotary import Llama, ModelArgs


class HalfSafeAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, past=None):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).unbind(2)
        if past is not None:
            k = torch.cat([past[0], k], dim=1)
            v = torch.cat([past[1], v], dim=1)
        M = k.shape[1]
        # products of half precision overflow before the scale is applied, so scale first
        attn = torch.einsum("bnhd,bmhd->bhnm", q * (C // self.heads) ** -0.5, k).to(torch.float32)
        future = torch.arange(M)[None] > torch.arange(M - N, M)[:, None]
        attn = attn.masked_fill(future, torch.finfo(torch.float32).min).softmax(-1).to(v.dtype)
        return self.proj(torch.einsum("bhnm,bmhd->bnhd", attn, v).flatten(2)), (k, v)


class MixedPrecisionDecoder(nn.Module):
    """Features in bfloat16, norms and softmax in float32, logits in float32."""

    def __init__(self, width=10, dim=16, heads=2, depth=2):
        super().__init__()
        self.inp = nn.Linear(width, dim)
        self.layers = nn.ModuleList([HalfSafeAttention(dim, heads) for _ in range(depth)])
        self.gains = nn.ParameterList([nn.Parameter(torch.ones(dim)) for _ in range(depth)])
        self.out = nn.Linear(dim, width)

    def forward(self, features, past=None):
        x = self.inp(features)
        present = []
        for i, (layer, gain) in enumerate(zip(self.layers, self.gains)):
            h = F.layer_norm(x.float(), x.shape[-1:], gain.float()).type_as(x)
            y, kv = layer(h, past[i] if past else None)
            x = x + y
            present.append(kv)
        return self.out(x).float(), present


def on_meta(build):
    def built():
        with torch.device("meta"):
            return build()

    return built


CASES = (
    ModelCase(
        "gpt_in_float64",
        seeded(lambda: NanoGPT(GPTConfig(n_layer=3)).double()),
        **calls(tokens(37)),
        patterns=("P1", "P2", "P3", "P15"),
    ),
    ModelCase(
        "gpt_in_bfloat16",
        seeded(lambda: NanoGPT(GPTConfig(n_head=4, bias=False)).bfloat16()),
        **calls(tokens(37), cache="past_kvs"),
        patterns=("P1", "P2", "P3", "P15"),
    ),
    ModelCase(
        "llama_in_float16",
        seeded(lambda: Llama(ModelArgs(n_layers=1)).half()),
        **calls(tokens(43), cache="past_key_values"),
        patterns=("P1", "P2", "P15"),
        example_inputs=(torch.tensor([[1, 20, 30, 40], [4, 3, 2, 1]]),),
    ),
    ModelCase(
        "mixed_precision_features",
        seeded(lambda: MixedPrecisionDecoder().bfloat16()),
        **calls(frames(10, dtype=torch.bfloat16)),
        patterns=("P1",),
        example_inputs=(torch.ones(1, 3, 10, dtype=torch.bfloat16),),
    ),
    ModelCase(
        "llama_on_meta",
        seeded(on_meta(lambda: Llama(ModelArgs(dim=64, n_layers=3, vocab_size=1000)))),
        **calls(tokens(1000)),
        patterns=("P1", "P2", "P15"),
        device="meta",
    ),
    ModelCase(
        "gpt_on_meta_in_bfloat16",
        seeded(on_meta(lambda: NanoGPT(GPTConfig(n_embd=32)).bfloat16())),
        **calls(tokens(37), cache="past_kvs"),
        patterns=("P1", "P2", "P3", "P15"),
        example_inputs=(torch.zeros(1, 4, dtype=torch.long, device="meta"),),
        device="meta",
    ),
)
