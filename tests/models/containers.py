"""Decoders that differ in what holds the cache: tuples, dicts, classes of their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .case import ModelCase, calls, seeded, time_major, tokens


class KVCache(NamedTuple):
    keys: torch.Tensor
    values: torch.Tensor


class Decoded(NamedTuple):
    caches: list[KVCache]
    logits: torch.Tensor


class Mixer(nn.Module):
    def __init__(self, width, n_head):
        super().__init__()
        self.n_head = n_head
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x, mask, cache=None):
        q, k, v = self.query(x), self.key(x), self.value(x)
        if cache is not None:
            k = torch.cat([cache.keys, k], dim=1)
            v = torch.cat([cache.values, v], dim=1)
        return self.out(self.qkv_attention(q, k, v, mask)), KVCache(k, v)

    def qkv_attention(self, q, k, v, mask):
        _, n_ctx, n_state = q.shape
        scale = (n_state // self.n_head) ** -0.25
        q = q.view(*q.shape[:2], self.n_head, -1).permute(0, 2, 1, 3) * scale
        k = k.view(*k.shape[:2], self.n_head, -1).permute(0, 2, 3, 1) * scale
        v = v.view(*v.shape[:2], self.n_head, -1).permute(0, 2, 1, 3)
        qk = q @ k
        offset = k.shape[-1] - n_ctx
        qk = qk + mask[offset : offset + n_ctx, : offset + n_ctx]
        w = F.softmax(qk.float(), dim=-1).to(q.dtype)
        return (w @ v).permute(0, 2, 1, 3).flatten(start_dim=2)


class TextDecoder(nn.Module):
    """Whisper's decoder without its encoder: flat caches in named tuples, before the logits."""

    def __init__(self, n_vocab=35, n_ctx=64, n_state=16, n_head=4, n_layer=2):
        super().__init__()
        self.token_embedding = nn.Embedding(n_vocab, n_state)
        self.positional_embedding = nn.Parameter(torch.empty(n_ctx, n_state))
        self.blocks = nn.ModuleList([Mixer(n_state, n_head) for _ in range(n_layer)])
        self.norms = nn.ModuleList([nn.LayerNorm(n_state) for _ in range(n_layer)])
        self.ln = nn.LayerNorm(n_state)
        mask = torch.empty(n_ctx, n_ctx).fill_(float("-inf")).triu_(1)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x, caches: list[KVCache] | None = None) -> Decoded:
        offset = caches[0].keys.shape[1] if caches else 0
        x = self.token_embedding(x) + self.positional_embedding[offset : offset + x.shape[-1]]
        new_caches = []
        for i, (block, norm) in enumerate(zip(self.blocks, self.norms)):
            y, cache = block(norm(x), self.mask, caches[i] if caches else None)
            x = x + y
            new_caches.append(cache)
        logits = self.ln(x) @ torch.transpose(self.token_embedding.weight, 0, 1)
        return Decoded(new_caches, logits)


@dataclass
class DecoderState:
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)

    @property
    def length(self) -> int:
        return self.keys[0].shape[0]


@dataclass
class LMOutput:
    state: DecoderState
    logits: torch.Tensor
    loss: torch.Tensor | None = None


class SequenceFirstLM(nn.Module):
    """Caches of shape (P, B, H, D) in a dataclass, with the length as a property."""

    def __init__(self, vocab=42, hidden=16, heads=2, layers=2):
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(vocab, hidden)
        self.positions = nn.Embedding(64, hidden)
        self.query_key_value = nn.ModuleList([nn.Linear(hidden, 3 * hidden) for _ in range(layers)])
        self.dense = nn.ModuleList([nn.Linear(hidden, hidden) for _ in range(layers)])
        self.output_layer = nn.Linear(hidden, vocab, bias=False)

    def attention(self, i, hidden_states, state, new_state):
        sq, b, _ = hidden_states.shape
        mixed = self.query_key_value[i](hidden_states)
        query, key, value = mixed.view(sq, b, self.heads, -1).chunk(3, dim=-1)
        if state is not None:
            key = torch.cat((state.keys[i], key), dim=0)
            value = torch.cat((state.values[i], value), dim=0)
        new_state.keys.append(key)
        new_state.values.append(value)
        query, keys, values = [t.permute(1, 2, 0, 3) for t in [query, key, value]]
        sk = keys.shape[2]
        ltor = torch.arange(sk)[None, :] <= torch.arange(sk - sq, sk)[:, None]
        context = F.scaled_dot_product_attention(query, keys, values, attn_mask=ltor)
        return self.dense[i](context.permute(2, 0, 1, 3).reshape(sq, b, -1))

    def forward(self, input_ids, state: DecoderState | None = None) -> LMOutput:
        offset = state.length if state is not None else 0
        position_ids = offset + torch.arange(input_ids.shape[0], device=input_ids.device)
        hidden_states = self.embedding(input_ids) + self.positions(position_ids)[:, None]
        new_state = DecoderState()
        for i in range(len(self.dense)):
            h = F.layer_norm(hidden_states, hidden_states.shape[-1:])
            hidden_states = hidden_states + self.attention(i, h, state, new_state)
        return LMOutput(new_state, self.output_layer(hidden_states))


