"""Parallel forms that are not quite the steps beside them, or whose steps are no scan."""

from __future__ import annotations

import torch
from torch import nn

from .case import RefusalCase, seeded

__all__ = ["REFUSED_STEPPED"]

VOCAB = 11


class Decayed(nn.Module):
    """What all of them have, and what is right: a matrix of decays, and its step."""

    rate = 0.9

    def __init__(self, dim=4):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, dim), nn.Linear(dim, VOCAB)
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))

    def weights(self, n):
        t = torch.arange(n)
        ago = t[:, None] - t[None, :]
        return torch.where(ago >= 0, self.rate ** ago.clamp(min=0), torch.zeros(()))

    def last(self, decay):
        return decay[-1]

    def values(self, x):
        return self.v(x)

    def step(self, state, kv):
        return self.rate * state + kv

    def attended(self, y):
        return y

    def forward(self, ids, state=None):
        x = self.embed(ids)
        q, k = self.q(x), self.k(x)
        if state is None:
            v = self.v(x)
            decay = self.weights(x.shape[1])
            y = (q @ k.transpose(1, 2) * decay) @ v
            state = (k * self.last(decay)[:, None]).transpose(1, 2) @ v
        else:
            state = self.step(state, k.transpose(1, 2) @ self.values(x))
            y = self.attended(q @ state)
        return self.head(y), state


class AnotherDecay(Decayed):
    def step(self, state, kv):
        return 0.90001 * state + kv


class OneDecayMore(Decayed):
    """The state that a prompt leaves has decayed once more than the steps leave it."""

    def last(self, decay):
        return decay[-1] * self.rate


class NoBias(Decayed):
    def values(self, x):
        return x @ self.v.weight.T


class AfterManyTokens(Decayed):
    """What lies more than a hundred tokens back is dropped in the parallel form."""

    def weights(self, n):
        t = torch.arange(n)
        return super().weights(n) * (t[:, None] - t[None, :] < 100)


class ByATable(Decayed):
    """A mask that is a buffer of flags: equal for this one alone."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.ones(64, 64, dtype=torch.bool).tril())

    def weights(self, n):
        t = torch.arange(n)
        return self.rate ** (t[:, None] - t[None, :]).abs() * self.mask[:n, :n]


class AboveALength(Decayed):
    """Prompts of more than 24 tokens decay otherwise."""

    def weights(self, n):
        return super().weights(n) ** (2 if n > 24 else 1)


class SeesAhead(Decayed):
    def weights(self, n):
        return super().weights(n) + 0.01


class AfterDecay(Decayed):
    """The step reads the state before the token is in it."""

    def forward(self, ids, state=None):
        y, new = super().forward(ids, state)
        return (y, new) if state is None else (self.head(self.q(self.embed(ids)) @ state), new)


class FromAnotherStart(Decayed):
    """The first call starts from what no later call could be given: the prompt's own mean."""

    def forward(self, ids, state=None):
        y, new = super().forward(ids, state)
        if state is None:
            new = new + self.embed(ids).mean(1, keepdim=True)
        return y, new


class ByTheSign(Decayed):
    """Equal as long as a weight is positive, as it is at first."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def values(self, x):
        return self.v(x) * self.scale.abs() / self.scale


class GrowsBeside(Decayed):
    """Keys of all tokens beside the state."""

    def forward(self, ids, past=None):
        y, state = super().forward(ids, None if past is None else past[0])
        keys = self.embed(ids)
        if past is not None:
            keys = torch.cat([past[1], keys], dim=1)
        return y + keys.mean(1, keepdim=True).sum(-1, keepdim=True), (state, keys)


def _refused(name, build, *says):
    return RefusalCase(
        name,
        seeded(build),
        "UnsupportedBranchError",
        says,
        example_inputs=(torch.arange(10).view(2, 5),),
        rewrite_options={"check": "test"},
    )


_NOT_ITS_STEPS = "is not its steps, one token after the other"
REFUSED_STEPPED: tuple[RefusalCase, ...] = (
    _refused("another_decay", AnotherDecay, _NOT_ITS_STEPS),
    _refused("one_decay_more", OneDecayMore, _NOT_ITS_STEPS),
    _refused("no_bias", NoBias, _NOT_ITS_STEPS),
    _refused("after_many_tokens", AfterManyTokens, _NOT_ITS_STEPS),
    _refused("sees_ahead", SeesAhead, _NOT_ITS_STEPS),
    _refused("after_decay", AfterDecay, _NOT_ITS_STEPS),
    _refused("from_another_start", FromAnotherStart, _NOT_ITS_STEPS),
    _refused("by_the_sign", ByTheSign, _NOT_ITS_STEPS),
    _refused("grows_beside", GrowsBeside, "grows with the tokens"),
)
