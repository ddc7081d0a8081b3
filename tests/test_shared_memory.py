"""Tensors that share memory: what a write, a view by layout or another name of a tensor shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import cachefree

from .models.case import seeded


class Layer(nn.Module):
    """One projection, and the rows of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def rows(self, x: torch.Tensor, past: Any) -> torch.Tensor:
        k = self.lin(x)
        return k if past is None else torch.cat([past, k], 1)


X = torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(0))
EXAMPLE = (torch.zeros(2, 5, 8),)


def agrees(make: Any, *, refills: bool = False) -> None:
    """Compares calls in a row; where the caller refills its buffer of inputs, too."""
    model = seeded(make)()
    rewritten = cachefree.rewrite(model, EXAMPLE)
    for lengths in ((3, 1, 2), (1, 1, 4)):
        for batch in (1, 3):
            theirs = mine = None
            start = 0
            for query in lengths:
                inputs = [X[:batch, start : start + query].clone() for _ in range(2)]
                with torch.no_grad():
                    expected, theirs = model(inputs[0], theirs)
                    result, mine = rewritten(inputs[1], mine)
                for each in inputs if refills else ():
                    each.fill_(7.0)
                torch.testing.assert_close(result, expected)
                torch.testing.assert_close(mine, theirs)
                assert mine.dtype == theirs.dtype
                start += query


class LastFrame(Layer):
    """Keeps a copy of the last frame."""

    def kept(self, x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x[:, -1:]).copy_(x[:, -1:])

    def forward(self, x: torch.Tensor, past: Any = None) -> Any:
        before = torch.zeros_like(x[:, :1]) if past is None else past
        return self.lin(torch.cat([before, x[:, :-1]], 1)), self.kept(x)


class LastFrameTurned(LastFrame):
    """Copies through a view of all of the copy."""

    def kept(self, x: torch.Tensor) -> torch.Tensor:
        kept = x.new_zeros(x.shape[0], 1, 8)
        kept.transpose(0, 1).copy_(x[:, -1:].transpose(0, 1))
        return kept


@pytest.mark.parametrize("make", [LastFrame, LastFrameTurned])
def test_a_copy_is_no_other_name_of_the_input(make: Any) -> None:
    agrees(make, refills=True)


class Half(Layer):
    """Adds float32 to float16 in place, which stays float16."""

    def forward(self, x: torch.Tensor, past: Any = None) -> Any:
        k = self.rows(x, past)
        h = k.half()
        h.mul_(k).add_(k, alpha=0.5)
        return x + h.float().mean(1, keepdim=True), k


def test_a_write_keeps_the_dtype_of_what_it_writes_to() -> None:
    agrees(Half)


class Powers(Layer):
    """Writes with operators whose forms without the write have other names."""

    def forward(self, x: torch.Tensor, past: Any = None) -> Any:
        k = self.rows(x, past)
        h = (k * 1).pow_(2)
        h //= 0.1
        return x + h.mean(1, keepdim=True), k


def test_the_form_without_the_write_is_found_by_its_arguments() -> None:
    agrees(Powers)


class Turned(Layer):
    """Gives a matrix other axes in place; what was seen of it before stays what it is."""

    def forward(self, x: torch.Tensor, past: Any = None) -> Any:
        k = self.rows(x, past)
        w = self.lin.weight * 1
        row = w[0]
        w.t_()
        return x @ w + row + k.mean(1, keepdim=True), k


class TurnedTwice(Layer):
    """The result of a write is the tensor itself, whose axes change for every name of it."""

    def forward(self, x: torch.Tensor, past: Any = None) -> Any:
        k = self.rows(x, past)
        w = k * 1
        same = w.add_(1)
        same.unsqueeze_(1).transpose_(0, 1)
        w.squeeze_(0)
        w[:, 0] += 1
        return x + same.sum(1, keepdim=True), k


