"""Decoders in which many of these habits meet."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from .case import ModelCase, attention_mask, calls, seeded, tokens


@dataclass
class LayerIntermediates:
    cached_kv: tuple[torch.Tensor, torch.Tensor]
    pre_softmax: torch.Tensor | None = None


@dataclass
class Intermediates:
    layers: list[LayerIntermediates] = field(default_factory=list)
    mems: list[torch.Tensor] | None = None


class XAttention(nn.Module):
    def __init__(self, dim, heads=4, kv_heads=2, dim_head=4, num_mem_kv=2):
        super().__init__()
        self.heads, self.kv_heads, self.scale = heads, kv_heads, dim_head**-0.5
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_k = nn.Linear(dim, kv_heads * dim_head, bias=False)
        self.to_v = nn.Linear(dim, kv_heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        # keys and values that every query sees, in front of all others
        self.mem_k = nn.Parameter(torch.randn(kv_heads, num_mem_kv, dim_head))
        self.mem_v = nn.Parameter(torch.randn(kv_heads, num_mem_kv, dim_head))

    def forward(self, x, rel_bias, cache=None):
        b, n, _ = x.shape
        q = self.to_q(x).reshape(b, n, self.heads, -1).transpose(1, 2)
        k = self.to_k(x).reshape(b, n, self.kv_heads, -1).transpose(1, 2)
        v = self.to_v(x).reshape(b, n, self.kv_heads, -1).transpose(1, 2)
        if cache is not None:
            ck, cv = cache.cached_kv
            k = torch.cat((ck, k), dim=-2)
            v = torch.cat((cv, v), dim=-2)
        intermediates = LayerIntermediates(cached_kv=(k, v))
        mem_k = self.mem_k.expand(b, -1, -1, -1)
        mem_v = self.mem_v.expand(b, -1, -1, -1)
        k, v = torch.cat((mem_k, k), dim=-2), torch.cat((mem_v, v), dim=-2)
        q = q.unflatten(1, (self.kv_heads, -1))
        sim = torch.einsum("bghid,bgjd->bghij", q, k) * self.scale
        i, j = sim.shape[-2], rel_bias.shape[-1]
        causal = torch.ones((i, j), device=x.device, dtype=torch.bool).triu(j - i + 1)
        bias = rel_bias.masked_fill(causal, -torch.finfo(sim.dtype).max)
        sim = sim + F.pad(bias, (k.shape[-2] - j, 0), value=0.0)
        out = torch.einsum("bghij,bgjd->bghid", sim.softmax(-1), v)
        return self.to_out(out.flatten(1, 2).transpose(1, 2).flatten(2)), intermediates


class XTransformer(nn.Module):
    """Learned memory slots, a relative bias, grouped queries, dataclasses inside a dataclass."""

    def __init__(self, num_tokens=45, dim=16, depth=2):
        super().__init__()
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.rel_pos = nn.Embedding(16, 1)
        self.attn_layers = nn.ModuleList([XAttention(dim) for _ in range(depth)])
        self.norms = nn.ModuleList([nn.LayerNorm(dim, bias=False) for _ in range(depth)])
        self.to_logits = nn.Linear(dim, num_tokens, bias=False)

    def bias(self, i, j, device):
        q_pos = torch.arange(j - i, j, dtype=torch.long, device=device)
        k_pos = torch.arange(j, dtype=torch.long, device=device)
        distance = (q_pos[:, None] - k_pos[None, :]).clamp(min=0, max=15)
        return self.rel_pos(distance).squeeze(-1)

    def forward(self, x, cache: Intermediates | None = None, return_intermediates=False):
        i = j = x.shape[1]
        if cache is not None:
            j = j + cache.layers[0].cached_kv[0].shape[-2]
        rel_bias = self.bias(i, j, x.device)
        x = self.token_emb(x)
        hiddens = Intermediates()
        for ind, (norm, attn) in enumerate(zip(self.norms, self.attn_layers)):
            layer_cache = cache.layers[ind] if cache is not None else None
            out, inter = attn(norm(x), rel_bias, cache=layer_cache)
            x = x + out
            hiddens.layers.append(inter)
        logits = self.to_logits(x)
        if return_intermediates:
            return logits, hiddens
        return logits


class PackedLayer(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.dim = heads, dim
        self.ln = nn.LayerNorm(dim)
        self.wqkv = nn.Parameter(torch.empty(dim, 3 * dim))
        self.wo = nn.Parameter(torch.empty(dim, dim))
        self.bo = nn.Parameter(torch.zeros(dim))
        self.w1, self.w2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x, bias, layer_kv):
        B, S, _ = x.shape
        h = self.ln(x)
        qkv = torch.matmul(h, self.wqkv).reshape(B, S, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, kv = qkv[0], qkv[1:]
        if layer_kv is not None:
            kv = torch.cat([layer_kv, kv], dim=-2)
        score = torch.matmul(q, kv[0].transpose(2, 3)).mul_(1 / math.sqrt(q.size(-1))).add_(bias)
        y = score.softmax(-1).matmul(kv[1]).transpose(1, 2).reshape(B, S, self.dim)
        x = torch.addmm(self.bo, y.view(-1, self.dim), self.wo).view(B, S, self.dim) + x
        return x + self.w2(F.mish(self.w1(self.ln(x)))), kv


class PackedDecoder(nn.Module):
    """A dict of layers by number, a padding mask, bias in place, an optional dict of outputs."""

    def __init__(self, vocab=41, dim=16, heads=2, layers=3):
        super().__init__()
        self.embedding = nn.EmbeddingBag(vocab, dim, mode="sum")
        self.positions = nn.Parameter(torch.empty(64, dim))
        self.layers = nn.ModuleDict({str(i): PackedLayer(dim, heads) for i in range(layers)})
        self.classifier = nn.Linear(dim, vocab)

    def forward(self, ids, kv=None, attention_mask=None, as_dict=False):
        B, S = ids.shape
        kv = kv or {}
        P = kv[0].size(-2) if 0 in kv else 0
        x = self.embedding(ids.reshape(-1, 1)).view(B, S, -1) + self.positions[P : P + S]
        bias = torch.zeros(B, 1, S, P + S, dtype=x.dtype, device=x.device)
        future = torch.ones(S, P + S, dtype=torch.bool, device=x.device).triu_(P + 1)
        bias.masked_fill_(future, -1e4)
        if attention_mask is not None:
            bias += (1 - attention_mask[:, None, None, :].to(x.dtype)) * -1e4
        present = {}
        for name, layer in self.layers.items():
            x, present[int(name)] = layer(x, bias, kv.get(int(name)))
        logits = self.classifier(x)
        return {"logits": logits, "kv": present} if as_dict else (present, logits)


class GatedRetention(nn.Module):
    """Several streams of hidden states, remembered together in one tensor with time in front."""

    def __init__(self, vocab=29, dim=12, streams=3):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.proj = nn.ModuleList([nn.Linear(dim, 4 * dim) for _ in range(streams)])
        self.decay = nn.Parameter(torch.linspace(0.05, 0.4, streams))
        self.head = nn.Linear(dim, vocab)

    def forward(self, x: torch.Tensor, state: torch.Tensor = None):
        h = self.embed(x).transpose(0, 1)
        pasts = state.unbind(dim=2) if state is not None else [None] * len(self.proj)
        kept = []
        for proj, decay, past in zip(self.proj, self.decay, pasts):
            q, k, v, g = proj(F.layer_norm(h, h.shape[-1:])).chunk(4, dim=-1)
            kv = torch.cat([k, v], dim=-1)
            if past is not None:
                kv = torch.cat([past, kv], dim=0)
            kept.append(kv)
            k, v = kv.chunk(2, dim=-1)
            T, M = q.size(0), kv.size(0)
            age = torch.arange(M - T, M, device=q.device)[:, None] - torch.arange(
                M, device=q.device
            )
            weight = torch.where(age >= 0, torch.exp(-decay * age), 0.0)
            scores = torch.einsum("tbd,mbd->btm", q, k) * weight / q.size(-1) ** 0.5
            h = h + torch.sigmoid(g) * torch.einsum("btm,mbd->tbd", scores, v)
        return self.head(h.transpose(0, 1)), torch.stack(kept, dim=2)


CASES = (
    ModelCase(
        "dataclasses_inside_a_dataclass",
        seeded(XTransformer),
        **calls(
            tokens(45),
            cache="cache",
            also=lambda batch, past, query, generator: {"return_intermediates": True},
        ),
        patterns=("P1", "P2", "P10"),
        example_inputs={"x": torch.tensor([[3, 6, 9, 12]]), "return_intermediates": True},
    ),
    ModelCase(
        "dict_of_layers_by_number",
        seeded(PackedDecoder),
        **calls(
            tokens(41),
            take=lambda out: out[0],
            also=lambda batch, past, query, generator: {
                "attention_mask": attention_mask(batch, past, query)
            },
        ),
        patterns=("P1", "P2", "P10"),
        example_inputs={
            "ids": torch.tensor([[2, 4, 6]]),
            "attention_mask": torch.ones(1, 3).long(),
        },
    ),
    ModelCase(
        "streams_in_one_tensor",
        seeded(GatedRetention),
        **calls(tokens(29), cache="state"),
        patterns=("P1", "P3"),
    ),
)