class QwenLikeAttention(nn.Module):
    def __init__(self, hidden_size, num_heads, layer_name):
        super().__init__()
        self.layer_name = layer_name
        self.num_heads = num_heads
        self.c_attn = nn.Linear(hidden_size, 3 * hidden_size)
        self.c_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states, kv_cache, new_cache):
        bsz, q_len, _ = hidden_states.shape
        mixed_x_layer = self.c_attn(hidden_states).view(bsz, q_len, self.num_heads, -1)
        query, key, value = mixed_x_layer.chunk(3, dim=-1)
        past = None if kv_cache is None else kv_cache[self.layer_name]
        if past is not None:
            key = torch.cat((past["k"], key), dim=-3)
            value = torch.cat((past["v"], value), dim=-3)
        new_cache[self.layer_name] = {"k": key, "v": value}
        k_len = key.size(1)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.size(-1) ** 0.5
        causal = torch.ones(k_len, k_len, dtype=torch.bool).tril()[k_len - q_len :]
        scores = torch.where(causal, scores, float("-inf"))
        out = torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, -1), value)
        return self.c_proj(out.reshape(bsz, q_len, -1))


class BatchDictModel(nn.Module):
    """One dict goes in, with the cache or without it, and one dict comes out; layers go by name."""

    def __init__(self, vocab=37, hidden_size=16, num_heads=2, num_layers=2):
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden_size)
        self.pos = nn.Embedding(64, hidden_size)
        self.layers = nn.ModuleList(
            [QwenLikeAttention(hidden_size, num_heads, f"layer_{i}") for i in range(num_layers)]
        )
        self.lm_head = nn.Linear(hidden_size, vocab)

    def forward(self, batch):
        tokens = batch["tokens"]
        kv_cache = batch.get("kv_cache", None)
        past_length = kv_cache["layer_0"]["k"].size(1) if kv_cache is not None else 0
        x = self.embed(tokens) + self.pos.weight[past_length : past_length + tokens.size(1)]
        new_cache = {}
        for layer in self.layers:
            x = x + layer(x, kv_cache, new_cache)
        return {"kv_cache": new_cache, "logits": self.lm_head(x)}


def _batch_calls(draw):
    def prefill(batch, query, generator):
        return ({"tokens": draw(batch, 0, query, generator)},), {}

    def step(outputs, batch, past, query, generator):
        tokens = draw(batch, past, query, generator)
        return ({"tokens": tokens, "kv_cache": outputs["kv_cache"]},), {}

    return {"prefill": prefill, "step": step}


class BigCodeAttention(nn.Module):
    def __init__(self, embed_dim, num_heads):
        super().__init__()
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.head_dim = embed_dim // num_heads
        self.kv_dim = self.head_dim
        self.c_attn = nn.Linear(embed_dim, embed_dim + 2 * self.kv_dim)
        self.c_proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, hidden_states, layer_past=None):
        sizes = (self.embed_dim, 2 * self.kv_dim)
        query, key_value = self.c_attn(hidden_states).split(sizes, dim=2)
        if layer_past is not None:
            key_value = torch.cat((layer_past, key_value), dim=-2)
        present = key_value
        key, value = key_value.split((self.head_dim, self.head_dim), dim=-1)
        batch_size, query_length, _ = query.shape
        key_length = key.size(-2)
        query = query.reshape(batch_size, query_length * self.num_heads, self.head_dim)
        weights = torch.bmm(query, key.transpose(-1, -2)) * self.head_dim**-0.5
        weights = weights.view(batch_size, query_length, self.num_heads, key_length)
        rows = torch.arange(key_length - query_length, key_length, device=query.device)
        mask = rows[:, None, None] >= torch.arange(key_length, device=query.device)
        mask_value = torch.full([], torch.finfo(weights.dtype).min, dtype=weights.dtype)
        weights = torch.where(mask, weights, mask_value)
        weights = weights.softmax(-1).view(batch_size, query_length * self.num_heads, key_length)
        attn_output = torch.bmm(weights, value).view(batch_size, query_length, self.embed_dim)
        return self.c_proj(attn_output), present


