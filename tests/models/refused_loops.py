"""Loops over tokens that are no scan: each is one step away from one that is."""

from __future__ import annotations

import torch
from torch import nn

from .case import RefusalCase, calls, seeded, tokens

__all__ = ["REFUSED_LOOPS"]

VOCAB = 11
_ALIKE = "rounds of a loop over the tokens are not alike"


class Cells(nn.Module):
    """What all of them have: a cell, another one, and a body."""

    def __init__(self, dim=6):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, dim), nn.Linear(dim, VOCAB)
        self.cell, self.other = nn.GRUCell(dim, dim), nn.GRUCell(dim, dim)
        self.places, self.dim = nn.Parameter(torch.randn(64, dim)), dim

    def start(self, x, state):
        return x.new_zeros(x.shape[0], self.dim) if state is None else state


class AsksThePlace(Cells):
    def forward(self, ids, state=None):
        x, ys = self.embed(ids), []
        h = self.start(x, state)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h) if t < 7 else self.other(x[:, t], h)
            ys.append(h)
        return self.head(torch.stack(ys, 1)), h


class Counts(Cells):
    def forward(self, ids, state=None):
        x, ys, i = self.embed(ids), [], 0
        h = self.start(x, state)
        for t in range(x.shape[1]):
            i += 1
            h = self.cell(x[:, t], h) if i < 9 else self.other(x[:, t], h)
            ys.append(h)
        return self.head(torch.stack(ys, 1)), h


class CountsOnItself(Cells):
    def forward(self, ids, state=None):
        x, ys = self.embed(ids), []
        h, self.calls = self.start(x, state), 0
        for t in range(x.shape[1]):
            self.calls += 1
            h = self.cell(x[:, t], h) if self.calls < 9 else self.other(x[:, t], h)
            ys.append(h)
        self.calls = 0
        return self.head(torch.stack(ys, 1)), h


class AsksForTheLength(Cells):
    def forward(self, ids, state=None):
        x, ys = self.embed(ids), []
        h = self.start(x, state)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h) if len(ys) < 9 else self.other(x[:, t], h)
            ys.append(h)
        return self.head(torch.stack(ys, 1)), h


class CountsInSecret(Cells):
    """Nothing is asked that can be heard; only a run with more tokens shows it."""

    def forward(self, ids, state=None):
        x, ys = self.embed(ids), []
        h = self.start(x, state)
        for t in range(x.shape[1]):
            many = sum(1 for _ in ys) > 9
            h = (self.other if many else self.cell)(x[:, t], h)
            ys.append(h)
            del many
        return self.head(torch.stack(ys, 1)), h


class Chooses(Cells):
    """Takes the other one of two tensors of the same sizes for every seventh token."""

    def forward(self, ids, state=None):
        x, ys = self.embed(ids), []
        h = self.start(x, state)
        others = self.others(torch.tanh(x), torch.sigmoid(x), ys)
        for t in range(x.shape[1]):
            h = self.cell(next(others)[:, t], h)
            ys.append(h)
        return self.head(torch.stack(ys, 1)), h


class Counter:
    __slots__ = ("count",)

    def __init__(self):
        self.count = 0

    def __iter__(self):
        return self


def _walked(values):
    count = 0
    for _ in values:
        count += 1
    return count


class ByWalkingAList(Chooses):
    def others(self, one, other, ys):
        class Walking(Counter):
            def __next__(self):
                return one if _walked(ys) % 7 else other

        return Walking()


class ByASlot(Chooses):
    def others(self, one, other, ys):
        class Counting(Counter):
            def __next__(self):
                self.count += 1
                return one if self.count % 7 else other

        return Counting()


class ByAGenerator(Chooses):
    def others(self, one, other, ys):
        while True:
            for _ in range(6):
                yield one
            yield other


class ByAnAttributeOfAFunction(Chooses):
    def others(self, one, other, ys):
        def chosen():
            chosen.count += 1
            return one if chosen.count % 7 else other

        chosen.count = 0
        return iter(chosen, None)


class ByADefault(Chooses):
    def others(self, one, other, ys):
        def chosen(calls=[]):  # noqa: B006 - the default is the counter
            calls.append(None)
            return one if sum(1 for _ in calls) % 7 else other

        return iter(chosen, None)


class LastEight(Cells):
    """A window of the outputs: up to its length, a running sum."""

    def forward(self, ids, state=None):
        x, ys = self.embed(ids), []
        h = self.start(x, state)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
            ys.append(h)
            h = h + sum(ys[-8:])
        return self.head(torch.stack(ys, 1)), h


class AnotherFirstToken(Cells):
    def forward(self, ids, state=None):
        x, ys, h = self.embed(ids), [], state
        for t in range(x.shape[1]):
            h = torch.tanh(x[:, t]) if h is None else self.cell(x[:, t], h)
            ys.append(h)
        return self.head(torch.stack(ys, 1)), h


class OffByOne(Cells):
    """The first call gives what was before each token, later ones what is after it."""

    def forward(self, ids, state=None):
        x, ys = self.embed(ids), []
        h = self.start(x, state)
        for t in range(x.shape[1]):
            if state is None:
                ys.append(h)
            h = self.cell(x[:, t], h)
            if state is not None:
                ys.append(h)
        return self.head(torch.stack(ys, 1)), h


class PlaceAsNumber(Cells):
    def forward(self, ids, state=None):
        x, ys = self.embed(ids), []
        h = self.start(x, state)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t] * t, h)
            ys.append(h)
        return self.head(torch.stack(ys, 1)), h


