"""A container that is only written to by its name is read by a method of it that has a name."""

import torch
from torch import nn

SEEN = []
size = SEEN.__len__


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
        SEEN.append(1)
        if size() > 5:
            y = y * 2
        return x + y, rows


def build():
    torch.manual_seed(0)
    return Model().eval()


def arguments(outputs, ids, states, past):
    return {"ids": ids} if outputs is None else {"ids": ids, "past": outputs[1]}
