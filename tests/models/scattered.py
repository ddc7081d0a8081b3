"""Decoders that put what they see into the places that a text keeps for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["PLACE", "Attends", "PutsIn", "Scatters", "Tells"]

PLACE = 11


class Scatters(nn.Module):
    """Patches are scattered over the tokens that stand for them."""

    def __init__(self, dim=6):
        super().__init__()
        self.embed, self.head = nn.Embedding(12, dim), nn.Linear(dim, 12)
        self.see, self.qkv = nn.Linear(3, dim), nn.Linear(dim, 3 * dim)

    def put(self, x, ids, patches):
        mask = (ids == PLACE).unsqueeze(-1).expand_as(x)
        return x.masked_scatter(mask, self.see(patches).to(x.dtype))

    def forward(self, ids, patches=None, past=None):
        x = self.embed(ids)
        if patches is not None:
            x = self.put(x, ids, patches)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        return self.head(x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask)), (k, v)


class PutsIn(Scatters):
    def put(self, x, ids, patches):
        x = x.clone()
        x[ids == PLACE] = self.see(patches).flatten(0, 1)
        return x


class Attends(Scatters):
    """The text attends to the patches: without any it is another text."""

    def put(self, x, ids, patches):
        seen = self.see(patches)
        return x + F.scaled_dot_product_attention(x, seen, seen) + 1


class Tells(Scatters):
    """The result says whether there were any patches."""

    def forward(self, ids, patches=None, past=None):
        logits, past = super().forward(ids, patches, past)
        return logits, past, patches is not None
