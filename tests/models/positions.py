"""Decoders that differ in how they tell a token where it stands."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .case import ModelCase, attention_mask, calls, seeded, tokens


def get_slopes(n_heads):
    start = 2 ** (-(2 ** -(math.log2(n_heads) - 3)))
    return torch.tensor([start * start**i for i in range(n_heads)])


class MPTBlock(nn.Module):
    def __init__(self, d_model, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.norm_1 = nn.LayerNorm(d_model, bias=False)
        self.Wqkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        self.norm_2 = nn.LayerNorm(d_model, bias=False)
        self.up_proj = nn.Linear(d_model, 2 * d_model, bias=False)
        self.down_proj = nn.Linear(2 * d_model, d_model, bias=False)

    def attend(self, x, past_key_value, attn_bias):
        b, s, _ = x.shape
        query, key, value = self.Wqkv(x).chunk(3, dim=2)
        q = query.view(b, s, self.n_heads, -1).permute(0, 2, 1, 3)
        k = key.view(b, s, self.n_heads, -1).permute(0, 2, 3, 1)  # includes key.t()
        v = value.view(b, s, self.n_heads, -1).permute(0, 2, 1, 3)
        if past_key_value is not None:
            k = torch.cat([past_key_value[0], k], dim=3)
            v = torch.cat([past_key_value[1], v], dim=2)
        past_key_value = (k, v)
        s_q, s_k = q.size(-2), k.size(-1)
        attn_weight = q.matmul(k) / math.sqrt(q.size(-1))
        _s_k = max(0, attn_bias.size(3) - s_k)
        attn_weight = attn_weight + attn_bias[:, :, -1:, _s_k:]
        causal_mask = attn_weight.new_ones(s_k, s_k, dtype=torch.bool).tril().logical_not()
        causal_mask = causal_mask[-s_q:, -s_k:]
        attn_weight = attn_weight.masked_fill(
            causal_mask.view(1, 1, s_q, s_k), torch.finfo(q.dtype).min
        )
        out = torch.softmax(attn_weight, dim=-1).matmul(v)
        return self.out_proj(out.permute(0, 2, 1, 3).reshape(b, s, -1)), past_key_value

    def forward(self, x, past_key_value=None, attn_bias=None):
        a, past_key_value = self.attend(self.norm_1(x), past_key_value, attn_bias)
        x = x + a
        x = x + self.down_proj(F.gelu(self.up_proj(self.norm_2(x))))
        return x, past_key_value


class MPT(nn.Module):
    """ALiBi from a buffer cut at its end; K grows along axis 3, and V along axis 2."""

    def __init__(self, vocab_size=40, d_model=16, n_heads=4, n_layers=2, max_seq_len=64):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, d_model)
        self.blocks = nn.ModuleList([MPTBlock(d_model, n_heads) for _ in range(n_layers)])
        self.norm_f = nn.LayerNorm(d_model, bias=False)
        alibi = torch.arange(1 - max_seq_len, 1).view(1, 1, 1, max_seq_len)
        self.register_buffer("attn_bias", alibi * get_slopes(n_heads).view(1, n_heads, 1, 1))

    def forward(self, input_ids, past_key_values=None):
        x = self.wte(input_ids)
        if past_key_values is None:
            past_key_values = [None for _ in range(len(self.blocks))]
        for b_idx, block in enumerate(self.blocks):
            x, present = block(x, past_key_values[b_idx], self.attn_bias)
            past_key_values = [*past_key_values[:b_idx], present, *past_key_values[b_idx + 1 :]]
        return F.linear(self.norm_f(x), self.wte.weight), past_key_values


def build_alibi_tensor(attention_mask, num_heads, dtype):
    batch_size, seq_length = attention_mask.shape
    slopes = get_slopes(num_heads).to(attention_mask.device)
    arange_tensor = ((attention_mask.cumsum(dim=-1) - 1) * attention_mask)[:, None, :]
    alibi = slopes[..., None] * arange_tensor
    return alibi.reshape(batch_size * num_heads, 1, seq_length).to(dtype)


class BloomAttention(nn.Module):
    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, hidden_size // num_heads
        self.inv_norm_factor = 1.0 / math.sqrt(self.head_dim)
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.dense = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states, alibi, attention_mask, layer_past=None):
        fused_qkv = self.query_key_value(hidden_states)
        batch_size, q_length, _ = hidden_states.shape
        fused_qkv = fused_qkv.view(batch_size, q_length, self.num_heads, 3, self.head_dim)
        query_layer, key_layer, value_layer = (fused_qkv[..., i, :] for i in range(3))
        merged = batch_size * self.num_heads
        query_layer = query_layer.transpose(1, 2).reshape(merged, q_length, self.head_dim)
        key_layer = key_layer.permute(0, 2, 3, 1).reshape(merged, self.head_dim, q_length)
        value_layer = value_layer.transpose(1, 2).reshape(merged, q_length, self.head_dim)
        if layer_past is not None:
            past_key, past_value = layer_past
            # key: [batch_size * num_heads, head_dim, kv_length]
            key_layer = torch.cat((past_key, key_layer), dim=2)
            value_layer = torch.cat((past_value, value_layer), dim=1)
        _, _, kv_length = key_layer.shape
        matmul_result = alibi.baddbmm(
            batch1=query_layer, batch2=key_layer, beta=1.0, alpha=self.inv_norm_factor
        )
        attention_scores = matmul_result.view(batch_size, self.num_heads, q_length, kv_length)
        attn_weights = torch.masked_fill(
            attention_scores, attention_mask, torch.finfo(attention_scores.dtype).min
        )
        attention_probs = F.softmax(attn_weights, dim=-1).view(merged, q_length, kv_length)
        context = torch.bmm(attention_probs, value_layer)
        context = context.view(batch_size, self.num_heads, q_length, self.head_dim)
        output = self.dense(context.transpose(1, 2).reshape(batch_size, q_length, -1))
        return output, (key_layer, value_layer)


class Bloom(nn.Module):
    """ALiBi counted over the padding mask, batch and heads merged in the cache, `baddbmm`."""

    def __init__(self, vocab_size=45, hidden_size=16, n_head=2, n_layer=2):
        super().__init__()
        self.num_heads = n_head
        self.word_embeddings = nn.Embedding(vocab_size, hidden_size)
        self.word_embeddings_layernorm = nn.LayerNorm(hidden_size)
        self.h = nn.ModuleList([BloomAttention(hidden_size, n_head) for _ in range(n_layer)])
        self.ln = nn.ModuleList([nn.LayerNorm(hidden_size) for _ in range(n_layer)])

    def _prepare_attn_mask(self, attention_mask, input_shape, past_key_values_length):
        batch_size, src_length = attention_mask.shape
        _, tgt_length = input_shape
        expanded = ~attention_mask[:, None, None, :].bool()
        expanded = expanded.expand(batch_size, 1, tgt_length, src_length)
        if tgt_length > 1:
            target = torch.empty((tgt_length, src_length), dtype=torch.bool)
            seq_ids = torch.arange(tgt_length)
            target[:, past_key_values_length:] = seq_ids[:, None] < seq_ids[None, :]
            if past_key_values_length > 0:
                target[:, :past_key_values_length] = False
            expanded = expanded | target[None, None]
        return expanded

    def forward(self, input_ids, past_key_values=None, attention_mask=None):
        batch_size, seq_length = input_ids.shape
        if past_key_values is None:
            past_key_values = tuple([None] * len(self.h))
        hidden_states = self.word_embeddings_layernorm(self.word_embeddings(input_ids))
        presents = ()
        seq_length_with_past = seq_length
        past_key_values_length = 0
        if past_key_values[0] is not None:
            past_key_values_length = past_key_values[0][0].shape[2]
            seq_length_with_past = seq_length_with_past + past_key_values_length
        if attention_mask is None:
            attention_mask = torch.ones((batch_size, seq_length_with_past), dtype=torch.long)
        alibi = build_alibi_tensor(attention_mask, self.num_heads, dtype=hidden_states.dtype)
        causal_mask = self._prepare_attn_mask(
            attention_mask, (batch_size, seq_length), past_key_values_length
        )
        for block, norm, layer_past in zip(self.h, self.ln, past_key_values):
            attn, present = block(norm(hidden_states), alibi, causal_mask, layer_past)
            hidden_states = hidden_states + attn
            presents = presents + (present,)
        return F.linear(hidden_states, self.word_embeddings.weight), presents


class T5SelfAttention(nn.Module):
    def __init__(self, d_model, n_heads, buckets=8, max_distance=20, has_bias=False):
        super().__init__()
        self.n_heads, self.buckets, self.max_distance = n_heads, buckets, max_distance
        self.q = nn.Linear(d_model, d_model, bias=False)
        self.k = nn.Linear(d_model, d_model, bias=False)
        self.v = nn.Linear(d_model, d_model, bias=False)
        self.o = nn.Linear(d_model, d_model, bias=False)
        if has_bias:
            self.relative_attention_bias = nn.Embedding(buckets, n_heads)

    def compute_bias(self, query_length, key_length):
        context_position = torch.arange(query_length, dtype=torch.long)[:, None]
        memory_position = torch.arange(key_length, dtype=torch.long)[None, :]
        distance = -torch.min(memory_position - context_position, torch.zeros((), dtype=torch.long))
        max_exact = self.buckets // 2
        large = max_exact + (
            torch.log(distance.clamp(min=1).float() / max_exact)
            / math.log(self.max_distance / max_exact)
            * (self.buckets - max_exact)
        ).to(torch.long)
        large = torch.min(large, torch.full_like(large, self.buckets - 1))
        bucket = torch.where(distance < max_exact, distance, large)
        return self.relative_attention_bias(bucket).permute(2, 0, 1).unsqueeze(0)

    def forward(self, hidden_states, position_bias=None, past_key_value=None):
        batch_size, seq_length = hidden_states.shape[:2]
        real_seq_length = seq_length
        if past_key_value is not None:
            real_seq_length += past_key_value[0].shape[2]

        def shape(states):
            return states.view(batch_size, -1, self.n_heads, states.size(-1) // self.n_heads)

        query_states = shape(self.q(hidden_states)).transpose(1, 2)
        key_states = shape(self.k(hidden_states)).transpose(1, 2)
        value_states = shape(self.v(hidden_states)).transpose(1, 2)
        if past_key_value is not None:
            key_states = torch.cat([past_key_value[0], key_states], dim=2)
            value_states = torch.cat([past_key_value[1], value_states], dim=2)
        scores = torch.matmul(query_states, key_states.transpose(3, 2))
        if position_bias is None:
            position_bias = self.compute_bias(real_seq_length, key_states.shape[2])
            # only the last query positions are computed
            if past_key_value is not None:
                position_bias = position_bias[:, :, -hidden_states.size(1) :, :]
            ids = torch.arange(real_seq_length)
            causal = (ids[None, :] <= ids[:, None]).to(scores.dtype)[-seq_length:]
            position_bias = position_bias + (1.0 - causal) * -10000.0
        attn = F.softmax((scores + position_bias).float(), dim=-1).type_as(scores)
        out = torch.matmul(attn, value_states).transpose(1, 2).reshape(batch_size, seq_length, -1)
        return self.o(out), (key_states, value_states), position_bias


class T5Decoder(nn.Module):
    """A relative bias for the whole square, computed by the first layer and cut to the new rows."""

    def __init__(self, vocab=38, d_model=16, n_heads=2, n_layers=3):
        super().__init__()
        self.shared = nn.Embedding(vocab, d_model)
        self.block = nn.ModuleList(
            [T5SelfAttention(d_model, n_heads, has_bias=i == 0) for i in range(n_layers)]
        )

    def forward(self, input_ids, past_key_values=None):
        hidden_states = self.shared(input_ids)
        present_key_value_states = ()
        position_bias = None
        if past_key_values is None:
            past_key_values = [None] * len(self.block)
        for layer_module, past_key_value in zip(self.block, past_key_values):
            out, present, position_bias = layer_module(
                hidden_states, position_bias=position_bias, past_key_value=past_key_value
            )
            hidden_states = hidden_states + out
            present_key_value_states = present_key_value_states + (present,)
        return F.linear(hidden_states, self.shared.weight), present_key_value_states


def _padded(batch, past, query, generator):
    return {"attention_mask": attention_mask(batch, past, query)}


CASES = (
    ModelCase(
        "alibi_buffer_with_transposed_keys",
        seeded(MPT),
        **calls(tokens(40), cache="past_key_values"),
        patterns=("P1", "P3"),
    ),
    ModelCase(
        "bloom",
        seeded(Bloom),
        **calls(tokens(45), cache="past_key_values", also=_padded),
        patterns=("P1", "P2", "P3", "P11", "P15"),
        example_inputs={
            "input_ids": torch.tensor([[5, 6, 7]]),
            "attention_mask": torch.ones(1, 3, dtype=torch.long),
        },
    ),
    ModelCase(
        "bloom_without_mask",
        seeded(Bloom, seed=1),
        **calls(tokens(45), cache="past_key_values"),
        patterns=("P1", "P2", "P3", "P11", "P15"),
    ),
    ModelCase(
        "t5_relative_bias",
        seeded(T5Decoder),
        **calls(tokens(38), cache="past_key_values"),
        patterns=("P1", "P2", "P3", "P15"),
    ),
)
