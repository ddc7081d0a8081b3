"""Decoders that remember hidden states, in the manner of GLM and XLNet."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .case import ModelCase, calls, frames, seeded, tokens


class GLMSelfAttention(nn.Module):
    def __init__(self, hidden_size, num_attention_heads):
        super().__init__()
        self.num_heads = num_attention_heads
        self.head_size = hidden_size // num_attention_heads
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.dense = nn.Linear(hidden_size, hidden_size)

    def _transpose_for_scores(self, tensor):
        return tensor.view(*tensor.size()[:-1], self.num_heads, self.head_size).permute(0, 2, 1, 3)

    def forward(self, hidden_states, ltor_mask, mem=None):
        query_length = hidden_states.size(1)
        if mem is None:
            mixed = self.query_key_value(hidden_states)
            mixed_query, mixed_key, mixed_value = torch.chunk(mixed, 3, dim=-1)
        else:
            cat = torch.cat((mem, hidden_states), 1)
            mixed = self.query_key_value(cat)
            mixed_query, mixed_key, mixed_value = torch.chunk(mixed, 3, dim=-1)
            mixed_query = mixed_query[:, -query_length:]
        query_layer = self._transpose_for_scores(mixed_query)
        key_layer = self._transpose_for_scores(mixed_key)
        value_layer = self._transpose_for_scores(mixed_value)
        scores = torch.matmul(query_layer / math.sqrt(self.head_size), key_layer.transpose(-1, -2))
        scores = torch.mul(scores, ltor_mask) - 10000.0 * (1.0 - ltor_mask)
        context = torch.matmul(F.softmax(scores, dim=-1), value_layer)
        context = context.permute(0, 2, 1, 3).contiguous()
        return self.dense(context.view(*context.size()[:-2], -1))


class GLMLayer(nn.Module):
    def __init__(self, hidden_size, num_attention_heads):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(hidden_size)
        self.attention = GLMSelfAttention(hidden_size, num_attention_heads)
        self.post_attention_layernorm = nn.LayerNorm(hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 2 * hidden_size),
            nn.GELU(),
            nn.Linear(2 * hidden_size, hidden_size),
        )

    def forward(self, hidden_states, ltor_mask, mem=None):
        layernorm_output = self.input_layernorm(hidden_states)
        mem = self.input_layernorm(mem) if mem is not None else None
        layernorm_input = hidden_states + self.attention(layernorm_output, ltor_mask, mem)
        return layernorm_input + self.mlp(self.post_attention_layernorm(layernorm_input))


class GLMModel(nn.Module):
    """Variadic `*mems`, kept to `max_memory_length` in two cases, as GLM's `update_mems` does."""

    def __init__(self, vocab=40, hidden_size=16, layers=2, heads=2, max_memory_length=6):
        super().__init__()
        self.max_memory_length = max_memory_length
        self.word_embeddings = nn.Embedding(vocab, hidden_size)
        self.position_embeddings = nn.Embedding(64, hidden_size)
        self.layers = nn.ModuleList([GLMLayer(hidden_size, heads) for _ in range(layers)])
        self.final_layernorm = nn.LayerNorm(hidden_size)

    def forward(self, input_ids, position_ids, *mems):
        batch_size, query_length = input_ids.size()
        memory_length = mems[0].size(1) if mems else 0
        hidden_states = self.word_embeddings(input_ids) + self.position_embeddings(position_ids)
        mask = torch.tril(hidden_states.new_ones((1, query_length, query_length)))
        if memory_length > 0:
            mask = mask.expand(batch_size, -1, -1)
            seen = hidden_states.new_ones((batch_size, query_length, memory_length))
            mask = torch.cat((seen, mask), dim=2)
        mask = mask.unsqueeze(1)
        mem_layers = [hidden_states.detach()] if self.max_memory_length > 0 else []
        for i, layer in enumerate(self.layers):
            mem_i = mems[i] if mems else None
            hidden_states = layer(hidden_states, mask, mem=mem_i)
            mem_layers.append(hidden_states.detach())
        output = self.final_layernorm(hidden_states)
        mem_layers = self.update_mems(mem_layers, mems)
        return (F.linear(output, self.word_embeddings.weight), *mem_layers)

    def update_mems(self, hiddens, mems):
        memory_length = mems[0].size(1) if mems else 0
        with torch.no_grad():
            query_length = hiddens[0].size(1)
            new_memory_length = min(self.max_memory_length, memory_length + query_length)
            new_mems = []
            for i in range(len(hiddens)):
                if new_memory_length <= query_length:
                    new_mems.append(hiddens[i][:, -new_memory_length:])
                else:
                    kept = mems[i][:, -new_memory_length + query_length :]
                    new_mems.append(torch.cat((kept, hiddens[i]), dim=1))
        return new_mems


