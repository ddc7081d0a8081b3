"""GPT-NeoX and ChatGLM: rotary tables gathered by position, with and without time in front."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .case import ModelCase, calls, seeded, tokens


def rotate_half(x):
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_pos_emb(q, k, cos, sin, position_ids):
    gather_indices = position_ids[:, None, :, None]
    gather_indices = gather_indices.repeat(1, cos.shape[1], 1, cos.shape[3])
    cos = torch.gather(cos.repeat(gather_indices.shape[0], 1, 1, 1), 2, gather_indices)
    sin = torch.gather(sin.repeat(gather_indices.shape[0], 1, 1, 1), 2, gather_indices)
    return (q * cos) + (rotate_half(q) * sin), (k * cos) + (rotate_half(k) * sin)


class RotaryEmbedding(nn.Module):
    def __init__(self, dim, base=10000):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2).float() / dim))
        self.register_buffer("inv_freq", inv_freq)

    def forward(self, x, seq_len):
        t = torch.arange(seq_len, device=x.device, dtype=self.inv_freq.dtype)
        freqs = torch.einsum("i,j->ij", t, self.inv_freq)
        emb = torch.cat((freqs, freqs), dim=-1)
        return emb.cos()[None, None], emb.sin()[None, None]


class GPTNeoXAttention(nn.Module):
    def __init__(self, hidden_size, num_attention_heads, rotary_ndims, max_positions):
        super().__init__()
        self.num_attention_heads = num_attention_heads
        self.head_size = hidden_size // num_attention_heads
        self.rotary_ndims = rotary_ndims
        bias = torch.tril(torch.ones((max_positions, max_positions), dtype=torch.bool))
        self.register_buffer("bias", bias.view(1, 1, max_positions, max_positions))
        self.register_buffer("masked_bias", torch.tensor(-1e9))
        self.rotary_emb = RotaryEmbedding(rotary_ndims)
        self.register_buffer("norm_factor", torch.tensor(self.head_size).float().sqrt())
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.dense = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states, position_ids, layer_past=None, use_cache=False):
        has_layer_past = layer_past is not None
        qkv = self.query_key_value(hidden_states)
        new_qkv_shape = qkv.size()[:-1] + (self.num_attention_heads, 3 * self.head_size)
        qkv = qkv.view(*new_qkv_shape)
        query = qkv[..., : self.head_size].permute(0, 2, 1, 3)
        key = qkv[..., self.head_size : 2 * self.head_size].permute(0, 2, 1, 3)
        value = qkv[..., 2 * self.head_size :].permute(0, 2, 1, 3)
        query_rot, query_pass = query.tensor_split([self.rotary_ndims], dim=-1)
        key_rot, key_pass = key.tensor_split([self.rotary_ndims], dim=-1)
        seq_len = key.shape[-2]
        if has_layer_past:
            seq_len += layer_past[0].shape[-2]
        cos, sin = self.rotary_emb(value, seq_len=seq_len)
        query, key = apply_rotary_pos_emb(query_rot, key_rot, cos, sin, position_ids)
        query = torch.cat((query, query_pass), dim=-1)
        key = torch.cat((key, key_pass), dim=-1)
        if has_layer_past:
            past_key = layer_past[0]
            past_value = layer_past[1]
            key = torch.cat((past_key, key), dim=-2)
            value = torch.cat((past_value, value), dim=-2)
        present = (key, value) if use_cache else None
        attn_output = self._attn(query, key, value)
        attn_output = attn_output.permute(0, 2, 1, 3).contiguous()
        return self.dense(attn_output.view(*hidden_states.shape)), present

    def _attn(self, query, key, value):
        batch_size, num_heads, query_length, head_size = query.size()
        key_length = key.size(-2)
        causal_mask = self.bias[:, :, key_length - query_length : key_length, :key_length]
        query = query.reshape(batch_size * num_heads, query_length, head_size)
        key = key.reshape(batch_size * num_heads, key_length, head_size)
        attn_scores = torch.zeros(
            batch_size * num_heads, query_length, key_length, dtype=query.dtype, device=key.device
        )
        attn_scores = torch.baddbmm(
            attn_scores, query, key.transpose(1, 2), beta=1.0, alpha=float(head_size) ** -0.5
        )
        attn_scores = attn_scores.view(batch_size, num_heads, query_length, key_length)
        attn_scores = torch.where(causal_mask, attn_scores, self.masked_bias.to(attn_scores.dtype))
        return torch.matmul(F.softmax(attn_scores, dim=-1).to(value.dtype), value)


class GPTNeoX(nn.Module):
    """Parallel residual, partial rotary, each layer reading its own past's length."""

    def __init__(self, vocab_size=46, hidden_size=24, num_layers=2, heads=3, rotary_ndims=4):
        super().__init__()
        self.embed_in = nn.Embedding(vocab_size, hidden_size)
        self.attention = nn.ModuleList(
            [GPTNeoXAttention(hidden_size, heads, rotary_ndims, 64) for _ in range(num_layers)]
        )
        self.input_layernorm = nn.ModuleList([nn.LayerNorm(hidden_size) for _ in range(num_layers)])
        self.mlp = nn.ModuleList([nn.Linear(hidden_size, hidden_size) for _ in range(num_layers)])
        self.embed_out = nn.Linear(hidden_size, vocab_size, bias=False)

    def forward(self, input_ids, position_ids=None, past_key_values=None, use_cache=True):
        seq_length = input_ids.size(1)
        if past_key_values is None:
            past_length = 0
            past_key_values = tuple([None] * len(self.attention))
        else:
            past_length = past_key_values[0][0].size(-2)
        if position_ids is None:
            device = input_ids.device
            position_ids = torch.arange(past_length, seq_length + past_length, device=device)
            position_ids = position_ids.unsqueeze(0).view(-1, seq_length)
        else:
            position_ids = position_ids.view(-1, seq_length).long()
        hidden_states = self.embed_in(input_ids)
        presents = () if use_cache else None
        for i, layer_past in enumerate(past_key_values):
            attn, present = self.attention[i](
                self.input_layernorm[i](hidden_states), position_ids, layer_past, use_cache
            )
            # x = x + attn(ln1(x)) + mlp(ln2(x))
            hidden_states = F.gelu(self.mlp[i](hidden_states)) + attn + hidden_states
            if use_cache:
                presents = presents + (present,)
        return (self.embed_out(hidden_states), presents)


