"""A window whose length the code chooses in two cases, by a count that it keeps in Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cachefree

WINDOW = 5


class WindowCache:
    """Keys and values of the last positions, how many were seen, and a number of its own."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.seen = 0
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.limit = torch.tensor(window)

    def lengths(self, new: int) -> tuple[int, int]:
        offset = max(self.seen - self.window + 1, 0)
        if self.seen >= self.window:
            return self.window - 1 + new, offset
        return self.seen + new, offset

    def update(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen += keys.shape[1]
        if self.keys is not None:
            keys = torch.cat([self.keys, keys], 1)
            values = torch.cat([self.values, values], 1)
        self.keys = keys[:, -self.window + 1 :]
        self.values = values[:, -self.window + 1 :]
        return keys, values


class CountedWindowLM(nn.Module):
    """One layer that sees the last `WINDOW` positions; the mask hides padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(30, 8)
        self.project = nn.Linear(8, 24)
        self.unembed = nn.Linear(8, 30)
        for parameter in self.parameters():
            nn.init.normal_(parameter, 0, 0.3)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: Any = None
    ) -> tuple[torch.Tensor, WindowCache]:
        cache = WindowCache(WINDOW)
        if past is not None:
            cache.seen, cache.keys, cache.values = past.seen, past.keys, past.values
            cache.limit = past.limit
        new = input_ids.shape[1]
        length, offset = cache.lengths(new)
        rows = torch.arange(new).unsqueeze(1) + cache.seen
        columns = torch.arange(length).unsqueeze(0) + offset
        seen = (columns <= rows) & (rows - columns < WINDOW)
        mask = seen & attention_mask[:, columns[0]].bool().unsqueeze(1)
        queries, keys, values = self.project(self.embed(input_ids)).chunk(3, -1)
        keys, values = cache.update(keys, values)
        heads = (part.unsqueeze(1) for part in (queries, keys, values))
        mixed = F.scaled_dot_product_attention(*heads, mask.unsqueeze(1)).squeeze(1)
        return self.unembed(mixed), cache


def example() -> dict[str, torch.Tensor]:
    ids = torch.ones(2, 4, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(scope="module")
def rewritten() -> cachefree.Rewritten:
    return cachefree.rewrite(CountedWindowLM(), example())


@torch.no_grad()
@pytest.mark.parametrize(
    "chunks", [(1, 1, 1, 1, 1, 1, 1, 1), (5, 1, 3, 1), (4, 4), (3, 2, 2), (12, 1, 6)]
)
def test_one_graph_within_and_beyond_the_window(
    rewritten: cachefree.Rewritten, chunks: tuple[int, ...]
) -> None:
    model = CountedWindowLM()
    ids = torch.randint(0, 30, (2, sum(chunks)), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    own, one, done = None, None, 0
    for new in chunks:
        given = (ids[:, done : done + new], mask[:, : done + new])
        expected, own = model(*given, own)
        logits, one = rewritten(*given, past=one)
        visible = given[1][:, -new:].bool()
        torch.testing.assert_close(logits[visible], expected[visible])
        done += new
        assert one.seen == own.seen == done
        torch.testing.assert_close(one.keys, own.keys)


def test_the_length_is_one_size_of_two_cases(rewritten: cachefree.Rewritten) -> None:
    assert rewritten.report.verdict.name.startswith("PROVED")
    assert any("size in two cases" in str(branch) for branch in rewritten.report.branches)


def test_a_constant_of_the_code_is_no_part_of_the_cache(rewritten: cachefree.Rewritten) -> None:
    names = [spec.name for spec in rewritten.interface.inputs]
    assert names == ["input_ids", "attention_mask", "past_keys", "past_values"]
    _, cache = rewritten(**example())
    assert cache.limit == WINDOW


def test_a_cache_of_another_window_is_refused(rewritten: cachefree.Rewritten) -> None:
    given = example()
    _, cache = rewritten(**given)
    cache.limit = torch.tensor(WINDOW + 1)
    wider = torch.ones(2, 8, dtype=torch.long)
    with pytest.raises(cachefree.DomainError, match="limit"):
        rewritten(given["input_ids"], wider, past=cache)


def test_a_count_that_is_wrong_is_refused(rewritten: cachefree.Rewritten) -> None:
    given = example()
    _, cache = rewritten(**given)
    cache.seen = 7
    wider = torch.ones(2, 8, dtype=torch.long)
    with pytest.raises(cachefree.DomainError, match="seen is 7 where 4 follows"):
        rewritten(given["input_ids"], wider, past=cache)
