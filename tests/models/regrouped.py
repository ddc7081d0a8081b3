"""Decoders that return their cache in other containers than they take it in."""

from __future__ import annotations

import torch
from torch import nn

from .case import ModelCase, calls, seeded, tokens

__all__ = ["REGROUPED", "TwoLayers"]

VOCAB, DIM = 11, 6


class Layered(nn.Module):
    """Takes ``[(key, value), ...]``; returns the keys of all layers, and the values."""

    def __init__(self, layers=3):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB)
        self.layers = nn.ModuleList(nn.Linear(DIM, 3 * DIM) for _ in range(layers))

    def forward(self, ids, past=None):
        x, keys, values = self.embed(ids), [], []
        for place, layer in enumerate(self.layers):
            q, k, v = layer(x).chunk(3, dim=-1)
            if past is not None:
                k = torch.cat([past[place][0], k], dim=1)
                v = torch.cat([past[place][1], v], dim=1)
            keys.append(k)
            values.append(v)
            seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(
                k.shape[1] - q.shape[1]
            )
            x = x + (q @ k.mT).masked_fill(~seen, -torch.inf).softmax(-1) @ v
        return self.returned(self.head(x), keys, values)

    def returned(self, logits, keys, values):
        return logits, keys, values


class Together(Layered):
    def returned(self, logits, keys, values):
        return logits, (keys, values)


class OneByOne(Layered):
    def returned(self, logits, keys, values):
        return (logits, *(part for pair in zip(keys, values) for part in pair))


class TwoLayers(Together):
    """As many layers as a pair has entries: both readings fit, one joins to the wrong tensor."""

    def __init__(self):
        super().__init__(2)


class StatesInADict(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB)
        self.rnn = nn.LSTM(DIM, DIM, batch_first=True)

    def forward(self, ids, hidden=None):
        out, (h, c) = self.rnn(self.embed(ids), hidden)
        return {"logits": self.head(out), "h": h, "c": c}


class StateAndHistory(nn.Module):
    """Attends to what the network gave before; only the state comes back under its own name."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB)
        self.rnn, self.query = nn.GRU(DIM, DIM, batch_first=True), nn.Linear(DIM, DIM)

    def forward(self, ids, state=None, history=None):
        out, state = self.rnn(self.embed(ids), state)
        seen = out if history is None else torch.cat([history, out], dim=1)
        past = seen.size(1) - out.size(1)
        later = torch.ones(out.size(1), seen.size(1), dtype=torch.bool).triu(past + 1)
        scores = (self.query(out) @ seen.mT).masked_fill(later, -torch.inf)
        return self.head(out + scores.softmax(-1) @ seen), state, seen


def _case(name, model, take):
    options = calls(tokens(VOCAB), cache="past", take=take)
    return ModelCase(name, seeded(model), **options, patterns=("P1",))


def _told_both(outputs, batch, past, query, generator):
    ids = tokens(VOCAB)(batch, past, query, generator)
    return (ids,), {"state": outputs[1], "history": outputs[2]}


REGROUPED: tuple[ModelCase, ...] = (
    _case("keys_and_values", Layered, lambda out: list(zip(out[1], out[2]))),
    _case("keys_and_values_together", Together, lambda out: list(zip(*out[1]))),
    _case("keys_and_values_one_by_one", OneByOne, lambda out: list(zip(out[1::2], out[2::2]))),
    _case("two_layers", TwoLayers, lambda out: list(zip(*out[1]))),
    ModelCase(
        "states_in_a_dict",
        seeded(StatesInADict),
        **calls(tokens(VOCAB), cache="hidden", take=lambda out: (out["h"], out["c"])),
        patterns=("P8",),
    ),
    ModelCase(
        "state_and_history",
        seeded(StateAndHistory),
        **(calls(tokens(VOCAB)) | {"step": _told_both}),
        patterns=("P1", "P8"),
    ),
)