class BigCodeModel(nn.Module):
    """Multi-query attention whose keys and values share one (B, P, 2 D) tensor."""

    def __init__(self, vocab=33, n_embd=16, n_head=4, n_layer=3):
        super().__init__()
        self.wte = nn.Embedding(vocab, n_embd)
        self.wpe = nn.Embedding(64, n_embd)
        self.h = nn.ModuleList([BigCodeAttention(n_embd, n_head) for _ in range(n_layer)])
        self.lm_head = nn.Linear(n_embd, vocab, bias=False)

    def forward(self, input_ids, past_key_values=None):
        if past_key_values is None:
            past_length = 0
            past_key_values = tuple([None] * len(self.h))
        else:
            past_length = past_key_values[0].size(-2)
        position_ids = torch.arange(past_length, input_ids.shape[-1] + past_length)
        hidden_states = self.wte(input_ids) + self.wpe(position_ids.unsqueeze(0))
        presents = []
        for block, layer_past in zip(self.h, past_key_values):
            attn, present = block(hidden_states, layer_past)
            hidden_states = hidden_states + F.gelu(attn)
            presents.append(present)
        return self.lm_head(hidden_states), tuple(presents)


class Append(nn.Module):
    """The smallest cache there is: what came before, if anything, and what is new."""

    def forward(self, x, y):
        if x is None:
            return y
        else:
            return torch.cat((x, y), dim=1)


def _append_calls():
    def rows(batch, past, query, generator):
        return torch.randn(batch, 64, 3, generator=generator)[:, past : past + query]

    def prefill(batch, query, generator):
        return (None, rows(batch, 0, query, generator)), {}

    def step(outputs, batch, past, query, generator):
        return (outputs, rows(batch, past, query, generator)), {}

    return {"prefill": prefill, "step": step}


class KeyedByLayersAlike(nn.Module):
    """A dict keyed by two linear layers, which are written alike."""

    def __init__(self, dim=8):
        super().__init__()
        self.embed, self.out = nn.Embedding(35, dim), nn.Linear(dim, 35)
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, ids, kv_cache=None):
        kv_cache = {} if kv_cache is None else dict(kv_cache)
        x = self.embed(ids)
        for layer in (self.key, self.value):
            rows = layer(x)
            if layer in kv_cache:
                rows = torch.cat([kv_cache[layer], rows], dim=1)
            kv_cache[layer] = rows
        scores = self.query(x) @ kv_cache[self.key].transpose(1, 2)
        hidden = torch.full(scores.shape[1:], -torch.inf).triu(1 + scores.shape[2] - x.shape[1])
        return self.out((scores + hidden).softmax(-1) @ kv_cache[self.value]), kv_cache


CASES = (
    ModelCase(
        "append",
        seeded(Append),
        **_append_calls(),
        patterns=("P1",),
        example_inputs=(None, torch.ones(2, 3, 3)),
    ),
    ModelCase(
        "named_tuples_before_the_logits",
        seeded(TextDecoder),
        **calls(tokens(35), take=lambda out: out.caches),
        patterns=("P1", "P2", "P15"),
    ),
    ModelCase(
        "dataclass_with_time_first",
        seeded(SequenceFirstLM),
        **calls(time_major(tokens(42)), cache="state", take=lambda out: out.state),
        patterns=("P1", "P2"),
        example_inputs=(torch.tensor([[2, 3], [5, 7], [11, 13], [17, 19]]),),
    ),
    ModelCase(
        "dict_in_a_dict_argument",
        seeded(BatchDictModel),
        **_batch_calls(tokens(37)),
        patterns=("P1", "P2"),
        example_inputs=({"tokens": torch.tensor([[9, 8, 7, 6]])},),
    ),
    ModelCase(
        "keyed_by_layers_alike",
        seeded(KeyedByLayersAlike),
        **calls(tokens(35), cache="kv_cache"),
        patterns=("P6",),
    ),
    ModelCase(
        "fused_key_value_tensor",
        seeded(BigCodeModel),
        **calls(tokens(33), cache="past_key_values"),
        patterns=("P1", "P2", "P3"),
    ),
)
