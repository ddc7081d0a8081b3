"""What ``check="test"`` draws: a difference that only some values show is found."""

from __future__ import annotations

import pytest
import torch

import cachefree

from .assertions import says_what_to_do
from .small import Small, small

IDS = torch.tensor([[4, 8, 15, 16], [23, 42, 3, 7]])


class MarksRareTokens(Small):
    """Tokens from one number on are marked, on later calls alone."""

    least = 40

    def __init__(self) -> None:
        super().__init__(vocab=50)

    def forward(self, ids, past=None):
        logits, present = super().forward(ids, past)
        if past is not None:
            logits = logits + (ids >= self.least).unsqueeze(-1)
        return logits, present


class MarksNone(MarksRareTokens):
    """No token has such a number."""

    least = 50


def test_tokens_are_drawn_from_the_whole_table() -> None:
    with pytest.raises(cachefree.UnsupportedBranchError) as caught:
        cachefree.rewrite(small(MarksRareTokens), (IDS,), check="test")
    says_what_to_do(caught.value)


def test_what_no_token_shows_is_accepted() -> None:
    rewritten = cachefree.rewrite(small(MarksNone), (IDS,), check="test")
    assert rewritten.report.verdict is cachefree.Verdict.TESTED
