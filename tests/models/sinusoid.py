"""Decoders with fixed sinusoidal positions, or positions that the caller gives."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .case import ModelCase, calls, frames, seeded, tokens


class SinusoidalPositionalEmbedding(nn.Module):
    def __init__(self, embedding_dim, padding_idx, init_size=64):
        super().__init__()
        self.padding_idx = padding_idx
        self.register_buffer("weights", self.get_embedding(init_size, embedding_dim, padding_idx))

    @staticmethod
    def get_embedding(num_embeddings, embedding_dim, padding_idx=None):
        half_dim = embedding_dim // 2
        emb = math.log(10000) / (half_dim - 1)
        emb = torch.exp(torch.arange(half_dim, dtype=torch.float) * -emb)
        emb = torch.arange(num_embeddings, dtype=torch.float).unsqueeze(1) * emb.unsqueeze(0)
        emb = torch.cat([torch.sin(emb), torch.cos(emb)], dim=1).view(num_embeddings, -1)
        if padding_idx is not None:
            emb[padding_idx, :] = 0
        return emb

    def forward(self, input, start=0):
        bsz, seq_len = input.shape[:2]
        positions = torch.arange(start, start + seq_len, device=input.device)
        positions = positions + self.padding_idx + 1
        return self.weights.index_select(0, positions).view(1, seq_len, -1).expand(bsz, -1, -1)


class FairseqDecoderLayer(nn.Module):
    def __init__(self, embed_dim, attention_heads):
        super().__init__()
        self.num_heads = attention_heads
        self.head_dim = embed_dim // attention_heads
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        self.self_attn_layer_norm = nn.LayerNorm(embed_dim)
        self.fc1, self.fc2 = nn.Linear(embed_dim, 32), nn.Linear(32, embed_dim)
        self.final_layer_norm = nn.LayerNorm(embed_dim)

    def self_attn(self, query, self_attn_mask, saved_state):
        # T x B x C, as everything in fairseq
        tgt_len, bsz, embed_dim = query.size()
        q = self.q_proj(query) * self.head_dim**-0.5
        k, v = self.k_proj(query), self.v_proj(query)
        q, k, v = (
            t.contiguous().view(-1, bsz * self.num_heads, self.head_dim).transpose(0, 1)
            for t in (q, k, v)
        )
        if saved_state is not None:
            # saved states are stored with shape (bsz, num_heads, seq_len, head_dim)
            prev_key = saved_state["prev_key"].view(bsz * self.num_heads, -1, self.head_dim)
            prev_value = saved_state["prev_value"].view(bsz * self.num_heads, -1, self.head_dim)
            k = torch.cat([prev_key, k], dim=1)
            v = torch.cat([prev_value, v], dim=1)
        saved_state = {
            "prev_key": k.view(bsz, self.num_heads, -1, self.head_dim),
            "prev_value": v.view(bsz, self.num_heads, -1, self.head_dim),
        }
        attn_weights = torch.bmm(q, k.transpose(1, 2))
        if self_attn_mask is not None:
            attn_weights += self_attn_mask.unsqueeze(0)
        attn = torch.bmm(F.softmax(attn_weights, dim=-1), v)
        return self.out_proj(attn.transpose(0, 1).reshape(tgt_len, bsz, embed_dim)), saved_state

    def forward(self, x, self_attn_mask=None, saved_state=None):
        y, saved_state = self.self_attn(x, self_attn_mask, saved_state)
        x = self.self_attn_layer_norm(x + y)
        return self.final_layer_norm(x + self.fc2(F.relu(self.fc1(x)))), saved_state


class FairseqDecoder(nn.Module):
    """Saved states in a dict per layer, merged and split heads around the join, time in front."""

    def __init__(self, num_tokens=39, embed_dim=16, layers=2, attention_heads=2):
        super().__init__()
        self.padding_idx = 1
        self.embed_tokens = nn.Embedding(num_tokens, embed_dim, self.padding_idx)
        self.embed_scale = math.sqrt(embed_dim)
        self.embed_positions = SinusoidalPositionalEmbedding(embed_dim, self.padding_idx)
        self.layers = nn.ModuleList(
            [FairseqDecoderLayer(embed_dim, attention_heads) for _ in range(layers)]
        )
        self.output_projection = nn.Linear(embed_dim, num_tokens, bias=False)
        self.output_projection.weight = self.embed_tokens.weight

    def buffered_future_mask(self, tensor, prev_len):
        dim = tensor.size(0)
        mask = torch.triu(torch.full([dim, dim], float("-inf"), dtype=tensor.dtype), 1)
        return torch.cat([tensor.new_zeros(dim, prev_len), mask], dim=1)

    def forward(self, prev_output_tokens, incremental_states=None):
        prev_len = 0
        if incremental_states is not None:
            prev_len = incremental_states[0]["prev_key"].size(2)
        x = self.embed_scale * self.embed_tokens(prev_output_tokens)
        x = x + self.embed_positions(prev_output_tokens, start=prev_len)
        x = x.transpose(0, 1)
        self_attn_mask = self.buffered_future_mask(x, prev_len)
        new_states = []
        for idx, layer in enumerate(self.layers):
            state = None if incremental_states is None else incremental_states[idx]
            x, state = layer(x, self_attn_mask, state)
            new_states.append(state)
        return self.output_projection(x.transpose(0, 1)), {"incremental_states": new_states}


class PositionalEncoding(nn.Module):
    def __init__(self, d_model, max_len=64):
        super().__init__()
        position = torch.arange(max_len).unsqueeze(1)
        div_term = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10000.0) / d_model))
        pe = torch.zeros(1, max_len, d_model)
        pe[0, :, 0::2] = torch.sin(position * div_term)
        pe[0, :, 1::2] = torch.cos(position * div_term)
        self.register_buffer("pe", pe)

    def forward(self, x, offset: int = 0):
        if offset > 0:
            return x + self.pe[:, offset : offset + x.size(1)]
        return x + self.pe[:, : x.size(1)]


class MotionDecoder(nn.Module):
    """Poses in, poses out; the layers' inputs are remembered, and keys computed anew."""

    def __init__(self, joints=6, d_model=16, nhead=2, num_layers=2):
        super().__init__()
        self.nhead = nhead
        self.embed = nn.Linear(joints * 3, d_model)
        self.pos = PositionalEncoding(d_model)
        self.wq = nn.ModuleList([nn.Linear(d_model, d_model) for _ in range(num_layers)])
        self.wk = nn.ModuleList([nn.Linear(d_model, d_model) for _ in range(num_layers)])
        self.wv = nn.ModuleList([nn.Linear(d_model, d_model) for _ in range(num_layers)])
        self.norm = nn.ModuleList([nn.LayerNorm(d_model) for _ in range(num_layers)])
        self.to_pose = nn.Linear(d_model, joints * 3)

    def forward(self, poses, history: list[torch.Tensor] | None = None):
        offset = history[0].size(1) if history is not None else 0
        x = self.pos(self.embed(poses.flatten(2)), offset)
        remembered = []
        for i in range(len(self.wq)):
            context = x
            if history is not None:
                context = torch.cat([history[i], x], dim=1)
            remembered.append(context)
            q, k, v = self.wq[i](x), self.wk[i](context), self.wv[i](context)
            q, k, v = (t.unflatten(-1, (self.nhead, -1)).movedim(2, 1) for t in (q, k, v))
            later = torch.arange(k.size(2)) > torch.arange(offset, k.size(2)).unsqueeze(-1)
            bias = torch.zeros(later.shape, dtype=x.dtype).masked_fill(later, -torch.inf)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            x = self.norm[i](x + y.movedim(1, 2).flatten(2))
        return self.to_pose(x).unflatten(-1, (-1, 3)), remembered


