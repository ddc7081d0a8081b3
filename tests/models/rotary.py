"""Decoders with rotary positions: rotated before the cache or after it, in full or in part."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .case import ModelCase, calls, seeded, tokens


@dataclass
class ModelArgs:
    dim: int = 16
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int = 2
    vocab_size: int = 43
    norm_eps: float = 1e-5
    max_seq_len: int = 64
    rope_theta: float = 10000.0


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def rotate_half(x):
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


class RotaryEmbedding(nn.Module):
    def __init__(self, dim, max_position_embeddings=64, base=10000.0):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2).float() / dim))
        freqs = torch.outer(torch.arange(max_position_embeddings).float(), inv_freq)
        emb = torch.cat((freqs, freqs), dim=-1)
        self.register_buffer("cos_cached", emb.cos(), persistent=False)
        self.register_buffer("sin_cached", emb.sin(), persistent=False)

    def forward(self, start, seqlen):
        return self.cos_cached[start : start + seqlen], self.sin_cached[start : start + seqlen]


class LlamaAttention(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.n_heads = args.n_heads
        self.n_kv_heads = args.n_kv_heads
        self.n_rep = args.n_heads // args.n_kv_heads
        self.head_dim = args.dim // args.n_heads
        self.wq = nn.Linear(args.dim, args.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * self.head_dim, args.dim, bias=False)

    def forward(self, x, cos, sin, mask, past_key_value=None):
        bsz, seqlen, _ = x.shape
        xq = self.wq(x).view(bsz, seqlen, self.n_heads, self.head_dim).transpose(1, 2)
        xk = self.wk(x).view(bsz, seqlen, self.n_kv_heads, self.head_dim).transpose(1, 2)
        xv = self.wv(x).view(bsz, seqlen, self.n_kv_heads, self.head_dim).transpose(1, 2)
        xq = xq * cos + rotate_half(xq) * sin
        xk = xk * cos + rotate_half(xk) * sin
        if past_key_value is not None:
            xk = torch.cat([past_key_value[0], xk], dim=2)
            xv = torch.cat([past_key_value[1], xv], dim=2)
        present = (xk, xv)
        keys = xk.repeat_interleave(self.n_rep, dim=1)
        values = xv.repeat_interleave(self.n_rep, dim=1)
        scores = torch.matmul(xq, keys.transpose(2, 3)) / self.head_dim**0.5
        scores = F.softmax((scores + mask).float(), dim=-1).type_as(xq)
        output = torch.matmul(scores, values)
        return self.wo(output.transpose(1, 2).contiguous().view(bsz, seqlen, -1)), present


class LlamaBlock(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.attention = LlamaAttention(args)
        hidden = args.dim * 2
        self.w1 = nn.Linear(args.dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, hidden, bias=False)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x, cos, sin, mask, past_key_value=None):
        a, present = self.attention(self.attention_norm(x), cos, sin, mask, past_key_value)
        h = x + a
        f = self.ffn_norm(h)
        return h + self.w2(F.silu(self.w1(f)) * self.w3(f)), present


class Llama(nn.Module):
    """Grouped-query attention, a rotary table, an additive mask built by `full` and `triu`."""

    def __init__(self, args):
        super().__init__()
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.rotary = RotaryEmbedding(args.dim // args.n_heads, args.max_seq_len, args.rope_theta)
        self.layers = nn.ModuleList([LlamaBlock(args) for _ in range(args.n_layers)])
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)

    def forward(self, tokens, past_key_values=None):
        _, seqlen = tokens.shape
        start_pos = past_key_values[0][0].shape[2] if past_key_values is not None else 0
        h = self.tok_embeddings(tokens)
        cos, sin = self.rotary(start_pos, seqlen)
        mask = torch.full((seqlen, start_pos + seqlen), float("-inf"), device=tokens.device)
        mask = torch.triu(mask, diagonal=start_pos + 1).type_as(h)
        presents = ()
        for i, layer in enumerate(self.layers):
            past = past_key_values[i] if past_key_values is not None else None
            h, present = layer(h, cos, sin, mask, past)
            presents += (present,)
        return self.output(self.norm(h)).float(), presents


def rotate_every_two(x):
    x = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1)
    return x.flatten(-2)


class MultiQueryAttention(nn.Module):
    def __init__(self, hidden_size, num_heads, rotary_dim):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, hidden_size // num_heads
        self.rotary_dim = rotary_dim
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.kv_proj = nn.Linear(hidden_size, 2 * self.head_dim, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def _rotate(self, x, offset):
        exponent = torch.arange(0, self.rotary_dim, 2, device=x.device) / self.rotary_dim
        position = torch.arange(offset, offset + x.shape[1], device=x.device).to(x.dtype)
        angle = torch.outer(position, 1.0 / (10000**exponent)).to(x.dtype)
        sin = angle.sin().repeat_interleave(2, -1)[None, :, None]
        cos = angle.cos().repeat_interleave(2, -1)[None, :, None]
        rot, keep = x[..., : self.rotary_dim], x[..., self.rotary_dim :]
        return torch.cat([rot * cos + rotate_every_two(rot) * sin, keep], dim=-1)

    def forward(self, hidden_states, layer_past=None):
        B, S, _ = hidden_states.shape
        offset = 0
        if layer_past is not None:
            offset = layer_past[0].size(1)
        query = self.q_proj(hidden_states).reshape(B, S, self.num_heads, self.head_dim)
        key, value = self.kv_proj(hidden_states).chunk(2, dim=-1)
        query = self._rotate(query, offset)
        key = self._rotate(key.unsqueeze(2), offset).squeeze(2)
        if layer_past is not None:
            key = torch.cat((layer_past[0], key), dim=1)
            value = torch.cat((layer_past[1], value), dim=1)
        weights = torch.einsum("bqhd,bkd->bhqk", query, key) * self.head_dim**-0.5
        i = torch.arange(offset, offset + S, device=key.device)[:, None]
        j = torch.arange(key.size(1), device=key.device)[None]
        weights = torch.where(j <= i, weights, torch.finfo(weights.dtype).min)
        context = torch.einsum("bhqk,bkd->bqhd", weights.softmax(-1), value)
        return self.out_proj(context.reshape(B, S, -1)), (key, value)


class CodeModel(nn.Module):
    """Parallel attention and MLP, one shared key-value head, interleaved partial rotary."""

    def __init__(self, vocab_size=47, n_embd=24, n_head=3, n_layer=2, rotary_dim=4):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.ln = nn.ModuleList([nn.LayerNorm(n_embd) for _ in range(n_layer)])
        self.attn = nn.ModuleList(
            [MultiQueryAttention(n_embd, n_head, rotary_dim) for _ in range(n_layer)]
        )
        self.fc_in = nn.ModuleList([nn.Linear(n_embd, 2 * n_embd) for _ in range(n_layer)])
        self.fc_out = nn.ModuleList([nn.Linear(2 * n_embd, n_embd) for _ in range(n_layer)])
        self.lm_head = nn.Linear(n_embd, vocab_size)

    def forward(self, input_ids, layer_past=None):
        hidden_states = self.wte(input_ids)
        presents = []
        for i in range(len(self.attn)):
            past = None if layer_past is None else layer_past[i]
            residual, hidden_states = hidden_states, self.ln[i](hidden_states)
            attn_output, present = self.attn[i](hidden_states, past)
            mlp_output = self.fc_out[i](F.gelu(self.fc_in[i](hidden_states), approximate="tanh"))
            hidden_states = attn_output + mlp_output + residual
            presents.append(present)
        return self.lm_head(hidden_states), presents


class LucidAttention(nn.Module):
    def __init__(self, dim, *, dim_head=8, heads=2):
        super().__init__()
        self.heads, self.scale = heads, dim_head**-0.5
        inner = dim_head * heads
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, inner * 2, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x, rotary_emb, cache=None):
        b, n, h = *x.shape[:2], self.heads
        x = self.norm(x)
        q, k, v = (self.to_q(x), *self.to_kv(x).chunk(2, dim=-1))
        q, k, v = (t.reshape(b, n, h, -1).transpose(1, 2) for t in (q, k, v))
        if cache is not None:
            ck, cv = cache
            k = torch.cat((ck, k), dim=-2)
            v = torch.cat((cv, v), dim=-2)
        cached_kv = torch.stack((k, v))
        # keys are cached unrotated, queries take the last positions
        q_pos = rotary_emb[-n:]
        q = q * q_pos.cos() + rotate_half(q) * q_pos.sin()
        k = k * rotary_emb.cos() + rotate_half(k) * rotary_emb.sin()
        sim = torch.einsum("b h i d, b h j d -> b h i j", q, k) * self.scale
        i, j = sim.shape[-2:]
        causal_mask = torch.ones((i, j), device=x.device, dtype=torch.bool).triu(j - i + 1)
        sim = sim.masked_fill(causal_mask, -torch.finfo(sim.dtype).max)
        out = torch.einsum("b h i j, b h j d -> b h i d", sim.softmax(dim=-1), v)
        return self.to_out(out.transpose(1, 2).reshape(b, n, -1)), cached_kv


class SemanticTransformer(nn.Module):
    """Keys cached before rotation; all layers in one (L, 2, B, H, P, D) tensor."""

    def __init__(self, num_tokens=33, dim=16, depth=3):
        super().__init__()
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.register_buffer("inv_freq", 1.0 / (10000 ** (torch.arange(0, 8, 2).float() / 8)))
        self.layers = nn.ModuleList([LucidAttention(dim) for _ in range(depth)])
        self.to_logits = nn.Linear(dim, num_tokens)

    def forward(self, ids, *, kv_cache=None, return_kv_cache=True):
        x = self.token_emb(ids)
        seq_len = ids.shape[1]
        if kv_cache is not None:
            seq_len = seq_len + kv_cache.shape[-2]
        t = torch.arange(seq_len, device=ids.device).type_as(self.inv_freq)
        freqs = torch.einsum("i,j->ij", t, self.inv_freq)
        rotary_emb = torch.cat((freqs, freqs), dim=-1)
        iter_cache = iter(kv_cache) if kv_cache is not None else iter([])
        new_kv_cache = []
        for attn in self.layers:
            out, layer_cache = attn(x, rotary_emb, next(iter_cache, None))
            x = x + out
            new_kv_cache.append(layer_cache)
        logits = self.to_logits(x)
        if not return_kv_cache:
            return logits
        return logits, torch.stack(new_kv_cache)


CASES = (
    ModelCase(
        "llama",
        seeded(lambda: Llama(ModelArgs())),
        **calls(tokens(43)),
        patterns=("P1", "P2", "P15"),
    ),
    ModelCase(
        "multi_query_with_partial_rotary",
        seeded(CodeModel),
        **calls(tokens(47), cache="layer_past"),
        patterns=("P1", "P2"),
        example_inputs=(torch.tensor([[4, 8, 15, 16, 23]]),),
    ),
    ModelCase(
        "unrotated_keys_in_one_tensor",
        seeded(SemanticTransformer),
        **calls(tokens(33), cache="kv_cache"),
        patterns=("P1", "P2", "P10", "P17"),
    ),
)
