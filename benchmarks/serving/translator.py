"""A decoder that attends to an encoder's states, written the way people write one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Translator"]


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.own, self.own_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.query, self.cross_out = nn.Linear(width, width), nn.Linear(width, width)
        self.keys, self.values = nn.Linear(width, width), nn.Linear(width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def merge(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)

    def forward(self, x: Tensor, states: Tensor, past: Any) -> tuple[Tensor, Any]:
        q, k, v = map(self.split, self.own(self.norms[0](x)).chunk(3, -1))
        if past is None:
            cross_k, cross_v = self.split(self.keys(states)), self.split(self.values(states))
        else:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
            cross_k, cross_v = past[2], past[3]
        new, total = q.shape[2], k.shape[2]
        seen = torch.ones(new, total, dtype=torch.bool, device=x.device).tril(total - new)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + self.own_out(self.merge(y))
        q = self.split(self.query(self.norms[1](x)))
        y = functional.scaled_dot_product_attention(q, cross_k, cross_v)
        x = x + self.cross_out(self.merge(y))
        return x + self.down(functional.gelu(self.up(self.norms[2](x)))), (k, v, cross_k, cross_v)


class Translator(nn.Module):
    """Tokens and an encoder's states in; logits and four tensors a layer out."""

    def __init__(self, vocabulary: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(4096, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor, states: Tensor, past: Any = None) -> tuple[Tensor, Any]:
        start = 0 if past is None else past[0][0].shape[2]
        places = torch.arange(start, start + ids.shape[1], device=ids.device)
        x, present = self.tokens(ids) + self.places(places), []
        for number, layer in enumerate(self.layers):
            x, slots = layer(x, states, None if past is None else past[number])
            present.append(slots)
        return self.head(self.norm(x)), present
