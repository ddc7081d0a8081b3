"""Decoders that attend to an encoder's states, with keys and values that are computed once."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class CrossAndSelfAttention(nn.Module):
    """One module for both kinds, as in sequence-to-sequence models of 2020 to 2023."""

    def __init__(self, width: int, heads: int, is_decoder: bool = True) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.scaling = self.head_dim**-0.5
        self.is_decoder = is_decoder
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def _shape(self, tensor, seq_len, bsz):
        return tensor.view(bsz, seq_len, self.heads, self.head_dim).transpose(1, 2).contiguous()

    def forward(
        self, hidden_states, key_value_states=None, past_key_value=None, attention_mask=None
    ):
        is_cross_attention = key_value_states is not None
        bsz, tgt_len, _ = hidden_states.size()
        query_states = self.q_proj(hidden_states) * self.scaling
        if (
            is_cross_attention
            and past_key_value is not None
            and past_key_value[0].shape[2] == key_value_states.shape[1]
        ):
            key_states = past_key_value[0]
            value_states = past_key_value[1]
        elif is_cross_attention:
            key_states = self._shape(self.k_proj(key_value_states), -1, bsz)
            value_states = self._shape(self.v_proj(key_value_states), -1, bsz)
        elif past_key_value is not None:
            key_states = self._shape(self.k_proj(hidden_states), -1, bsz)
            value_states = self._shape(self.v_proj(hidden_states), -1, bsz)
            key_states = torch.cat([past_key_value[0], key_states], dim=2)
            value_states = torch.cat([past_key_value[1], value_states], dim=2)
        else:
            key_states = self._shape(self.k_proj(hidden_states), -1, bsz)
            value_states = self._shape(self.v_proj(hidden_states), -1, bsz)
        if self.is_decoder:
            past_key_value = (key_states, value_states)
        proj_shape = (bsz * self.heads, -1, self.head_dim)
        query_states = self._shape(query_states, tgt_len, bsz).view(*proj_shape)
        key_states = key_states.reshape(*proj_shape)
        value_states = value_states.reshape(*proj_shape)
        src_len = key_states.size(1)
        attn_weights = torch.bmm(query_states, key_states.transpose(1, 2))
        if attn_weights.size() != (bsz * self.heads, tgt_len, src_len):
            raise ValueError(f"attention weights have the size {attn_weights.size()}")
        if attention_mask is not None:
            if attention_mask.size() != (bsz, 1, tgt_len, src_len):
                raise ValueError(f"the mask has the size {attention_mask.size()}")
            attn_weights = attn_weights.view(bsz, self.heads, tgt_len, src_len) + attention_mask
            attn_weights = attn_weights.view(bsz * self.heads, tgt_len, src_len)
        attn_weights = F.softmax(attn_weights, dim=-1)
        attn_output = torch.bmm(attn_weights, value_states)
        attn_output = attn_output.view(bsz, self.heads, tgt_len, self.head_dim).transpose(1, 2)
        return self.out_proj(attn_output.reshape(bsz, tgt_len, -1)), past_key_value


def expand_mask(mask, dtype, tgt_len):
    bsz, src_len = mask.size()
    expanded = mask[:, None, None, :].expand(bsz, 1, tgt_len, src_len).to(dtype)
    inverted = 1.0 - expanded
    return inverted.masked_fill(inverted.to(torch.bool), torch.finfo(dtype).min)


def make_causal_mask(shape, dtype, past_key_values_length):
    bsz, tgt_len = shape
    mask = torch.full((tgt_len, tgt_len), torch.finfo(dtype).min)
    mask_cond = torch.arange(mask.size(-1))
    mask.masked_fill_(mask_cond < (mask_cond + 1).view(mask.size(-1), 1), 0)
    mask = mask.to(dtype)
    if past_key_values_length > 0:
        mask = torch.cat([torch.zeros(tgt_len, past_key_values_length, dtype=dtype), mask], dim=-1)
    return mask[None, None, :, :].expand(bsz, 1, tgt_len, tgt_len + past_key_values_length)


class TranslationDecoderLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn = CrossAndSelfAttention(width, heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.encoder_attn = CrossAndSelfAttention(width, heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x, mask, encoder_hidden_states, encoder_mask, past_key_value=None):
        self_past = past_key_value[:2] if past_key_value is not None else None
        hidden, present = self.self_attn(x, past_key_value=self_past, attention_mask=mask)
        x = self.self_attn_layer_norm(x + hidden)
        cross_past = past_key_value[-2:] if past_key_value is not None else None
        hidden, cross_present = self.encoder_attn(
            x,
            key_value_states=encoder_hidden_states,
            past_key_value=cross_past,
            attention_mask=encoder_mask,
        )
        x = self.encoder_attn_layer_norm(x + hidden)
        present = present + cross_present
        x = self.final_layer_norm(x + self.fc2(F.gelu(self.fc1(x))))
        return x, present


class TranslationDecoder(nn.Module):
    """Four tensors a layer: the decoder's own keys and values, then the encoder's."""

    def __init__(self, vocabulary=50, width=16, heads=2, layers=2, positions=64) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.embed_positions = nn.Embedding(positions + 2, width)
        self.layers = nn.ModuleList(TranslationDecoderLayer(width, heads) for _ in range(layers))
        self.embed_scale = math.sqrt(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(
        self,
        input_ids: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values=None,
    ):
        past_length = past_key_values[0][0].shape[2] if past_key_values is not None else 0
        length = input_ids.shape[1]
        x = self.embed_tokens(input_ids) * self.embed_scale
        positions = torch.arange(past_length, past_length + length, device=input_ids.device)
        x = x + self.embed_positions(positions + 2)
        mask = None
        if length > 1:
            mask = make_causal_mask(input_ids.shape, x.dtype, past_length)
        if encoder_attention_mask is not None:
            encoder_attention_mask = expand_mask(encoder_attention_mask, x.dtype, length)
        presents = ()
        for i, layer in enumerate(self.layers):
            past = past_key_values[i] if past_key_values is not None else None
            x, present = layer(x, mask, encoder_hidden_states, encoder_attention_mask, past)
            presents += (present,)
        return self.lm_head(x), presents


class EncoderStates(nn.Module):
    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.mix = nn.GRU(width, width, batch_first=True)

    def forward(self, input_ids):
        return self.mix(self.embed(input_ids))[0]


class FusedMemoryDecoder(nn.Module):
    """Keys and values of the memory in one tensor (B, E, 2C), in a dict beside the own."""

    def __init__(self, vocabulary=50, width=16, heads=2) -> None:
        super().__init__()
        self.heads = heads
        self.emb = nn.Embedding(vocabulary, width)
        self.norm_memory = nn.LayerNorm(width)
        self.kv_memory = nn.Linear(width, 2 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.q_memory = nn.Linear(width, width)
        self.out = nn.Linear(width, vocabulary)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, tokens, memory, cache=None):
        x = self.emb(tokens)
        q, kv = self.qkv(x).split([x.shape[-1], 2 * x.shape[-1]], dim=-1)
        if cache is not None:
            kv = torch.cat([cache["self"], kv], dim=1)
        n, total = q.shape[1], kv.shape[1]
        k, v = kv.chunk(2, dim=-1)
        mask = torch.ones(n, total, dtype=torch.bool).tril(total - n)
        x = x + F.scaled_dot_product_attention(
            self.split(q), self.split(k), self.split(v), attn_mask=mask
        ).transpose(1, 2).flatten(2)
        if cache is None:
            memory_kv = self.kv_memory(self.norm_memory(memory))
        else:
            memory_kv = cache["memory"]
        k, v = memory_kv.chunk(2, dim=-1)
        q = self.split(self.q_memory(x))
        x = x + F.scaled_dot_product_attention(q, self.split(k), self.split(v)).transpose(
            1, 2
        ).flatten(2)
        return self.out(x), {"self": kv, "memory": memory_kv}


class SpeechTranslator(nn.Module):
    """The encoder inside: features and tokens in one call, ``enc_out`` for those who have it."""

    def __init__(self, features=5, vocabulary=50, width=16, heads=2) -> None:
        super().__init__()
        self.encoder = nn.Conv1d(features, width, 3, padding=1)
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.decoder = FusedMemoryDecoder(vocabulary, width, heads)

    def encode(self, features):
        x = F.gelu(self.encoder(features.transpose(1, 2))).transpose(1, 2)
        return x + self.rnn(x)[0]

    def forward(self, features=None, tokens=None, cache=None, enc_out=None):
        if enc_out is None:
            enc_out = self.encode(features)
        return self.decoder(tokens, enc_out, cache)


class ClassConditioned(nn.Module):
    """Four rows from one label, projected on the first call; their number is a constant."""

    def __init__(self, classes=7, vocabulary=50, width=16) -> None:
        super().__init__()
        self.label = nn.Embedding(classes, 4 * width)
        self.emb = nn.Embedding(vocabulary, width)
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.own = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, vocabulary)

    def forward(self, ids, label, past=None):
        x = self.emb(ids)
        k, v = self.own(x).chunk(2, -1)
        if past is None:
            rows = self.label(label).unflatten(-1, (4, -1))
            ck, cv = self.key(rows), self.value(rows)
        else:
            ck, cv = past[2], past[3]
            k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
        n, total = x.shape[1], k.shape[1]
        mask = torch.ones(n, total, dtype=torch.bool).tril(total - n)
        x = x + F.scaled_dot_product_attention(x, k, v, attn_mask=mask)
        x = x + F.scaled_dot_product_attention(x, ck, cv)
        return self.out(x), (k, v, ck, cv)
