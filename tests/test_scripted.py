"""Scripted functions are run as they were written, where that can only mean the same."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

import cachefree
from cachefree.errors import DomainError, UnsupportedBranchError
from cachefree.scripted import run_as_written

from .assertions import same
from .models.case import seeded

IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8], [9, 7, 9, 3, 2, 3]])
EXAMPLES = (IDS[:2, :3],)


@torch.jit.script
def rotated_half(x: torch.Tensor) -> torch.Tensor:
    x1, x2 = x.chunk(2, dim=x.ndim - 1)
    return torch.cat((-x2, x1), dim=x1.ndim - 1)


@torch.jit.script
def apply_rotary(x: torch.Tensor, table: torch.Tensor, offset: int = 0) -> torch.Tensor:
    length, width = x.size(1), x.size(2)
    angles = table[offset : offset + length].view(1, length, width)
    return x * angles.cos() + rotated_half(x) * angles.sin()


@torch.jit.script
def gelu_impl(x):
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * x * (1.0 + 0.044715 * x * x)))


@torch.jit.script
def causal(length: int, total: int) -> torch.Tensor:
    hidden = torch.ones(length, total, dtype=torch.bool)
    return hidden.triu(total - length + 1)


class Scripted(nn.Module):
    """Rotary positions, masks and activations in scripted functions."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.emb, self.qkv = nn.Embedding(12, width), nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, 12)
        angles = torch.arange(64.0)[:, None] / 100 ** (torch.arange(width) / width)
        self.register_buffer("table", angles, persistent=False)

    def forward(self, ids: torch.Tensor, past: Any = None) -> Any:
        q, k, v = self.qkv(self.emb(ids)).chunk(3, dim=-1)
        offset = 0 if past is None else past[0].size(1)
        q, k = apply_rotary(q, self.table, offset), apply_rotary(k, self.table, offset)
        if past is not None:
            k, v = torch.cat((past[0], k), 1), torch.cat((past[1], v), 1)
        scores = (q @ k.mT).masked_fill(causal(q.size(1), k.size(1)), -torch.inf)
        return self.out(gelu_impl(scores.softmax(-1) @ v)), (k, v)


def equal_in_chunks(model: nn.Module, rewritten: Any, *chunks: int) -> None:
    past, other, start = None, None, 0
    for chunk in chunks:
        ids = IDS[:, start : start + chunk]
        (logits, past), (got, other) = model(ids, past), rewritten(ids, other)
        same(got, logits)
        same(other, past)
        start += chunk


def test_functions_that_read_sizes_are_in_the_graph() -> None:
    model = seeded(Scripted)()
    rewritten = cachefree.rewrite(model, EXAMPLES)
    assert rewritten.report.verdict.name == "PROVED_EXACT"
    for chunks in ((6,), (1, 1, 4), (3, 2, 1)):
        equal_in_chunks(model, rewritten, *chunks)


@torch.jit.script
def louder(x: torch.Tensor) -> torch.Tensor:
    return x * 2 if x.size(1) == 1 else x


@torch.jit.script
def absolute(x: torch.Tensor) -> torch.Tensor:
    return torch.abs(x)


@torch.jit.script
def louder_when_long(x: torch.Tensor, limit: int) -> torch.Tensor:
    if x.size(1) > limit:
        x = x * 2
    return x


class AsksInAScript(Scripted):
    def forward(self, ids: torch.Tensor, past: Any = None) -> Any:
        logits, present = super().forward(ids, past)
        return self.asked(logits, present[0]), present


class OneToken(AsksInAScript):
    def asked(self, logits: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return louder(logits)


class Long(AsksInAScript):
    def asked(self, logits: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return louder_when_long(logits, 4)


def test_what_they_ask_about_sizes_is_heard() -> None:
    with pytest.raises(UnsupportedBranchError) as caught:
        cachefree.rewrite(seeded(OneToken)(), EXAMPLES)
    assert "in louder\n         return x * 2 if x.size(1) == 1 else x" in str(caught.value)
    model = seeded(Long)()
    rewritten = cachefree.rewrite(model, EXAMPLES)
    equal_in_chunks(model, rewritten, 4, 1, 1)
    with pytest.raises(DomainError, match="query"):
        rewritten(IDS)


@torch.jit.script
def scaled(x: torch.Tensor, by: float) -> torch.Tensor:
    return x * by


@torch.jit.script
def shape_of(x: torch.Tensor) -> list[int]:
    return x.shape


@torch.jit.script
def asks_what_it_is(x: torch.Tensor) -> torch.Tensor:
    return x + 1 if torch.jit.is_scripting() else x


@torch.jit.script
def calls_one_that_asks(x: torch.Tensor) -> torch.Tensor:
    return asks_what_it_is(x)


def gain(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@torch.jit.script
def calls_python(x: torch.Tensor) -> torch.Tensor:
    return gain(
        x,
    )


def test_a_function_that_another_one_stands_for_by_now(monkeypatch: pytest.MonkeyPatch) -> None:
    def louder_gain(x: torch.Tensor) -> torch.Tensor:
        return x * 3

    with run_as_written():
        assert calls_python(torch.ones(1)) == 2
    called = []
    monkeypatch.setitem(globals(), "gain", lambda x: called.append(x) or louder_gain(x))
    with run_as_written():
        assert calls_python(torch.ones(1)) == 2, "as it was compiled"
    assert not called


@torch.jit.script
def truth(x: torch.Tensor, n: int) -> torch.Tensor:
    return x * n


@pytest.mark.parametrize(
    "call",
    [
        lambda: scaled(torch.ones(2, dtype=torch.int64), 2),
        lambda: scaled(torch.ones(2, dtype=torch.int64), by=2),
        lambda: (shape_of(torch.ones(2, 3)), type(shape_of(torch.ones(2, 3)))),
        lambda: asks_what_it_is(torch.ones(2)),
        lambda: calls_one_that_asks(torch.ones(2)),
        lambda: truth(torch.ones(2, dtype=torch.int64), True),
        lambda: truth(torch.ones(2), torch.tensor(3)),
        lambda: causal(2, 5),
        lambda: rotated_half(torch.arange(6.0)),
    ],
)
def test_each_gives_what_torchscript_gives(call: Any) -> None:
    compiled = call()
    with run_as_written():
        written = call()
    if isinstance(compiled, torch.Tensor):
        assert written.dtype is compiled.dtype
        assert torch.equal(written, compiled)
    else:
        assert written == compiled


def test_python_runs_in_this_thread_and_in_the_block_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, ran = torch.jit.ScriptFunction.__call__, []

    def noted(x: torch.Tensor) -> torch.Tensor:
        ran.append(threading.get_ident())
        return x

    monkeypatch.setattr(torch, "abs", noted)
    with run_as_written():
        other = threading.Thread(target=absolute, args=(torch.ones(1),))
        other.start()
        other.join()
        assert not ran
        absolute(torch.ones(1))
    absolute(torch.ones(1))
    assert ran == [threading.get_ident()]
    assert torch.jit.ScriptFunction.__call__ is before
