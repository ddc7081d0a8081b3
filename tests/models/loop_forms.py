"""The ways in which people write a loop over tokens: each steps a recurrent cell."""

from __future__ import annotations

import torch
from torch import nn

from .case import ModelCase, RefusalCase, calls, seeded, tokens

__all__ = ["LOOP_FORMS", "NO_LOOP_FORMS"]

VOCAB, DIM = 11, 6


class CellDecoder(nn.Module):
    """An embedding, a cell that ``loop`` steps over the tokens, and a head."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB)
        self.cell, self.gate = nn.GRUCell(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, ids, hidden=None):
        x = self.embed(ids)
        if hidden is None:
            hidden = x.new_zeros(x.size(0), DIM)
        outputs, hidden = self.loop(x, hidden)
        return self.head(outputs), hidden

    def loop(self, x, h):
        raise NotImplementedError


class Split(CellDecoder):
    def loop(self, x, h):
        outputs = []
        for step in torch.split(x, 1, dim=1):
            h = self.cell(step.squeeze(1), h)
            outputs.append(h.unsqueeze(1))
        return torch.cat(outputs, dim=1), h


class Chunk(CellDecoder):
    def loop(self, x, h):
        outputs = []
        for i, step in enumerate(x.chunk(x.size(1), dim=1)):
            h = self.cell(step.squeeze(1) + x[:, i], h)
            outputs += [h]
        return torch.stack(outputs, 1), h


class EnumeratedRows(CellDecoder):
    """``enumerate(zip(…))`` of tensors with time in front, written into an empty tensor."""

    def loop(self, x, h):
        x = x.transpose(0, 1)
        gates = torch.sigmoid(self.gate(x))
        out = torch.empty(x.size(0), x.size(1), DIM, dtype=x.dtype, device=x.device)
        for i, (step, gate) in enumerate(zip(x, gates)):
            h = self.cell(step, h) * gate
            out[i] = h
        return out.permute(1, 0, 2), h


class FirstByItself(CellDecoder):
    """The first token before the loop, which one token alone does not enter."""

    def loop(self, x, h):
        h = self.cell(x[:, 0], h)
        outputs = [h]
        for t in range(1, x.size(1)):
            h = self.cell(x[:, t] + 0.5 * x[:, t - 1], h)
            outputs.append(h)
        return torch.stack(outputs, dim=1), h


class LastByItself(CellDecoder):
    """All states, the first and the last one among them; the last token after the loop."""

    def loop(self, x, h):
        states = [h]
        for t in range(x.size(1) - 1):
            h = self.cell(x[:, t], h)
            states.append(h)
        h = self.cell(2 * x[:, -1], h)
        states.append(h)
        return torch.stack(states, dim=1), h


class Backwards(CellDecoder):
    """Within a call from the last token to the first; the state is the first token's."""

    def loop(self, x, h):
        out = torch.zeros_like(x)
        for t in reversed(range(x.size(1))):
            h = self.cell(x[:, t], h)
            out[:, t] = h
        return out, h


class ReadsWhatItWrote(CellDecoder):
    """``states[t + 1]`` of ``states[t]``."""

    def loop(self, x, h):
        x = x.transpose(0, 1)
        states = torch.zeros(x.size(0) + 1, *h.shape)
        states[0] = h
        for t in range(x.size(0)):
            states[t + 1] = torch.tanh(self.gate(states[t]) + x[t])
        return states[1:].transpose(0, 1), states[-1]


class JoinsOneByOne(CellDecoder):
    """``torch.cat`` in every round, of a state that is written to afterwards."""

    def loop(self, x, h):
        out = x.new_zeros(x.size(0), 0, DIM)
        for t in range(x.size(1)):
            h = self.cell(x[:, t], h)
            out = torch.cat([out, h.unsqueeze(1)], dim=1)
            h.mul_(0.5)
        return out.reshape(out.shape[0] * out.shape[1], DIM).view(*out.shape) / out.shape[1], h


class Einsums(CellDecoder):
    """Calls of three operands, two of them tensors of the rounds."""

    def loop(self, x, h):
        out = torch.empty_like(x)
        for i in range(x.shape[1]):
            mixed = torch.einsum("bi,bj->bij", h, torch.sigmoid(self.gate(x[:, i])))
            h = torch.tanh(torch.einsum("bij,bj->bi", mixed, x[:, i]) + x[:, i])
            out[:, i] = h
        return out, h


