"""Rows that the first call alone joins: all of them where nothing is past, none later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import cachefree
from cachefree.errors import CacheNotFoundError, UnsupportedBranchError

from .assertions import same
from .models.case import seeded
from .models.start_rows import CASES, Prompted, Transducer
from .small import IDS


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case is CASES[1] else pytest.mark.slow) for case in CASES],
    ids=str,
)
def test_onnx_runtime_joins_them_once(case: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = case.build()
    rewritten = cachefree.rewrite(model, case.example_inputs)
    decoder = cachefree.load_onnx(cachefree.to_onnx(rewritten, tmp_path / "m.onnx"), like=rewritten)
    inputs = IDS if case.example_inputs is None else torch.rand(3, 5, 8)
    past, given = None, None
    for start, end in ((0, 2), (2, 3), (3, 5)):
        (expected, past), (found, given) = (
            model(inputs[:, start:end], past),
            decoder(inputs[:, start:end], given),
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class Louder(Prompted):
    """The first call computes something else besides."""

    def forward(self, ids, past=None):
        logits, new = super().forward(ids, past)
        return (logits * 2 if past is None else logits), new


class PromptedAgain(Prompted):
    """Long later calls join rows of their own."""

    def forward(self, ids, past=None):
        if past is not None and ids.shape[1] > 20:
            ids = torch.cat([ids[:, :1], ids], dim=1)
        return super().forward(ids, past)


class AsManyAsTokens(Prompted):
    """As many rows as there are tokens: no fixed number."""

    def forward(self, ids, past=None):
        if past is None:
            ids = torch.cat([torch.zeros_like(ids), ids], dim=1)
        return super().forward(ids, past)


@pytest.mark.parametrize("build", [Louder, AsManyAsTokens])
def test_other_differences_are_refused(build: type[Prompted]) -> None:
    with pytest.raises((CacheNotFoundError, UnsupportedBranchError)):
        cachefree.rewrite(seeded(build)())


def test_rows_of_long_later_calls_are_outside_the_domain() -> None:
    model = seeded(PromptedAgain)()
    rewritten = cachefree.rewrite(model)
    ids = torch.arange(28).remainder(31)[None]
    past = model(ids[:, :3])[1]
    same(rewritten(ids[:, 3:9], past), model(ids[:, 3:9], past))
    with pytest.raises(cachefree.DomainError):
        rewritten(ids[:, 3:], past)


def test_a_state_of_fixed_size_is_empty_on_the_first_call() -> None:
    model = seeded(Transducer)()
    rewritten = cachefree.rewrite(model)
    assert [tuple(state.shape) for state in rewritten.empty_cache(3)] == [(0, 3, 16), (2, 3, 16)]
    zeros = tuple(torch.zeros(2, 3, 16) for _ in range(2))
    for states in (None, zeros):
        same(rewritten(IDS, states), model(IDS, states))
    assert model(IDS)[0].shape != model(IDS, zeros)[0].shape
    with pytest.raises(cachefree.DomainError):
        rewritten(IDS, tuple(torch.zeros(1, 3, 16) for _ in range(2)))
