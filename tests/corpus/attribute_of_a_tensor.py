"""What a call returns has an attribute, by which the next call knows it."""

import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.lin = nn.Embedding(11, 8), nn.Linear(8, 8)

    def forward(self, ids, past=None):
        x = self.emb(ids)
        rows = self.lin(x)
        if past is not None:
            rows = torch.cat([past, rows], dim=1)
        y = rows.mean(1, keepdim=True)
        rows.is_ours = True
        if past is not None and getattr(past, "is_ours", False):
            y = y * 2
        return x + y, rows


def build():
    torch.manual_seed(0)
    return Model().eval()


def arguments(outputs, ids, states, past):
    return {"ids": ids} if outputs is None else {"ids": ids, "past": outputs[1]}