def _poses(batch, past, query, generator):
    return frames(18)(batch, past, query, generator).unflatten(-1, (6, 3))


class ExplicitPositionsLM(nn.Module):
    """Positions come from the caller, and the past is split over two arguments."""

    def __init__(self, vocab=34, dim=16, heads=4, depth=2):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, dim), nn.Embedding(64, dim)
        self.attn_in = nn.ModuleList([nn.Linear(dim, 3 * dim) for _ in range(depth)])
        self.attn_out = nn.ModuleList([nn.Linear(dim, dim) for _ in range(depth)])
        self.heads = heads

    def forward(self, input_ids, position_ids, past_keys=None, past_values=None):
        x = self.wte(input_ids) + self.wpe(position_ids)
        keys, values = [], []
        for i, (inp, out) in enumerate(zip(self.attn_in, self.attn_out)):
            q, k, v = inp(x).chunk(3, -1)
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
            if past_keys is not None:
                k = torch.cat([past_keys[i], k], dim=2)
            if past_values is not None:
                v = torch.cat([past_values[i], v], dim=2)
            keys.append(k)
            values.append(v)
            columns = torch.arange(k.size(2), device=x.device)
            rows = columns[-q.size(2) :, None]
            score = (q @ k.mT).div(math.sqrt(k.size(-1))) + (columns > rows) * -1e9
            x = x + out((score.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return F.linear(x, self.wte.weight), keys, values


def _explicit_position_calls(draw):
    def given(batch, past, query, generator):
        positions = torch.arange(past, past + query).expand(batch, -1)
        return {"input_ids": draw(batch, past, query, generator), "position_ids": positions}

    def prefill(batch, query, generator):
        return (), given(batch, 0, query, generator)

    def step(outputs, batch, past, query, generator):
        _, keys, values = outputs
        inputs = given(batch, past, query, generator)
        return (), {**inputs, "past_keys": keys, "past_values": values}

    return {"prefill": prefill, "step": step}


CASES = (
    ModelCase(
        "fairseq_saved_states",
        seeded(FairseqDecoder),
        **calls(
            tokens(39),
            cache="incremental_states",
            take=lambda out: out[1]["incremental_states"],
        ),
        patterns=("P1", "P2"),
    ),
    ModelCase(
        "poses_with_remembered_inputs",
        seeded(MotionDecoder),
        **calls(_poses, cache="history"),
        patterns=("P1", "P2", "P5", "P11"),
        example_inputs=(torch.linspace(-1, 1, 72).view(1, 4, 6, 3),),
    ),
    ModelCase(
        "keys_and_values_in_two_arguments",
        seeded(ExplicitPositionsLM),
        **_explicit_position_calls(tokens(34)),
        patterns=("P1",),
        example_inputs=(torch.tensor([[5, 4, 3]]), torch.tensor([[0, 1, 2]])),
    ),
)