class TurnedInput(Layer):
    """The caller's own tensor is given other axes."""

    def forward(self, x: torch.Tensor, past: Any = None) -> Any:
        k = self.rows(x, past)
        return x.transpose_(1, 2).transpose(1, 2) + k.mean(1, keepdim=True), k


class TurnedThroughAnotherName(Layer):
    """``contiguous`` gives the tensor itself, so that it has other axes too."""

    def forward(self, x: torch.Tensor, past: Any = None) -> Any:
        k = self.rows(x, past)
        w = self.lin.weight * 1
        w.contiguous().t_()
        return x @ w + k.mean(1, keepdim=True), k


@pytest.mark.parametrize("make", [Turned, TurnedTwice, TurnedThroughAnotherName])
def test_other_axes_in_place_are_a_view(make: Any) -> None:
    agrees(make)


class TurnedBehindDropout(Layer):
    """Dropout that is at rest gives the tensor itself, so that it has other axes too."""

    def forward(self, x: torch.Tensor, past: Any = None) -> Any:
        k = self.rows(x, past)
        w = self.lin.weight * 1
        nn.functional.dropout(w, 0.5, training=False).t_()
        return x @ w + k.mean(1, keepdim=True), k


class WrittenBehindDropout(Layer):
    """Dropout that is at rest gives the tensor itself, so that a write to the one is to both."""

    def forward(self, x: torch.Tensor, past: Any = None) -> Any:
        k = self.rows(x, past)
        w, other = k * 1, k * 2
        nn.functional.dropout(w, 0.5, training=False).flatten(1).add_(1)
        dropped = nn.functional.dropout(other, 0.5, training=False)
        other.mul_(2)
        return x + (w + dropped).sum(1, keepdim=True), k


def test_a_write_behind_dropout_is_seen() -> None:
    agrees(WrittenBehindDropout)


class TurnedWhereItMayBeOne(Layer):
    """With one row ``contiguous`` gives the tensor itself, with more it gives a copy."""

    def forward(self, x: torch.Tensor, past: Any = None) -> Any:
        k = self.rows(x, past)
        w = k.transpose(0, 1)
        w.contiguous().transpose_(0, 1)
        return x + (w.sum(0) if w.shape[0] == k.shape[0] else w.sum(1)), k


class Strided(Layer):
    """Views rows by their layout where they are transposed on the first call alone."""

    def forward(self, x: torch.Tensor, past: Any = None) -> Any:
        k = self.lin(x).transpose(1, 2)
        k = k if past is None else torch.cat([past, k], 2)
        n = k.shape[2]
        return x + k.as_strided((k.shape[0], 8, n), (8 * n, n, 1)).mean(2)[:, None], k


class TwoNames(Layer):
    """Adds to a state in place; its other part is a view of it."""

    def forward(self, x: torch.Tensor, past: Any = None) -> Any:
        with torch.no_grad():
            if past is None:
                state = torch.zeros(x.shape[0], 8)
                past = (state, state[:, :4])
            past[0].add_(self.lin(x).sum(1))
        return x + past[0][:, None] + past[1].sum(1)[:, None, None], past