def _glm_calls(draw):
    def ids(batch, past, query, generator):
        positions = torch.arange(past, past + query).expand(batch, query)
        return draw(batch, past, query, generator), positions

    def prefill(batch, query, generator):
        return ids(batch, 0, query, generator), {}

    def step(outputs, batch, past, query, generator):
        return (*ids(batch, past, query, generator), *outputs[1:]), {}

    return {"prefill": prefill, "step": step}


class MusicBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.pre = nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.ff = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.ELU())

    def forward(self, x, memory=None):
        h = self.pre(x)
        context = h if memory is None else torch.cat([self.pre(memory), h], dim=1)
        q, k = h.size(1), context.size(1)
        hidden = torch.ones(q, k, dtype=torch.bool, device=x.device).triu(1 + k - q)
        y, _ = self.attn(h, context, context, attn_mask=hidden, need_weights=False)
        x = x + y
        return x + self.ff(x)


class PianoRollModel(nn.Module):
    """`nn.MultiheadAttention` over a memory of earlier blocks, all layers in one tensor."""

    def __init__(self, pitches=20, dim=16, heads=2, layers=2, span=64):
        super().__init__()
        self.span = span
        self.inp = nn.Linear(pitches, dim)
        self.blocks = nn.ModuleList([MusicBlock(dim, heads) for _ in range(layers)])
        self.out = nn.Linear(dim, pitches)

    def forward(self, roll, memory=None):
        x = self.inp(roll)
        seen = []
        for i, block in enumerate(self.blocks):
            seen.append(x)
            x = block(x, None if memory is None else memory[i])
        seen = torch.stack(seen)
        if memory is not None:
            seen = torch.cat([memory, seen], dim=2)
        return {"onsets": self.out(x), "memory": seen[:, :, -self.span :]}


class XLNetStyleLM(nn.Module):
    """`mems` cut to the last `mem_len` states, with or without earlier ones; layers are shared."""

    def __init__(self, vocab_size=34, d_model=16, n_head=4, n_layer=3, mem_len=4):
        super().__init__()
        self.mem_len, self.n_head, self.n_layer = mem_len, n_head, n_layer
        self.word_embedding = nn.Embedding(vocab_size, d_model)
        self.q, self.kv = nn.Linear(d_model, d_model), nn.Linear(d_model, 2 * d_model)
        self.o, self.norm = nn.Linear(d_model, d_model), nn.LayerNorm(d_model)

    def cache_mem(self, curr_out, prev_mem):
        if prev_mem is None:
            new_mem = curr_out[-self.mem_len :]
        else:
            new_mem = torch.cat([prev_mem, curr_out], dim=0)[-self.mem_len :]
        return new_mem.detach()

    def forward(self, input_ids, mems=None):
        output_h = self.word_embedding(input_ids.transpose(0, 1))
        if mems is None:
            mems = [None] * self.n_layer
        new_mems = ()
        for mem in mems:
            new_mems = new_mems + (self.cache_mem(output_h, mem),)
            cat = output_h if mem is None else torch.cat([mem, output_h], dim=0)
            q = self.q(output_h).unflatten(-1, (self.n_head, -1))
            k, v = self.kv(cat).unflatten(-1, (self.n_head, -1)).chunk(2, dim=-1)
            score = torch.einsum("ibnd,jbnd->bnij", q, k) / math.sqrt(q.size(-1))
            distance = torch.arange(cat.size(0))[None] - torch.arange(q.size(0))[:, None]
            score = score - 1e30 * (distance > cat.size(0) - q.size(0)).to(score.dtype)
            y = torch.einsum("bnij,jbnd->ibnd", score.softmax(-1), v).flatten(2)
            output_h = self.norm(output_h + self.o(y))
        logits = F.linear(output_h, self.word_embedding.weight)
        return logits.transpose(0, 1).contiguous(), new_mems


CASES = (
    ModelCase(
        "glm_mems_with_two_cases",
        seeded(GLMModel),
        **_glm_calls(tokens(40)),
        patterns=("P1", "P2", "P5", "P11"),
        example_inputs=(torch.tensor([[1, 2, 3], [7, 8, 9]]), torch.arange(3).expand(2, 3)),
        chunk_invariant=False,  # a chunk forgets at its own borders
    ),
    ModelCase(
        "glm_mems_that_forget_nothing",
        seeded(lambda: GLMModel(max_memory_length=60)),
        **_glm_calls(tokens(40)),
        patterns=("P1", "P2", "P5", "P11"),
        example_inputs=(torch.tensor([[1, 2, 3], [7, 8, 9]]), torch.arange(3).expand(2, 3)),
    ),
    ModelCase(
        "multihead_attention_with_memory",
        seeded(PianoRollModel),
        **calls(frames(20), cache="memory", take=lambda out: out["memory"]),
        patterns=("P1", "P2", "P5"),
    ),
    ModelCase(
        "xlnet_mems_cut_at_the_end",
        seeded(XLNetStyleLM),
        **calls(tokens(34)),
        patterns=("P1", "P3", "P5"),
        chunk_invariant=False,
    ),
)
