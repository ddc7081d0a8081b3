"""Lists with an entry for each token, and loops that Python counts."""

from __future__ import annotations

import pytest
import torch

import cachefree

from .assertions import equal_calls
from .models.case import ModelCase, calls, seeded, tokens
from .models.loop_forms import VOCAB, CellDecoder


class Filled(CellDecoder):
    """Two lists that are filled by the token's number, one from what the other was just given."""

    def loop(self, x, h):
        n = x.shape[1]
        outputs, gates = [None] * n, n * [None]
        for t in range(n):
            h = self.cell(x[:, t], h)
            outputs[t] = h
            gates[t] = torch.sigmoid(outputs[t])
        return torch.stack(outputs, dim=1) * torch.stack(gates, 1) + outputs[-1][:, None], h


class FilledBackwards(CellDecoder):
    def loop(self, x, h):
        outputs = [None] * x.shape[1]
        for t in reversed(range(x.shape[1])):
            h = self.cell(x[:, t], h)
            outputs[t] = h
        return torch.stack(outputs, dim=1), h


class ReadsTheOneBefore(CellDecoder):
    def loop(self, x, h):
        outputs = [None] * x.shape[1]
        for t in range(x.shape[1]):
            outputs[t] = self.cell(x[:, t], h if t == 0 else outputs[t - 1])
        return torch.stack(outputs, dim=1), outputs[-1]


class CountsWhatIsFilled(CellDecoder):
    def loop(self, x, h):
        outputs = [None] * x.shape[1]
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
            filled = sum(part is not None for part in outputs)
            outputs[t] = h if filled < 6 else 2 * h
        return torch.stack(outputs, dim=1), h


class FilledTwice(CellDecoder):
    def loop(self, x, h):
        outputs = [None] * x.shape[1]
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
            outputs[t] = h
            outputs[t] = torch.tanh(h)
        return torch.stack(outputs, dim=1), h


class AddedUp(CellDecoder):
    """Walks the list once it is full: as many additions as there are tokens."""

    def loop(self, x, h):
        outputs = [None] * x.shape[1]
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
            outputs[t] = h
        total = 0
        for part in outputs:
            total = total + part
        return torch.stack(outputs, dim=1) + total[:, None], h


class While(CellDecoder):
    def loop(self, x, h):
        outputs, t = [], 0
        while t < x.shape[1]:
            h = self.cell(x[:, t], h)
            outputs.append(h)
            t += 1
        return torch.stack(outputs, dim=1), h


def test_a_list_that_is_filled_by_the_token_s_number() -> None:
    case = ModelCase(
        "filled",
        seeded(Filled),
        **calls(tokens(VOCAB), cache="hidden"),
        patterns=("P8",),
        chunk_invariant=False,
    )
    model = case.build().double()
    rewritten = cachefree.rewrite(model)
    assert rewritten.report.verdict.name == "PROVED_EXACT"
    assert equal_calls(case, model, rewritten) > 0


@pytest.mark.parametrize(
    ("build", "says", "line"),
    [
        (FilledBackwards, "otherwise than entry t in round t", "outputs[t] = h"),
        (ReadsTheOneBefore, "otherwise than entry t in round t", "outputs[t - 1]"),
        (CountsWhatIsFilled, "is read before all rounds have filled it", "sum(part is not None"),
        (FilledTwice, "otherwise than entry t in round t", "outputs[t] = torch.tanh(h)"),
        (AddedUp, "does something else for a later token", "total + part"),
        (While, "A while loop runs as often as query says", "while t < x.shape[1]"),
    ],
)
def test_what_tells_one_round_from_another_is_refused(build: type, says: str, line: str) -> None:
    with pytest.raises(cachefree.CaptureError) as refused:
        cachefree.rewrite(seeded(build)())
    assert says in str(refused.value)
    assert line in str(refused.value)
