"""Decoders with an argument that the first call alone reads, and later calls leave out."""

from __future__ import annotations

import torch
from torch import nn

from .case import ModelCase, seeded, tokens
from .counted import VOCAB, WIDTH, Layer

ROWS, FEATURES = 6, 7


class Translator(nn.Module):
    """An encoder inside; the cache holds its keys and values."""

    def __init__(self):
        super().__init__()
        self.source, self.target = nn.Embedding(VOCAB, WIDTH), nn.Embedding(VOCAB, WIDTH)
        self.encoder, self.decoder = Layer(), Layer()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids, source=None, past=None):
        if past is None:
            states, _ = self.encoder(self.source(source), None, None)
            cross, own = self.kv(states), None
        else:
            cross, own = past
        held, n = 0 if own is None else own[0].shape[2], ids.shape[1]
        mask = torch.full((n, held + n), float("-inf")).triu(held + 1)
        x, own = self.decoder(self.target(ids), own, mask)
        k, v = cross.chunk(2, dim=-1)
        x = x + (self.q(x) @ k.transpose(1, 2)).softmax(-1) @ v
        return self.head(x), (cross, own)


class Recurrent(nn.Module):
    """A recurrent encoder: its outputs are attended, its last state starts the decoder."""

    def __init__(self):
        super().__init__()
        self.source, self.target = nn.Embedding(VOCAB, WIDTH), nn.Embedding(VOCAB, WIDTH)
        self.encoder = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.decoder = nn.GRU(2 * WIDTH, WIDTH, batch_first=True)
        self.w, self.u, self.v = (nn.Linear(WIDTH, size) for size in (WIDTH, WIDTH, 1))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids, source=None, state=None):
        memory, hidden = self.encoder(self.source(source)) if state is None else state
        scores = self.v(torch.tanh(self.w(hidden[-1])[:, None] + self.u(memory))).squeeze(-1)
        context = torch.bmm(scores.softmax(-1)[:, None], memory).expand(-1, ids.shape[1], -1)
        y, hidden = self.decoder(torch.cat([self.target(ids), context], -1), hidden)
        return self.head(y), (memory, hidden)


class Captioner(nn.Module):
    """The first hidden state comes from features of a picture."""

    def __init__(self):
        super().__init__()
        self.emb, self.start = nn.Embedding(VOCAB, WIDTH), nn.Linear(FEATURES, WIDTH)
        self.rnn, self.head = nn.GRU(WIDTH, WIDTH, batch_first=True), nn.Linear(WIDTH, VOCAB)

    def forward(self, ids, features=None, hidden=None):
        if hidden is None:
            hidden = torch.tanh(self.start(features.mean(1)))[None]
        y, hidden = self.rnn(self.emb(ids), hidden)
        return self.head(y), hidden


class AsksAgain(Translator):
    """Later calls without the source are other ones: it cannot be left out."""

    def forward(self, ids, source=None, past=None):
        logits, cache = super().forward(ids, source, past)
        return (logits if source is not None else 2 * logits), cache


def source_ids(batch: int) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, ROWS), generator=torch.Generator().manual_seed(batch))


def features(batch: int) -> torch.Tensor:
    return torch.randn(batch, ROWS, FEATURES, generator=torch.Generator().manual_seed(batch))


def _calls(cache, first):
    draw = tokens(VOCAB)

    def prefill(batch, query, generator):
        return (draw(batch, 0, query, generator), first(batch)), {}

    def step(outputs, batch, past, query, generator):
        return (draw(batch, past, query, generator),), {cache: outputs[1]}

    return {"prefill": prefill, "step": step}


IDS = torch.zeros(2, 3, dtype=torch.long)
CASES = (
    ModelCase(
        "source_on_the_first_call_only", seeded(Translator), **_calls("past", source_ids),
        patterns=("P1", "P4"), example_inputs=(IDS, torch.zeros(2, 5, dtype=torch.long)),
    ),
    ModelCase(
        "encoders_last_state_starts_the_decoder", seeded(Recurrent), **_calls("state", source_ids),
        patterns=("P4", "P8"), example_inputs=(IDS, torch.zeros(2, 5, dtype=torch.long)),
        chunk_invariant=False,
    ),
    ModelCase(
        "features_start_the_state", seeded(Captioner), **_calls("hidden", features),
        patterns=("P8", "P21"), example_inputs=(IDS, torch.zeros(2, 5, FEATURES)),
    ),
)  # fmt: skip