class PlacesOfATable(Cells):
    def forward(self, ids, state=None):
        x, ys = self.embed(ids), []
        h = self.start(x, state)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t] + self.places[t], h)
            ys.append(h)
        return self.head(torch.stack(ys, 1)), h


class Stops(Cells):
    def forward(self, ids, state=None):
        x = self.embed(ids)
        h = self.start(x, state)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
            break
        return self.head(x + h[:, None]), h


class WithoutTheTokens(Cells):
    def forward(self, ids, state=None):
        x = self.embed(ids)
        h = self.start(x, state).clone()
        for _ in range(x.shape[1]):
            h.mul_(0.5).add_(1)
        return self.head(x + h[:, None]), h


class WeightsInTurn(Cells):
    def forward(self, ids, state=None):
        x, ys = self.embed(ids), []
        h = self.start(x, state)
        weights = [*[self.cell.weight_hh] * 3, self.other.weight_hh]
        for t in range(x.shape[1]):
            h = torch.tanh(x[:, t] + h @ weights[0][: self.dim])
            weights = weights[1:] + weights[:1]
            ys.append(h)
        return self.head(torch.stack(ys, 1)), h


class OneBeforeTheLast(Cells):
    def forward(self, ids, state=None):
        x, ys = self.embed(ids), []
        h = self.start(x, state)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
            ys.append(h)
        return self.head(torch.stack(ys, 1)), ys[-2]


class Backwards(Cells):
    def forward(self, ids, state=None):
        x, ys = self.embed(ids), []
        h = self.start(x, state)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
            ys.append(h)
        return self.head(torch.stack(ys[::-1], 1)), h


class LoopInALoop(Cells):
    def forward(self, ids, state=None):
        x, ys = self.embed(ids), []
        h = self.start(x, state)
        for _ in range(x.shape[1]):
            for s in range(x.shape[1]):
                h = self.cell(x[:, s], h)
            ys.append(h)
        return self.head(torch.stack(ys, 1)), h


class NextToken(Cells):
    def forward(self, ids, state=None):
        x, ys = self.embed(ids), []
        h = self.start(x, state)
        for t in range(x.shape[1]):
            h = self.cell(x[:, min(t + 1, x.shape[1] - 1)], h)
            ys.append(h)
        return self.head(torch.stack(ys, 1)), h


class GrowsFromTokenToToken(Cells):
    def forward(self, ids, past=None):
        x, ys = self.embed(ids), []
        k = past if past is not None else x[:, :0]
        for t in range(x.shape[1]):
            k = torch.cat([k, x[:, t : t + 1]], 1)
            ys.append((torch.softmax(x[:, t : t + 1] @ k.transpose(1, 2), -1) @ k)[:, 0])
        return self.head(torch.stack(ys, 1)), k


class AnotherStep(Cells):
    """The later path is a step of another cell than the loop of the first one."""

    def forward(self, ids, state=None):
        x, ys = self.embed(ids), []
        if state is not None:
            assert x.shape[1] == 1
            h = self.other(x.squeeze(1), state)
            return self.head(h.unsqueeze(1)), h
        h = self.start(x, state)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
            ys.append(h)
        return self.head(torch.stack(ys, 1)), h


def _refused(name, build, *says, error="CaptureError"):
    return RefusalCase(
        name,
        seeded(build),
        error,
        says,
        example_inputs=(torch.arange(10).view(2, 5),),
        **calls(tokens(VOCAB)),
    )


_LATER = "does something else for a later token"
REFUSED_LOOPS: tuple[RefusalCase, ...] = (
    _refused("asks_the_place", AsksThePlace, "asks which token it is at", "if t < 7 else"),
    _refused("counts", Counts, "changes 'i' (forward), which is no tensor", "range(x.shape[1])"),
    _refused("counts_on_itself", CountsOnItself, "changes calls, which is no tensor"),
    _refused("asks_for_the_length", AsksForTheLength, "the length of a list", "len(ys) < 9"),
    _refused("counts_in_secret", CountsInSecret, _LATER, "(x[:, t], h)"),
    *(
        _refused(name, build)
        for name, build in (
            ("by_walking_a_list", ByWalkingAList),
            ("by_a_slot", ByASlot),
            ("by_a_generator", ByAGenerator),
            ("by_an_attribute_of_a_function", ByAnAttributeOfAFunction),
            ("by_a_default", ByADefault),
        )
    ),
    _refused("last_eight", LastEight, _LATER, "sum(ys[-8:])"),
    _refused("another_first_token", AnotherFirstToken, _ALIKE, "tanh.default", "gru_cell"),
    _refused("off_by_one", OffByOne, "compute different things", error="UnsupportedBranchError"),
    _refused("place_as_number", PlaceAsNumber, _ALIKE, "use the token's place"),
    _refused("places_of_a_table", PlacesOfATable, "asks which token it is at", "< 64"),
    _refused("stops", Stops, "ends before its last token", "break and return"),
    _refused("without_the_tokens", WithoutTheTokens, _ALIKE, "does not depend on the tokens"),
    _refused("weights_in_turn", WeightsInTurn, "changes 'weights' (forward)"),
    _refused(
        "one_before_the_last", OneBeforeTheLast, "A value of one round", "what the last one left"
    ),
    _refused("backwards", Backwards, "A value of one round", "ys[::-1]"),
    _refused("loop_in_a_loop", LoopInALoop, "within another one", "for s in range"),
    _refused("next_token", NextToken, "asks which token it is at", "min(t + 1"),
    _refused("grows_from_token_to_token", GrowsFromTokenToToken, _ALIKE),
    _refused(
        "another_step", AnotherStep, "compute different things", error="UnsupportedBranchError"
    ),
)
