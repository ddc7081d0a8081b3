"""Numbers that tell how much is past, beside a cache that is an argument."""

from __future__ import annotations

import pytest
import torch

import cachefree

from .models.case import seeded
from .models.counted import VOCAB, PastLength, Shifted, StartPosition, ThreeRows


@pytest.fixture(scope="module")
def start_position():
    return cachefree.rewrite(seeded(StartPosition)())


@pytest.fixture(scope="module")
def past_length():
    return cachefree.rewrite(seeded(PastLength)())


IDS = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))


def test_the_number_follows_the_cache(start_position) -> None:
    model = seeded(StartPosition)()
    assert "start_pos is the number of tokens that are past" in str(start_position.report)
    logits, cache = start_position(IDS[:, :5], 0)
    own, own_cache = model(IDS[:, :5], 0)
    torch.testing.assert_close(logits, own)
    logits, _ = start_position(IDS[:, 5:], 5, cache)
    torch.testing.assert_close(logits, model(IDS[:, 5:], 5, own_cache)[0])


def test_another_number_is_an_error(start_position) -> None:
    cache = start_position(IDS[:, :5], 0)[1]
    with pytest.raises(cachefree.DomainError) as raised:
        start_position(IDS[:, 5:], 4, cache)
    assert "start_pos is 4 where the cache holds 5" in str(raised.value)
    assert "Pass start_pos=5" in str(raised.value)
    with pytest.raises(cachefree.DomainError, match="start_pos is 3 where the cache holds 0"):
        start_position(IDS, 3)


def test_a_number_that_is_left_out_is_its_default(past_length) -> None:
    cache = past_length(IDS[:, :5])[1]
    with pytest.raises(cachefree.DomainError, match="past_length is 0 where the cache holds 5"):
        past_length(IDS[:, 5:], cache)
    model = seeded(PastLength)()
    own = model(IDS[:, 5:], model(IDS[:, :5])[1], 5)[0]
    torch.testing.assert_close(past_length(IDS[:, 5:], cache, 5)[0], own)


def test_a_shift_is_no_count() -> None:
    rewritten = cachefree.rewrite(seeded(Shifted)())
    assert rewritten.calling.counts == frozenset()
    cache = rewritten(IDS[:, :5])[1]
    with pytest.raises(cachefree.DomainError, match="'offset' was given"):
        rewritten(IDS[:, 5:], cache, 5)


def test_exporters_do_not_keep_the_number(start_position) -> None:
    arguments = start_position.export_args("torch")
    program = torch.export.export(start_position, **arguments)
    model = seeded(StartPosition)()
    cache = model(IDS[:, :7], 0)[1]
    logits, _ = program.module()(IDS[:, 7:], None, cache)
    torch.testing.assert_close(logits, model(IDS[:, 7:], 7, cache)[0])


@pytest.mark.slow
def test_several_rows_for_a_token() -> None:
    model = seeded(ThreeRows)()
    rewritten = cachefree.rewrite(model, (torch.zeros(2, 4, 3),))
    x = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(2))
    cache = rewritten(x[:, :4])[1]
    due, _ = model(x[:, 4:], model(x[:, :4])[1], 4)
    torch.testing.assert_close(rewritten(x[:, 4:], cache, 4)[0], due)
    cut = [tuple(rows[:, :, 1:] for rows in pair) for pair in cache]
    with pytest.raises(cachefree.DomainError, match="has size 11 on axis 2"):
        rewritten(x[:, 4:], cut, 3)
