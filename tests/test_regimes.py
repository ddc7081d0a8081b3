"""Choices by size: proved on both sides, or kept as the domain and enforced. Never dropped."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import cachefree
from cachefree import DomainError, UnsupportedBranchError

from .assertions import equal_calls, says_what_to_do
from .models.case import calls, tokens
from .small import Small, rewritten_small, small

DRAWN = calls(tokens(12), cache="past")


class OfSmall:
    """What `equal_calls` needs of a case."""

    prefill = staticmethod(DRAWN["prefill"])
    step = staticmethod(DRAWN["step"])


def compare(
    build: Any, grid: tuple[tuple[int, tuple[int, ...]], ...] | None = None, **options: Any
) -> cachefree.Rewritten:
    """The rewritten model, after it was right or refused to answer at every size of the grid."""
    model = small(build)
    rewritten = rewritten_small(model, **options)
    sizes = {} if grid is None else {"grid": grid}
    equal_calls(OfSmall, model, rewritten, may_raise=DomainError, **sizes)
    return rewritten


def conditions(rewritten: cachefree.Rewritten) -> str:
    return str(rewritten.report.domain)


def ids(batch: int, query: int) -> torch.Tensor:
    return torch.zeros(batch, query, dtype=torch.long)


def past(batch: int, length: int) -> Any:
    return tuple(torch.zeros(batch, length, 6) for _ in range(2))


class SameOnBothSides(Small):
    """Asks for one token, and does in other words what it does for several."""

    def attend(self, q, k):
        if q.shape[1] == 1:
            return (q @ k.transpose(1, 2)).softmax(-1)
        return super().attend(q, k)


def test_a_choice_that_changes_nothing_is_discharged() -> None:
    rewritten = compare(SameOnBothSides)
    assert rewritten.report.verdict.is_proof
    for query in (1, 2):
        for length in (0, 1, 5):
            rewritten(ids(2, query), past(2, length) if length else None)


class AskedButAlwaysTrue(Small):
    def attend(self, q, k):
        if k.shape[1] >= q.shape[1]:
            return super().attend(q, k)
        return q


def test_a_choice_that_cannot_fall_otherwise_is_no_condition() -> None:
    rewritten = compare(AskedButAlwaysTrue)
    assert conditions(rewritten).count("every size") == 2


class ShorterForLongPasts(Small):
    """Beyond 16 positions the scores are scaled down."""

    def attend(self, q, k):
        scores = super().attend(q, k)
        if k.shape[1] > 16:
            scores = scores * 0.5
        return scores


def test_a_threshold_is_the_domain_and_is_enforced() -> None:
    grid = ((1, (3, 1, 5)), (2, (10, 6, 1)), (1, (16, 1)), (1, (17, 1)), (2, (20,)))
    rewritten = compare(ShorterForLongPasts, grid)
    assert rewritten.report.verdict.is_proof
    rewritten(ids(1, 3), past(1, 13))
    rewritten(ids(1, 16))
    with pytest.raises(DomainError) as caught:
        rewritten(ids(1, 4), past(1, 13))
    assert "16" in str(caught.value)
    assert "test_regimes.py" in str(caught.value)
    assert "16" in conditions(rewritten)


class LogLength(Small):
    """A number that is computed from the length, within a limit."""

    def attend(self, q, k):
        scale = 1.0 if k.shape[1] <= 32 else math.log(32)
        return super().attend(q * scale, k)


def test_a_limit_far_away_is_in_the_domain() -> None:
    rewritten = compare(LogLength)
    assert "32" in conditions(rewritten)
    with pytest.raises(DomainError, match="32"):
        rewritten(ids(1, 33))


class AnotherPathForOneSentence(Small):
    def attend(self, q, k):
        if q.shape[0] == 1:
            return super().attend(q, k) * 2
        return super().attend(q, k)


class AnotherPathForOneToken(Small):
    def attend(self, q, k):
        if q.shape[1] == 1:
            return super().attend(q, k) * 2
        return super().attend(q, k)


class AnotherPathForOnePosition(Small):
    def attend(self, q, k):
        if k.shape[1] - q.shape[1] == 1:
            return super().attend(q, k) * 2
        return super().attend(q, k)


@pytest.mark.parametrize(
    ("build", "condition", "inside", "outside"),
    [
        (AnotherPathForOneSentence, "Ne(batch, 1)", (2, 3, 4), (1, 3, 4)),
        (AnotherPathForOnePosition, "Ne(past, 1)", (2, 3, 4), (2, 3, 1)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_another_path_at_one_is_outside_the_domain(
    build: Any, condition: str, inside: tuple[int, int, int], outside: tuple[int, int, int]
) -> None:
    rewritten = compare(build)
    assert condition in conditions(rewritten)
    batch, query, length = inside
    rewritten(ids(batch, query), past(batch, length))
    batch, query, length = outside
    with pytest.raises(DomainError, match=r"test_regimes\.py"):
        rewritten(ids(batch, query), past(batch, length))


def test_another_path_for_one_token_is_refused_with_its_line() -> None:
    with pytest.raises(UnsupportedBranchError) as caught:
        rewritten_small(small(AnotherPathForOneToken))
    says_what_to_do(caught.value)
    assert "if q.shape[1] == 1:" in str(caught.value)
    assert "query, 1" in str(caught.value)


class TwoThresholds(Small):
    def attend(self, q, k):
        scores = super().attend(q, k)
        if q.shape[1] > 4 and k.shape[1] > 9:
            return scores + 0.0
        return scores


def test_two_thresholds_with_one_result_are_unified() -> None:
    grid = ((1, (3, 5, 1, 6)), (2, (4, 6, 5)), (2, (12, 1, 5)))
    rewritten = compare(TwoThresholds, grid)
    for query in (4, 5):
        for length in (4, 5, 6):
            rewritten(ids(2, query), past(2, length))


class Truncated(Small):
    """Keeps the last five positions."""

    def forward(self, ids, past=None):
        start = 0 if past is None else past[0].shape[1]
        x = self.emb(ids) + self.pos(torch.arange(start, start + ids.shape[1]))
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if past is not None:
            k, v = torch.cat((past[0], k), 1), torch.cat((past[1], v), 1)
        return self.out(self.attend(q, k) @ v), (k[:, -5:], v[:, -5:])


def test_both_sides_of_a_window_are_one_graph() -> None:
    grid = ((1, (1, 1, 1, 1, 1, 1, 1)), (2, (3, 4, 1)), (1, (5, 1)), (2, (9, 2)), (1, (4, 1, 1)))
    model = small(Truncated)
    rewritten = rewritten_small(model)
    assert rewritten.report.verdict.is_proof
    assert equal_calls(OfSmall, model, rewritten, grid=grid) == 17


def test_the_domain_of_past_zero_is_that_of_the_first_call() -> None:
    """An empty cache that is given is a first call."""
    model = small(SameOnBothSides)
    rewritten = rewritten_small(model)
    for query in (1, 4):
        tokens_of = torch.arange(query)[None] % 12
        with torch.no_grad():
            given = rewritten(tokens_of, rewritten.empty_cache(1))
            torch.testing.assert_close(given[0], model(tokens_of)[0])


class MaskBesideAState(nn.Module):
    """A sum is carried; a mask over all tokens is given, which alone tells how many are past."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 4)

    def forward(self, ids, state=None, mask=None):
        x = self.embed(ids)
        if mask is not None:
            x = x * mask[:, -ids.shape[1] :, None]
        y = x.cumsum(1)
        if state is not None:
            y = y + state[:, None]
        return y, y[:, -1]


def test_a_mask_over_all_tokens_beside_a_state() -> None:
    model, ids, mask = MaskBesideAState().eval(), torch.arange(10).view(2, 5), torch.ones(2, 10)
    rewritten = cachefree.rewrite(model, {"ids": ids, "mask": mask[:, :5]})
    assert rewritten.report.verdict.is_proof
    y, state = rewritten(ids, mask=mask[:, :5])
    torch.testing.assert_close(y, model(ids, mask=mask[:, :5])[0])
    mask[0, 6] = 0
    torch.testing.assert_close(rewritten(ids, state, mask)[0], model(ids, state, mask)[0])
    with pytest.raises(cachefree.DomainError, match="past = 0"):
        rewritten(ids, state, mask[:, :5])