class FromBuffer(Layer):
    """The first state is a buffer of the model itself, which later calls add to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("start", torch.ones(1, 8))

    def forward(self, x: torch.Tensor, past: Any = None) -> Any:
        with torch.no_grad():
            state = self.start.view(1, 8) if past is None else past.add_(self.lin(x).sum((0, 1)))
        return x + state[:, None], state


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (TurnedInput, "gives a tensor other axes in place"),
        (TurnedBehindDropout, "gives a tensor other axes in place"),
        (TurnedWhereItMayBeOne, "gives a tensor other axes in place"),
        (Strided, "views a tensor by its layout in memory"),
        (TwoNames, r"write in place to 'past\[0\]', which shares memory with the result\[1\]\[1\]"),
        (FromBuffer, "write in place to 'past', which shares memory with start"),
    ],
)
def test_what_memory_alone_tells_is_refused(make: Any, text: str) -> None:
    with pytest.raises(cachefree.CacheFreeError, match=text):
        cachefree.rewrite(seeded(make)(), EXAMPLE)


class Windows(Layer):
    """Windows of four rows, by the layout of what ``pad`` has just computed."""

    def forward(self, x: torch.Tensor, past: Any = None) -> Any:
        k = self.rows(x, past)
        padded = torch.nn.functional.pad(k, (0, 0, 3, 0))
        far, near, _ = padded.stride()
        windows = padded.as_strided((k.shape[0], k.shape[1], 4, 8), (far, near, near, 1))
        return x + windows.mean(2)[:, -x.shape[1] :], k


class TwoStates(Layer):
    """Two states that are rows of one tensor, and share no element."""

    def forward(self, x: torch.Tensor, past: Any = None) -> Any:
        with torch.no_grad():
            if past is None:
                both = torch.zeros(2, x.shape[0], 8)
                past = (both[0], both[1])
            past[0].add_(self.lin(x).sum(1))
            past[1].add_(past[0])
        return x + past[0][:, None] + past[1][:, None], past


def test_layout_that_is_known_is_taken() -> None:
    agrees(Windows)


def test_parts_of_one_tensor_that_share_nothing_are_taken() -> None:
    assert cachefree.rewrite(seeded(TwoStates)(), EXAMPLE).report.verdict.name == "PROVED_REAL"


class Preallocated(nn.Module):
    """Keys and values in preallocated buffers, written where the rows end."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8)
        self.keys, self.values = self.buffers_of()
        self.all = [self.keys]

    def buffers_of(self) -> tuple[torch.Tensor, ...]:
        both = torch.zeros(2, 6, 20, 8)
        return both[0], both[1]

    def forward(self, x: torch.Tensor, start: int = 0) -> torch.Tensor:
        b, n, _ = x.shape
        self.keys[:b, start : start + n] = self.k(x)
        self.values[:b, start : start + n] = self.v(x)
        rows = self.keys[:b, : start + n] * self.values[:b, : start + n]
        return x + rows.mean(1, keepdim=True)


class Overlapping(Preallocated):
    """The values lie one row behind the keys, in the same memory."""

    def buffers_of(self) -> tuple[torch.Tensor, ...]:
        both = torch.zeros(6, 21, 8)
        return both[:, :20], both[:, 1:]


class ReadByName(Preallocated):
    """Reads what was written to a buffer by another name of it."""

    def forward(self, x: torch.Tensor, start: int = 0) -> torch.Tensor:
        y = super().forward(x, start)
        return y + self.all[0][: x.shape[0], : start + x.shape[1]].sum(1, keepdim=True)


class ReadByView(Preallocated):
    """Reads what was written to a buffer by a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.all = (self.keys.view(6, 20, 8),)

    def forward(self, x: torch.Tensor, start: int = 0) -> torch.Tensor:
        y = super().forward(x, start)
        return y + self.all[0][: x.shape[0], : start + x.shape[1]].sum(1, keepdim=True)


@pytest.mark.parametrize("make", [Preallocated, ReadByName])
def test_buffers_that_lie_side_by_side_are_taken(make: Any) -> None:
    model = seeded(make)()
    rewritten = cachefree.rewrite(model, EXAMPLE)
    for start, query in ((0, 3), (3, 1), (4, 5)):
        x = X[:2, start : start + query]
        with torch.no_grad():
            torch.testing.assert_close(rewritten(x, start), model(x, start))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (Overlapping, r"keeps state in '(all\[0\]|values)', which shares memory with '"),
        (ReadByView, "keeps state in 'keys', which shares memory with another one that it uses"),
    ],
)
def test_buffers_with_elements_in_common_are_refused(make: Any, text: str) -> None:
    with pytest.raises(cachefree.CacheFreeError, match=text):
        cachefree.rewrite(seeded(make)(), EXAMPLE)
