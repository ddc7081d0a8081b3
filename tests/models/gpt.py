"""Decoders in the style of the GPT family: learned positions, multi-head attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .case import ModelCase, calls, one_token_later, seeded, tokens


@dataclass
class GPTConfig:
    block_size: int = 64
    vocab_size: int = 37
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 16
    dropout: float = 0.1
    bias: bool = True


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.n_embd = config.n_embd
        self.register_buffer(
            "bias",
            torch.tril(torch.ones(config.block_size, config.block_size)).view(
                1, 1, config.block_size, config.block_size
            ),
        )

    def forward(self, x, kv=None):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        if kv is not None:
            past_k, past_v = kv
            k = torch.cat((past_k, k), dim=2)
            v = torch.cat((past_v, v), dim=2)
        P = k.size(2) - T
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, P : P + T, : P + T] == 0, float("-inf"))
        att = self.attn_dropout(F.softmax(att, dim=-1))
        y = (att @ v).transpose(1, 2).contiguous().view(B, T, C)
        return self.c_proj(y), (k, v)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, kv=None):
        y, kv = self.attn(self.ln_1(x), kv)
        x = x + y
        return x + self.mlp(self.ln_2(x)), kv


class NanoGPT(nn.Module):
    """nanoGPT with the key-value cache that every fork of it adds; the head is tied."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                ln_f=nn.LayerNorm(config.n_embd),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx, past_kvs=None):
        device = idx.device
        t = idx.size(1)
        if past_kvs is None:
            past_length = 0
            past_kvs = [None] * len(self.transformer.h)
        else:
            past_length = past_kvs[0][0].size(-2)
        pos = torch.arange(past_length, past_length + t, dtype=torch.long, device=device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        new_kvs = []
        for block, kv in zip(self.transformer.h, past_kvs):
            x, kv = block(x, kv)
            new_kvs.append(kv)
        return self.lm_head(self.transformer.ln_f(x)), new_kvs


class Conv1D(nn.Module):
    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        size_out = x.size()[:-1] + (self.nf,)
        x = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return x.view(*size_out)


class Attention(nn.Module):
    def __init__(self, nx, n_ctx, n_head, scale=True):
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(n_ctx, n_ctx)).view(1, 1, n_ctx, n_ctx))
        self.n_head = n_head
        self.split_size = nx
        self.scale = scale
        self.c_attn = Conv1D(nx * 3, nx)
        self.c_proj = Conv1D(nx, nx)

    def _attn(self, q, k, v):
        w = torch.matmul(q, k)
        if self.scale:
            w = w / math.sqrt(v.size(-1))
        nd, ns = w.size(-2), w.size(-1)
        b = self.bias[:, :, ns - nd : ns, :ns]
        w = w * b - 1e4 * (1 - b)
        return torch.matmul(nn.Softmax(dim=-1)(w), v)

    def merge_heads(self, x):
        x = x.permute(0, 2, 1, 3).contiguous()
        return x.view(*x.size()[:-2], x.size(-2) * x.size(-1))

    def split_heads(self, x, k=False):
        x = x.view(*x.size()[:-1], self.n_head, x.size(-1) // self.n_head)
        if k:
            return x.permute(0, 2, 3, 1)  # (batch, head, head_features, seq_length)
        return x.permute(0, 2, 1, 3)

    def forward(self, x, layer_past=None):
        query, key, value = self.c_attn(x).split(self.split_size, dim=2)
        query = self.split_heads(query)
        key = self.split_heads(key, k=True)
        value = self.split_heads(value)
        if layer_past is not None:
            past_key, past_value = layer_past[0].transpose(-2, -1), layer_past[1]
            key = torch.cat((past_key, key), dim=-1)
            value = torch.cat((past_value, value), dim=-2)
        # transpose to have same shapes for stacking
        present = torch.stack((key.transpose(-2, -1), value))
        return self.c_proj(self.merge_heads(self._attn(query, key, value))), present


class GPT2Block(nn.Module):
    def __init__(self, nx, n_ctx, n_head):
        super().__init__()
        self.ln_1 = nn.LayerNorm(nx, eps=1e-5)
        self.attn = Attention(nx, n_ctx, n_head)
        self.ln_2 = nn.LayerNorm(nx, eps=1e-5)
        self.c_fc = Conv1D(nx * 4, nx)
        self.c_proj = Conv1D(nx, nx * 4)

    def forward(self, x, layer_past=None):
        a, present = self.attn(self.ln_1(x), layer_past=layer_past)
        x = x + a
        return x + self.c_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh")), present


class GPT2LMHeadModel(nn.Module):
    """The first PyTorch GPT-2: keys stored transposed, one (2, B, H, P, D) tensor per layer."""

    def __init__(self, vocab_size=41, n_ctx=64, n_embd=12, n_layer=3, n_head=3):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(n_ctx, n_embd)
        self.h = nn.ModuleList([GPT2Block(n_embd, n_ctx, n_head) for _ in range(n_layer)])
        self.ln_f = nn.LayerNorm(n_embd, eps=1e-5)
        self.decoder = nn.Linear(n_embd, vocab_size, bias=False)
        self.decoder.weight = self.wte.weight

    def forward(self, input_ids, position_ids=None, token_type_ids=None, past=None):
        if past is None:
            past_length = 0
            past = [None] * len(self.h)
        else:
            past_length = past[0][0].size(-2)
        if position_ids is None:
            position_ids = torch.arange(
                past_length,
                input_ids.size(-1) + past_length,
                dtype=torch.long,
                device=input_ids.device,
            )
            position_ids = position_ids.unsqueeze(0).expand_as(input_ids)
        hidden_states = self.wte(input_ids) + self.wpe(position_ids)
        if token_type_ids is not None:
            hidden_states = hidden_states + self.wte(token_type_ids)
        presents = []
        for block, layer_past in zip(self.h, past):
            hidden_states, present = block(hidden_states, layer_past)
            presents.append(present)
        hidden_states = self.ln_f(hidden_states)
        return self.decoder(hidden_states), presents


class SDPAAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        if cache is not None:
            assert T == 1, "with a cache, one token at a time"
            k = torch.cat([cache[0], k], dim=-2)
            v = torch.cat([cache[1], v], dim=-2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        return self.out(y.transpose(1, 2).reshape(B, T, C)), torch.stack([k, v])


class TinyStories(nn.Module):
    """`is_causal` on the first call, no mask on a later call of one token; one cache tensor."""

    def __init__(self, vocab=29, dim=16, depth=2, heads=4, max_len=64):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.pos = nn.Parameter(torch.zeros(1, max_len, dim))
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(depth)])
        self.layers = nn.ModuleList([SDPAAttention(dim, heads) for _ in range(depth)])
        self.ff = nn.ModuleList(
            [nn.Sequential(nn.Linear(dim, dim * 2), nn.SiLU(), nn.Linear(dim * 2, dim))] * depth
        )
        self.head = nn.Linear(dim, vocab)

    def forward(self, x, cache=None):
        start = 0 if cache is None else cache.shape[-2]
        h = self.embed(x) + self.pos[:, start : start + x.shape[1]]
        updated = []
        for i, (norm, layer, ff) in enumerate(zip(self.norms, self.layers, self.ff)):
            a, kv = layer(norm(h), None if cache is None else cache[i])
            h = h + a
            h = h + ff(h)
            updated.append(kv)
        return self.head(h), torch.stack(updated)


CASES = (
    ModelCase(
        "nano_gpt",
        seeded(lambda: NanoGPT(GPTConfig())),
        **calls(tokens(37)),
        patterns=("P1", "P2", "P3", "P15"),
    ),
    ModelCase(
        "gpt2_with_transposed_keys",
        seeded(GPT2LMHeadModel),
        **calls(tokens(41), cache="past"),
        patterns=("P1", "P2", "P3", "P15"),
        example_inputs={"input_ids": torch.tensor([[5, 1, 7, 2], [3, 3, 9, 0]])},
    ),
    ModelCase(
        "causal_flag_then_one_token",
        seeded(TinyStories),
        **calls(tokens(29), cache="cache"),
        patterns=("P1", "P2", "P9", "P15"),
        expects_proof=False,
        domain=one_token_later,
    ),
)
