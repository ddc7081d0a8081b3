"""Inputs of the first call alone, which later calls leave out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cachefree

from .models.first_only import Listener, OtherwiseWithoutSounds, SummingListener
from .small import small

GENERATOR = torch.Generator().manual_seed(3)
IDS = torch.randint(0, 12, (2, 12), generator=GENERATOR)


def sounds(rows: int) -> torch.Tensor:
    return torch.randn(2, rows, 3, generator=GENERATOR)


def rewritten(model: nn.Module) -> Any:
    return cachefree.rewrite(model, {"ids": IDS[:, :4], "sounds": sounds(5)}, progress=False)


@pytest.fixture(scope="module")
def listener() -> tuple[nn.Module, Any]:
    model = small(Listener)
    return model, rewritten(model)


def chunks(function: Callable[..., Any], heard: torch.Tensor | None) -> list[torch.Tensor]:
    """What calls on chunks of one text give, the sounds before the first of them."""
    logits, past = function(IDS[:, :3], sounds=heard)
    given = [logits]
    for start, end in ((3, 4), (4, 8), (8, 12)):
        logits, past = function(IDS[:, start:end], past=past)
        given.append(logits)
    return [*given, *past]


def test_later_calls_leave_out_what_stands_before_the_text(listener: Any) -> None:
    model, one = listener
    assert one.report.verdict is cachefree.Verdict.PROVED_EXACT
    for rows in (1, 4, 9):
        heard = sounds(rows)
        torch.testing.assert_close(chunks(one, heard), chunks(model, heard), rtol=0, atol=0)
    assert "sounds given on the first call alone" in one.report.notes


def test_the_domain_says_which_calls_take_it(listener: Any) -> None:
    _, one = listener
    assert "Eq(sounds_1, 0)" in str(one.report.domain)


def test_none_stands_for_leaving_it_out(listener: Any) -> None:
    model, one = listener
    _, past = model(IDS[:, :3], sounds(4))
    torch.testing.assert_close(one(IDS[:, 3:], None, past), model(IDS[:, 3:], None, past))


def test_random_calls_leave_it_out_too(listener: Any) -> None:
    model, one = listener
    cachefree.verify(model, one, backends=("eager",), max_examples=15, seed=0)


def test_it_is_left_out_on_onnx_runtime(listener: Any, tmp_path: Path) -> None:
    model, one = listener
    path = tmp_path / "model.onnx"
    cachefree.to_onnx(one, path, progress=False)
    session = cachefree.load_onnx(path, like=one)
    heard = sounds(4)
    torch.testing.assert_close(chunks(session, heard), chunks(model, heard))


def test_a_path_without_it_that_computes_otherwise_is_refused() -> None:
    with pytest.raises(cachefree.UnsupportedBranchError, match="compute different things"):
        rewritten(small(OtherwiseWithoutSounds))


def test_what_has_no_rows_to_leave_out_is_refused_or_equal() -> None:
    model = small(SummingListener)
    heard = sounds(4)
    with pytest.raises(cachefree.CacheFreeError, match="sounds"):
        chunks(rewritten(model), heard)