def apply_chatglm_rotary(x, rope_cache):
    sq, _, np, _ = x.shape
    rot_dim = rope_cache.shape[-2] * 2
    x, x_pass = x[..., :rot_dim], x[..., rot_dim:]
    rope_cache = rope_cache[:sq]
    xshaped = x.reshape(sq, -1, np, rot_dim // 2, 2)
    rope_cache = rope_cache.view(sq, -1, 1, xshaped.size(3), 2)
    x_out2 = torch.stack(
        [
            xshaped[..., 0] * rope_cache[..., 0] - xshaped[..., 1] * rope_cache[..., 1],
            xshaped[..., 1] * rope_cache[..., 0] + xshaped[..., 0] * rope_cache[..., 1],
        ],
        -1,
    )
    return torch.cat((x_out2.flatten(3), x_pass), dim=-1)


class ChatGLMAttention(nn.Module):
    def __init__(self, hidden, heads, groups):
        super().__init__()
        self.heads, self.groups, self.head_dim = heads, groups, hidden // heads
        self.query_key_value = nn.Linear(hidden, hidden + 2 * groups * self.head_dim)
        self.dense = nn.Linear(hidden, hidden, bias=False)

    def forward(self, hidden_states, attention_mask, rotary_pos_emb, kv_cache=None):
        sq, b, h = hidden_states.shape
        kv_size = self.groups * self.head_dim
        q, k, v = self.query_key_value(hidden_states).split([h, kv_size, kv_size], dim=-1)
        q = apply_chatglm_rotary(q.view(sq, b, self.heads, self.head_dim), rotary_pos_emb)
        k = apply_chatglm_rotary(k.view(sq, b, self.groups, self.head_dim), rotary_pos_emb)
        v = v.view(sq, b, self.groups, self.head_dim)
        if kv_cache is not None:
            cache_k, cache_v = kv_cache
            k = torch.cat((cache_k, k), dim=0)
            v = torch.cat((cache_v, v), dim=0)
        kv_cache = (k, v)
        repeat = self.heads // self.groups
        k = k.unsqueeze(-2).expand(-1, -1, -1, repeat, -1).flatten(2, 3)
        v = v.unsqueeze(-2).expand(-1, -1, -1, repeat, -1).flatten(2, 3)
        q, k, v = [t.permute(1, 2, 0, 3) for t in (q, k, v)]
        if attention_mask is None and q.shape[2] == k.shape[2]:
            context = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            if attention_mask is not None:
                attention_mask = ~attention_mask
            context = F.scaled_dot_product_attention(q, k, v, attention_mask)
        return self.dense(context.permute(2, 0, 1, 3).reshape(sq, b, h)), kv_cache


class ChatGLM2(nn.Module):
    """Caches of shape (P, B, G, D); a mask is made only for several tokens that follow a past."""

    def __init__(self, vocab=48, hidden=16, heads=4, groups=2, layers=2):
        super().__init__()
        self.embedding = nn.Embedding(vocab, hidden)
        theta = 1.0 / (10000 ** (torch.arange(0, 2, 2) / 2))
        idx_theta = torch.outer(torch.arange(64.0), theta)
        rope = torch.stack([torch.cos(idx_theta), torch.sin(idx_theta)], dim=-1)
        self.register_buffer("rope", rope, persistent=False)
        self.layers = nn.ModuleList(
            [ChatGLMAttention(hidden, heads, groups) for _ in range(layers)]
        )
        self.norms = nn.ModuleList([nn.RMSNorm(hidden, eps=1e-5) for _ in range(layers)])
        self.output_layer = nn.Linear(hidden, vocab, bias=False)

    def get_masks(self, input_ids, past_key_values):
        batch_size, seq_length = input_ids.shape
        full_attention_mask = torch.ones(batch_size, seq_length, seq_length)
        full_attention_mask.tril_()
        past_length = 0
        if past_key_values:
            past_length = past_key_values[0][0].shape[0]
        if past_length:
            ones = torch.ones(batch_size, seq_length, past_length)
            full_attention_mask = torch.cat((ones, full_attention_mask), dim=-1)
        return (full_attention_mask < 0.5).bool().unsqueeze(1)

    def forward(self, input_ids, past_key_values=None):
        seq_length = input_ids.shape[1]
        full_attention_mask = None
        if past_key_values and seq_length != 1:
            full_attention_mask = self.get_masks(input_ids, past_key_values)
        past_length = past_key_values[0][0].shape[0] if past_key_values is not None else 0
        position_ids = torch.arange(past_length, past_length + seq_length)
        rotary_pos_emb = self.rope[position_ids]
        hidden_states = self.embedding(input_ids).transpose(0, 1).contiguous()
        if not past_key_values:
            past_key_values = [None for _ in range(len(self.layers))]
        presents = ()
        for layer, norm, kv_cache in zip(self.layers, self.norms, past_key_values):
            attn, kv_cache = layer(
                norm(hidden_states), full_attention_mask, rotary_pos_emb, kv_cache
            )
            hidden_states = hidden_states + attn
            presents = presents + (kv_cache,)
        lm_logits = self.output_layer(hidden_states)
        return lm_logits.transpose(0, 1).contiguous(), presents


CASES = (
    ModelCase(
        "gpt_neox",
        seeded(GPTNeoX),
        **calls(tokens(46), cache="past_key_values"),
        patterns=("P1", "P2", "P3", "P10"),
        example_inputs={"input_ids": torch.tensor([[7, 7, 7, 1], [0, 1, 2, 3]])},
    ),
    ModelCase(
        "chatglm_mask_by_lengths",
        seeded(ChatGLM2),
        **calls(tokens(48), cache="past_key_values"),
        patterns=("P1", "P2", "P3", "P11", "P15"),
        expects_proof=False,
    ),
)
