"""Recurrent networks: the state of a first call is zeros, or what the model has learned."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .case import ModelCase, calls, frames, seeded, tokens


class LSTMLanguageModel(nn.Module):
    def __init__(self, ntoken=32, ninp=10, nhid=12, nlayers=2):
        super().__init__()
        self.encoder = nn.Embedding(ntoken, ninp)
        self.rnn = nn.LSTM(ninp, nhid, nlayers, batch_first=True)
        self.decoder = nn.Linear(nhid, ntoken)

    def forward(self, input, hidden=None):
        emb = self.encoder(input)
        output, hidden = self.rnn(emb, hidden)
        return F.log_softmax(self.decoder(output), dim=-1), hidden


class GRUDecoder(nn.Module):
    """Time in front; the state is one tensor, made by the model itself where there is none."""

    def __init__(self, vocab=28, dim=12, layers=2):
        super().__init__()
        self.layers, self.dim = layers, dim
        self.embedding = nn.Embedding(vocab, dim)
        self.gru = nn.GRU(dim, dim, layers)
        self.out = nn.Linear(dim, vocab)

    def init_hidden(self, bsz):
        weight = next(self.parameters())
        return weight.new_zeros(self.layers, bsz, self.dim)

    def forward(self, tokens, hidden=None):
        if hidden is None:
            hidden = self.init_hidden(tokens.size(0))
        x, hidden = self.gru(self.embedding(tokens).transpose(0, 1), hidden)
        return self.out(x).transpose(0, 1), hidden


class ElmanModel(nn.Module):
    def __init__(self, bins=7, dim=12):
        super().__init__()
        self.rnn = nn.RNN(bins, dim, batch_first=True, nonlinearity="relu")
        self.out = nn.Linear(dim, bins)

    def forward(self, x, h=None):
        y, h = self.rnn(x) if h is None else self.rnn(x, h)
        return self.out(y), h


class LearnedStart(nn.Module):
    """The first state is a parameter, the same for each row of a batch."""

    def __init__(self, vocab=26, dim=12, layers=2):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.h0 = nn.Parameter(torch.randn(layers, 1, dim))
        self.c0 = nn.Parameter(torch.randn(layers, 1, dim))
        self.lstm = nn.LSTM(dim, dim, layers, batch_first=True)
        self.head = nn.Linear(dim, vocab)

    def forward(self, ids, state=None):
        if state is None:
            b = ids.shape[0]
            state = (torch.tanh(self.h0).expand(-1, b, -1).contiguous(), self.c0.repeat(1, b, 1))
        y, state = self.lstm(self.embed(ids), state)
        return self.head(y), state


class AttendThenRecur(nn.Module):
    """A GRU under attention: a state and keys and values in one dict."""

    def __init__(self, vocab=29, dim=12, heads=2):
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(vocab, dim)
        self.gru = nn.GRU(dim, dim, batch_first=True)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.head = nn.Linear(dim, vocab)

    def forward(self, ids, cache=None):
        x, h = self.gru(self.embed(ids), cache["h"] if cache is not None else None)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = torch.cat([cache["k"], k], 2), torch.cat([cache["v"], v], 2)
        n, m = q.shape[2], k.shape[2]
        mask = torch.ones(n, m, dtype=torch.bool, device=x.device).tril(m - n)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + y.transpose(1, 2).flatten(2)
        return self.head(x), {"h": h, "k": k, "v": v}


class BufferStart(nn.Module):
    """An exponential average of the frames, started from what training has seen."""

    def __init__(self, bins=9, dim=12):
        super().__init__()
        self.register_buffer("mean", torch.linspace(-1, 1, dim))
        self.inp, self.out = nn.Linear(bins, dim), nn.Linear(dim, bins)
        self.decay = nn.Parameter(torch.rand(dim))

    def forward(self, x, state=None):
        h = self.inp(x)
        if state is None:
            state = self.mean.unsqueeze(0).expand(x.shape[0], -1)
        n = x.shape[1]
        decay = torch.sigmoid(self.decay)
        age = torch.arange(n, device=x.device)
        weight = decay.pow((age[:, None] - age).clamp(min=0)[..., None]) * (1 - decay)
        weight = weight.masked_fill((age[:, None] < age)[..., None], 0.0)
        y = torch.einsum("ijd,bjd->bid", weight, h)
        y = y + decay.pow((age + 1)[:, None]) * state.unsqueeze(1)
        return self.out(torch.tanh(h - y)), y[:, -1]


CASES = (
    ModelCase(
        "lstm_language_model",
        seeded(LSTMLanguageModel),
        **calls(tokens(32)),
        patterns=("P8",),
    ),
    ModelCase(
        "gru_that_makes_its_zeros",
        seeded(GRUDecoder),
        **calls(tokens(28)),
        patterns=("P8",),
    ),
    ModelCase(
        "elman_network",
        seeded(ElmanModel),
        **calls(frames(7)),
        patterns=("P8",),
        example_inputs=(torch.linspace(-1, 1, 35).view(1, 5, 7),),
    ),
    ModelCase(
        "learned_first_state",
        seeded(LearnedStart),
        **calls(tokens(26)),
        patterns=("P8",),
    ),
    ModelCase(
        "state_beside_keys_and_values",
        seeded(AttendThenRecur),
        **calls(tokens(29)),
        patterns=("P1", "P8"),
    ),
    ModelCase(
        "state_from_a_buffer",
        seeded(BufferStart),
        **calls(frames(9)),
        patterns=("P8",),
        example_inputs=(torch.linspace(-1, 1, 45).view(1, 5, 9),),
    ),
)
