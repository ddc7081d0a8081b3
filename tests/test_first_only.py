"""Inputs of the first call alone, which later calls leave out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cachefree

from .assertions import says_what_to_do
from .models.first_only import (
    Captioner,
    CaptionerOfTheText,
    CaptionerThatAsksLater,
    CaptionerThatDoublesLater,
    Listener,
    Onlooker,
    OtherwiseWithoutSounds,
    SummingListener,
    TwicePrefixed,
    TwoEyes,
)
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
    cachefree.verify(model, one, backends=("eager",), dtypes=(), max_examples=15, seed=0)


def test_it_is_left_out_on_onnx_runtime(listener: Any, tmp_path: Path) -> None:
    model, one = listener
    path = tmp_path / "model.onnx"
    cachefree.to_onnx(one, path, progress=False)
    session = cachefree.load_onnx(path, like=one)
    heard = sounds(4)
    torch.testing.assert_close(chunks(session, heard), chunks(model, heard))


@pytest.mark.slow
def test_a_path_without_it_that_computes_otherwise_is_refused() -> None:
    with pytest.raises(cachefree.UnsupportedBranchError, match="compute different things"):
        rewritten(small(OtherwiseWithoutSounds))


@pytest.mark.slow
def test_what_is_computed_of_it_has_no_rows_where_it_cannot_be_empty_itself() -> None:
    model = small(SummingListener)
    one = rewritten(model)
    heard = sounds(4)
    torch.testing.assert_close(chunks(one, heard), chunks(model, heard), rtol=0, atol=0)


@pytest.mark.parametrize("build", [Captioner, CaptionerThatAsksLater])
def test_what_only_the_first_path_joins_has_no_rows_later(build: type[Captioner]) -> None:
    model = small(build)
    one = rewritten(model)
    assert one.report.verdict is cachefree.Verdict.PROVED_EXACT
    assert "sounds given on the first call alone" in one.report.notes
    for rows in (1, 4):
        heard = sounds(rows)
        torch.testing.assert_close(chunks(one, heard), chunks(model, heard), rtol=0, atol=0)
    _, past = one(IDS[:, :3], sounds=heard)
    with pytest.raises(cachefree.CacheFreeError, match="outside the domain"):
        one(IDS[:, 3:4], sounds=heard, past=past)


def test_what_the_sounds_give_is_dropped_where_the_first_path_drops_it() -> None:
    model = small(CaptionerOfTheText)
    one = rewritten(model)
    for rows in (1, 4):
        heard = sounds(rows)
        assert one(IDS[:, :3], sounds=heard)[0].shape == (2, 3, 12)
        torch.testing.assert_close(chunks(one, heard), chunks(model, heard))


def test_another_value_than_the_one_that_is_joined_is_refused() -> None:
    with pytest.raises(cachefree.UnsupportedBranchError, match="compute different things"):
        rewritten(small(CaptionerThatDoublesLater))


def picture(height: int = 4, width: int = 6) -> torch.Tensor:
    return torch.randn(2, 1, height, width, generator=GENERATOR)


@pytest.fixture(scope="module")
def onlooker() -> tuple[nn.Module, Any]:
    model = small(Onlooker)
    given = {"ids": IDS[:, :4], "picture": picture()}
    return model, cachefree.rewrite(model, given, progress=False)


def after_seeing(function: Callable[..., Any], seen: torch.Tensor) -> list[torch.Tensor]:
    """What calls on chunks of one text give, the picture before the first of them."""
    logits, past = function(IDS[:, :3], picture=seen)
    given = [logits]
    for start, end in ((3, 4), (4, 8), (8, 12)):
        logits, past = function(IDS[:, start:end], past=past)
        given.append(logits)
    return [*given, *past]


def test_a_picture_is_seen_by_the_encoder_and_left_out_later(onlooker: Any) -> None:
    model, one = onlooker
    assert one.report.verdict is cachefree.Verdict.PROVED_EXACT
    for size in ((4, 6), (2, 2), (8, 4)):
        seen = picture(*size)
        torch.testing.assert_close(
            after_seeing(one, seen), after_seeing(model, seen), rtol=0, atol=0
        )


def test_the_encoder_gives_what_stands_before_the_text(onlooker: Any) -> None:
    model, one = onlooker
    seen = picture()
    (states,) = one.encoder(seen)
    assert states.shape == (2, 6, 6)
    given = one(IDS[:, :3], picture_states=states)
    torch.testing.assert_close(given[0], model(IDS[:, :3], seen)[0])


@pytest.mark.parametrize("is_first", [True, False])
def test_a_call_that_was_not_compared_is_refused(onlooker: Any, is_first: bool) -> None:
    model, one = onlooker
    _, past = model(IDS[:, :3], picture())
    with pytest.raises(cachefree.DomainError, match="outside the domain"):
        one(IDS, None) if is_first else one(IDS[:, 3:], picture(), past)


def test_a_picture_is_left_out_on_onnx_runtime(onlooker: Any, tmp_path: Path) -> None:
    model, one = onlooker
    path = tmp_path / "model.onnx"
    cachefree.to_onnx(one, path, progress=False)
    session = cachefree.load_onnx(path, like=one)
    seen = picture()
    torch.testing.assert_close(after_seeing(session, seen), after_seeing(model, seen))


@pytest.mark.slow
def test_random_calls_see_a_picture_first(onlooker: Any) -> None:
    model, one = onlooker
    cachefree.verify(model, one, backends=("eager",), dtypes=(), max_examples=10, seed=0)


def test_what_is_seen_twice_is_refused() -> None:
    given = {"ids": IDS[:, :4], "picture": picture()}
    with pytest.raises(cachefree.UnsupportedBranchError, match="compute different things"):
        cachefree.rewrite(small(TwicePrefixed), given, progress=False)


@pytest.mark.slow
def test_one_of_two_pictures_is_refused() -> None:
    given = {"ids": IDS[:, :4], "left": picture(), "right": picture()}
    model = small(TwoEyes)
    one = cachefree.rewrite(model, given, progress=False)
    _, past = model(**given)
    torch.testing.assert_close(one(**given), model(**given))
    torch.testing.assert_close(one(IDS[:, 4:], past=past), model(IDS[:, 4:], past=past))
    for later in ({}, {"past": past}):
        with pytest.raises(cachefree.DomainError, match="left is given without right"):
            one(IDS[:, 4:], left=picture(), **later)


def test_there_is_no_certificate_without_the_pictures_sizes(
    onlooker: tuple[nn.Module, cachefree.Rewritten],
) -> None:
    _, rewritten = onlooker
    with pytest.raises(cachefree.CacheFreeError, match="has no certificate") as refused:
        _ = rewritten.certificate
    says_what_to_do(refused.value)
