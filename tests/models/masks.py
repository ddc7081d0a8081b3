"""Decoders that differ in how they keep a token from seeing what comes after it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .case import ModelCase, attention_mask, calls, left_padding, seeded, tokens


def _make_causal_mask(shape, dtype, device, past_key_values_length=0):
    bsz, tgt_len = shape
    mask = torch.full((tgt_len, tgt_len), torch.finfo(dtype).min, dtype=dtype, device=device)
    mask_cond = torch.arange(mask.size(-1), device=device)
    mask.masked_fill_(mask_cond < (mask_cond + 1).view(mask.size(-1), 1), 0)
    if past_key_values_length > 0:
        zeros = torch.zeros(tgt_len, past_key_values_length, dtype=dtype, device=device)
        mask = torch.cat([zeros, mask], dim=-1)
    return mask[None, None].expand(bsz, 1, tgt_len, tgt_len + past_key_values_length)


def _expand_mask(mask, dtype, tgt_len):
    bsz, src_len = mask.size()
    expanded_mask = mask[:, None, None, :].expand(bsz, 1, tgt_len, src_len).to(dtype)
    inverted_mask = 1.0 - expanded_mask
    return inverted_mask.masked_fill(inverted_mask.to(torch.bool), torch.finfo(dtype).min)


class OPTLearnedPositionalEmbedding(nn.Embedding):
    def __init__(self, num_embeddings, embedding_dim):
        # position 0 is for padding, and the first two ids were once reserved
        self.offset = 2
        super().__init__(num_embeddings + self.offset, embedding_dim)

    def forward(self, attention_mask, past_key_values_length=0):
        attention_mask = attention_mask.long()
        positions = torch.cumsum(attention_mask, dim=1).type_as(attention_mask) * attention_mask
        positions = positions.long() - 1
        positions = positions[:, past_key_values_length:]
        return super().forward(positions + self.offset)


class OPTAttention(nn.Module):
    def __init__(self, embed_dim, num_heads):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
        self.scaling = self.head_dim**-0.5
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def _shape(self, tensor, seq_len, bsz):
        tensor = tensor.view(bsz, seq_len, self.num_heads, self.head_dim)
        return tensor.transpose(1, 2).contiguous()

    def forward(self, hidden_states, past_key_value=None, attention_mask=None):
        bsz, tgt_len, embed_dim = hidden_states.size()
        query_states = self.q_proj(hidden_states) * self.scaling
        key_states = self._shape(self.k_proj(hidden_states), -1, bsz)
        value_states = self._shape(self.v_proj(hidden_states), -1, bsz)
        if past_key_value is not None:
            key_states = torch.cat([past_key_value[0], key_states], dim=2)
            value_states = torch.cat([past_key_value[1], value_states], dim=2)
        past_key_value = (key_states, value_states)
        proj_shape = (bsz * self.num_heads, -1, self.head_dim)
        query_states = self._shape(query_states, tgt_len, bsz).view(*proj_shape)
        key_states = key_states.view(*proj_shape)
        value_states = value_states.view(*proj_shape)
        src_len = key_states.size(1)
        attn_weights = torch.bmm(query_states, key_states.transpose(1, 2))
        if attn_weights.size() != (bsz * self.num_heads, tgt_len, src_len):
            raise ValueError(f"Attention weights have a wrong size: {attn_weights.size()}")
        attn_weights = attn_weights.view(bsz, self.num_heads, tgt_len, src_len) + attention_mask
        attn_weights = torch.max(attn_weights, torch.tensor(torch.finfo(attn_weights.dtype).min))
        attn_weights = attn_weights.view(bsz * self.num_heads, tgt_len, src_len)
        attn_output = torch.bmm(F.softmax(attn_weights, dim=-1), value_states)
        attn_output = attn_output.view(bsz, self.num_heads, tgt_len, self.head_dim)
        attn_output = attn_output.transpose(1, 2).reshape(bsz, tgt_len, embed_dim)
        return self.out_proj(attn_output), past_key_value


class OPTDecoder(nn.Module):
    """A causal mask only `if tgt_len > 1`, padding beside it, positions counted over the mask."""

    def __init__(self, vocab_size=50, hidden_size=16, layers=2, heads=2, max_positions=64):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.embed_positions = OPTLearnedPositionalEmbedding(max_positions, hidden_size)
        self.layers = nn.ModuleList([OPTAttention(hidden_size, heads) for _ in range(layers)])
        self.norms = nn.ModuleList([nn.LayerNorm(hidden_size) for _ in range(layers)])
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)

    def _prepare_decoder_attention_mask(self, attention_mask, shape, embeds, past_length):
        combined_attention_mask = None
        if shape[-1] > 1:
            combined_attention_mask = _make_causal_mask(
                shape, embeds.dtype, embeds.device, past_key_values_length=past_length
            )
        expanded_attn_mask = _expand_mask(attention_mask, embeds.dtype, tgt_len=shape[-1])
        return (
            expanded_attn_mask
            if combined_attention_mask is None
            else expanded_attn_mask + combined_attention_mask
        )

    def forward(self, input_ids, attention_mask=None, past_key_values=None):
        batch_size, seq_length = input_ids.shape
        past_length = past_key_values[0][0].shape[2] if past_key_values is not None else 0
        inputs_embeds = self.embed_tokens(input_ids)
        if attention_mask is None:
            attention_mask = torch.ones(
                batch_size, past_length + seq_length, device=inputs_embeds.device
            )
        pos_embeds = self.embed_positions(attention_mask, past_length)
        causal_attention_mask = self._prepare_decoder_attention_mask(
            attention_mask, input_ids.shape, inputs_embeds, past_length
        )
        hidden_states = inputs_embeds + pos_embeds
        next_decoder_cache = ()
        for idx, (layer, norm) in enumerate(zip(self.layers, self.norms)):
            past_key_value = past_key_values[idx] if past_key_values is not None else None
            attn, present = layer(norm(hidden_states), past_key_value, causal_attention_mask)
            hidden_states = hidden_states + attn
            next_decoder_cache += (present,)
        return self.lm_head(hidden_states), next_decoder_cache


class BatchedDecoder(nn.Module):
    """Left-padded batches: positions are counted over the mask where none are given."""

    def __init__(self, n_vocab=31, d_model=16, n_heads=4, n_layers=2, max_len=64):
        super().__init__()
        self.n_heads = n_heads
        self.tok = nn.Embedding(n_vocab, d_model)
        self.pos = nn.Embedding(max_len, d_model)
        self.qkv = nn.ModuleList([nn.Linear(d_model, 3 * d_model) for _ in range(n_layers)])
        self.proj = nn.ModuleList([nn.Linear(d_model, d_model) for _ in range(n_layers)])
        self.head = nn.Linear(d_model, n_vocab)

    def forward(self, input_ids, attention_mask, position_ids=None, past_key_values=None):
        if position_ids is None:
            position_ids = attention_mask.long().cumsum(-1) - 1
            position_ids.masked_fill_(attention_mask == 0, 1)
            if past_key_values is not None:
                position_ids = position_ids[:, -input_ids.shape[1] :]
        x = self.tok(input_ids) + self.pos(position_ids)
        bsz, q_len, dim = x.shape
        kv_len = attention_mask.shape[1]
        causal = torch.ones(q_len, kv_len, dtype=torch.bool, device=x.device).tril(kv_len - q_len)
        allowed = causal[None, None] & attention_mask[:, None, None, :].bool()
        bias = torch.zeros(allowed.shape, dtype=x.dtype, device=x.device)
        bias = bias.masked_fill_(~allowed, torch.finfo(x.dtype).min)
        presents = []
        for i in range(len(self.qkv)):
            h = F.layer_norm(x, (dim,))
            q, k, v = self.qkv[i](h).chunk(3, dim=-1)
            q, k, v = [t.reshape(bsz, q_len, self.n_heads, -1).transpose(1, 2) for t in (q, k, v)]
            if past_key_values is not None:
                k = torch.cat([past_key_values[i][0], k], dim=2)
                v = torch.cat([past_key_values[i][1], v], dim=2)
            presents.append((k, v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            x = x + self.proj[i](y.transpose(1, 2).reshape(bsz, q_len, dim))
        return self.head(x), presents


class StripedAttention(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.h = h
        self.in_proj = nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, d)

    def forward(self, x, mask, past=None):
        B, T, _ = x.shape
        q, k, v = self.in_proj(x).reshape(B, T, 3, self.h, -1).unbind(2)
        if past is not None:
            k = torch.cat([past["k"], k], 1)
            v = torch.cat([past["v"], v], 1)
        scores = torch.einsum("bthd,bshd->bhts", q, k).div_(q.shape[-1] ** 0.5)
        if mask is not None:
            scores.masked_fill_(mask, float("-inf"))
        y = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)
        return self.out(y.flatten(2)), {"k": k, "v": v}


class InPlaceMaskDecoder(nn.Module):
    """The mask is allocated and written in place, and only where more than one token is new."""

    def __init__(self, vocab=32, d=16, heads=2, layers=2):
        super().__init__()
        self.emb = nn.Embedding(vocab, d)
        self.pos = nn.Embedding(64, d)
        self.blocks = nn.ModuleList(StripedAttention(d, heads) for _ in range(layers))
        self.out = nn.Linear(d, vocab)

    def build_mask(self, T, P, device):
        mask = torch.ones(T, P + T, dtype=torch.bool, device=device)
        mask[:, P:] = torch.ones(T, T, dtype=torch.bool, device=device).triu_(1)
        mask[:, :P] = False
        return mask

    def forward(self, x, past=None):
        T = x.shape[1]
        P = 0 if past is None else past[0]["k"].shape[1]
        h = self.emb(x) + self.pos(torch.arange(P, P + T, device=x.device))
        mask = self.build_mask(T, P, x.device) if T > 1 else None
        present = []
        for i, block in enumerate(self.blocks):
            y, kv = block(h, mask, past[i] if past is not None else None)
            h = h + y
            present.append(kv)
        return self.out(h), present


class HStackMaskDecoder(nn.Module):
    """A square additive mask with a block of zeros stacked before it, as in Llama's reference."""

    def __init__(self, vocab_size=36, width=16, n_heads=2):
        super().__init__()
        self.n_heads = n_heads
        self.embedding = nn.Embedding(vocab_size, width)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, token, k_cache=None, v_cache=None):
        b, s = token.shape
        start_pos = 0 if k_cache is None else k_cache.shape[2]
        x = self.embedding(token)
        mask = None
        if s > 1:
            mask = torch.full((s, s), float("-inf"), device=x.device)
            mask = torch.triu(mask, diagonal=1)
            mask = torch.hstack([torch.zeros((s, start_pos), device=x.device), mask]).type_as(x)
        q, k, v = self.to_qkv(x).view(b, s, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        if k_cache is not None and v_cache is not None:
            k, v = torch.cat((k_cache, k), 2), torch.cat((v_cache, v), 2)
        scores = q @ k.mT * (k.shape[-1] ** -0.5)
        if mask is not None:
            scores = scores + mask
        y = (F.softmax(scores, -1) @ v).transpose(1, 2).flatten(2)
        logits = F.linear(self.norm(x + self.to_out(y)), self.embedding.weight)
        return {"logits": logits, "k_cache": k, "v_cache": v}


def _key_value_calls(draw):
    def prefill(batch, query, generator):
        return (draw(batch, 0, query, generator),), {}

    def step(outputs, batch, past, query, generator):
        token = draw(batch, past, query, generator)
        return (token,), {"k_cache": outputs["k_cache"], "v_cache": outputs["v_cache"]}

    return {"prefill": prefill, "step": step}


def _padded(batch, past, query, generator):
    return {"attention_mask": attention_mask(batch, past, query)}


def _left_padded(batch, past, query, generator):
    return {"attention_mask": left_padding(batch, past, query)}


CASES = (
    ModelCase(
        "opt_mask_for_several_tokens",
        seeded(OPTDecoder),
        **calls(tokens(50), cache="past_key_values", also=_padded),
        patterns=("P1", "P2", "P11", "P15"),
        example_inputs={
            "input_ids": torch.tensor([[2, 7, 9, 11], [2, 4, 6, 8]]),
            "attention_mask": torch.ones(2, 4, dtype=torch.long),
        },
    ),
    ModelCase(
        "opt_mask_left_out",
        seeded(OPTDecoder, seed=1),
        **calls(tokens(50), cache="past_key_values"),
        patterns=("P1", "P2", "P11", "P15"),
    ),
    ModelCase(
        "left_padding_with_counted_positions",
        seeded(BatchedDecoder),
        **calls(tokens(31), cache="past_key_values", also=_left_padded),
        patterns=("P1", "P15", "P16"),
        example_inputs=(torch.tensor([[0, 0, 3], [4, 5, 6]]), torch.tensor([[0, 0, 1], [1, 1, 1]])),
        chunk_invariant=False,  # a padded token sees all padded tokens of its own call
    ),
    ModelCase(
        "mask_written_in_place",
        seeded(InPlaceMaskDecoder),
        **calls(tokens(32)),
        patterns=("P1", "P2", "P15"),
    ),
    ModelCase(
        "mask_of_stacked_blocks",
        seeded(HStackMaskDecoder),
        **_key_value_calls(tokens(36)),
        patterns=("P1", "P2", "P15"),
        example_inputs={"token": torch.tensor([[1, 2, 3, 4, 5, 6]])},
    ),
)