class ReadsWhatItJoined(CellDecoder):
    def loop(self, x, h):
        out = x.new_zeros(x.size(0), 0, DIM)
        for t in range(x.size(1)):
            h = self.cell(x[:, t], h)
            out = torch.cat([out, h.unsqueeze(1)], dim=1)
            h = h + out.mean(1)
        return out, h


class WritesToWhatItJoined(CellDecoder):
    def loop(self, x, h):
        out = x.new_zeros(x.size(0), 0, DIM)
        for t in range(x.size(1)):
            h = self.cell(x[:, t], h)
            out = torch.cat([out, h.unsqueeze(1)], dim=1)
            out.mul_(0.5)
        return out, h


class WidensWhatItJoined(CellDecoder):
    """The empty tensor that it begins with is of another dtype, which the join takes."""

    def loop(self, x, h):
        out = torch.zeros(x.size(0), 0, DIM, dtype=torch.float64)
        for t in range(x.size(1)):
            h = self.cell(x[:, t], h)
            out = torch.cat([out, h.unsqueeze(1)], dim=1)
        return out.float(), h


class ReadsTwoBack(CellDecoder):
    def loop(self, x, h):
        out = torch.zeros_like(x)
        for t in range(2, x.size(1)):
            out[:, t] = torch.tanh(self.gate(out[:, t - 2]) + x[:, t])
        return out, h + out.sum(1)


class NumbersTokens(CellDecoder):
    def loop(self, x, h):
        outputs = []
        for i, step in enumerate(x.unbind(1)):
            h = self.cell(step * (i + 1), h)
            outputs.append(h)
        return torch.stack(outputs, 1), h


class EverySecond(CellDecoder):
    def loop(self, x, h):
        for t in range(0, x.size(1), 2):
            h = self.cell(x[:, t], h)
        return x + h.unsqueeze(1), h


class LeavesAnother(CellDecoder):
    """What the loop leaves is something else where one token does not enter it."""

    def loop(self, x, h):
        h = self.cell(x[:, 0], h)
        y = torch.tanh(h)
        for t in range(1, x.size(1)):
            h = self.cell(x[:, t], h)
            y = torch.sigmoid(h)
        return y.unsqueeze(1), h


class PartsBackwards(CellDecoder):
    def loop(self, x, h):
        outputs = []
        for step in reversed(x.unbind(1)):
            h = self.cell(step, h)
            outputs.append(h)
        return torch.stack(outputs, 1), h


_FORMS = (
    ("split", Split),
    ("chunk", Chunk),
    ("enumerated_rows", EnumeratedRows),
    ("first_by_itself", FirstByItself),
    ("last_by_itself", LastByItself),
    ("backwards", Backwards),
    ("reads_what_it_wrote", ReadsWhatItWrote),
    ("joins_one_by_one", JoinsOneByOne),
    ("einsums", Einsums),
)
LOOP_FORMS: tuple[ModelCase, ...] = tuple(
    ModelCase(
        name,
        seeded(model),
        **calls(tokens(VOCAB), cache="hidden"),
        patterns=("P8",),
        chunk_invariant=False,
    )
    for name, model in _FORMS
)
_ALIKE = "rounds of a loop over the tokens are not alike"
_REFUSED = (
    ("reads_what_it_joined", ReadsWhatItJoined, _ALIKE, "out = torch.cat([out"),
    ("writes_to_what_it_joined", WritesToWhatItJoined, _ALIKE, "for t in range(x.size(1))"),
    ("widens_what_it_joined", WidensWhatItJoined, _ALIKE, "out = torch.cat([out"),
    ("reads_two_back", ReadsTwoBack, _ALIKE, "out[:, t - 2]"),
    ("numbers_tokens", NumbersTokens, _ALIKE, "step * (i + 1)"),
    ("every_second", EverySecond, "query is frozen", "range(0, x.size(1), 2)"),
    ("leaves_another", LeavesAnother, "compute different things", "where Eq(query, 1)"),
    ("parts_backwards", PartsBackwards, "from the last to the first", "reversed(x.unbind(1))"),
)
NO_LOOP_FORMS: tuple[RefusalCase, ...] = tuple(
    RefusalCase(
        name,
        seeded(model),
        "UnsupportedBranchError" if name == "leaves_another" else "CaptureError",
        says,
    )
    for name, model, *says in _REFUSED
)
