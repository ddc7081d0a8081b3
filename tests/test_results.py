"""What a result is besides the values of its tensors: containers, numbers, flags, and writes."""

from __future__ import annotations

import math

import pytest
import torch

import cachefree

from .models.case import seeded
from .models.first_call import IDS as TRANSLATED
from .models.first_call import Translator
from .small import IDS, Small, rewritten_small, small


class WordForOneRow(Small):
    def forward(self, ids, past=None):
        return *super().forward(ids, past), "one" if ids.shape[0] == 1 else "many"


class ListForOneRow(Small):
    def forward(self, ids, past=None):
        result = super().forward(ids, past)
        return list(result) if ids.shape[0] == 1 else result


class EmptiesIdsOfOneRow(Small):
    def forward(self, ids, past=None):
        result = super().forward(ids, past)
        if ids.shape[0] == 1:
            ids.zero_()
        return result


class CountsOtherwiseAtFirst(Small):
    def forward(self, ids, past=None):
        logits, cache = super().forward(ids, past)
        return logits, cache, ids.shape[1] if past is None else cache[0].shape[1] + 1


class ListAtFirst(Small):
    def forward(self, ids, past=None):
        result = super().forward(ids, past)
        return list(result) if past is None else result


class CacheAsListAtFirst(Small):
    def forward(self, ids, past=None):
        logits, cache = super().forward(ids, past)
        return logits, list(cache) if past is None else cache


class CountsTokens(Small):
    def forward(self, ids, past=None):
        logits, cache = super().forward(ids, past)
        total = cache[0].shape[1]
        return logits, cache, total, total == 1, total / 4


@pytest.mark.parametrize("build", [WordForOneRow, ListForOneRow, EmptiesIdsOfOneRow])
def test_a_size_at_which_more_than_tensors_differs_is_outside_the_domain(build) -> None:
    model = small(build)
    rewritten = rewritten_small(model)
    due, cache = model(IDS, None)[:2]
    torch.testing.assert_close(rewritten(IDS)[0], due)
    with pytest.raises(cachefree.DomainError, match="outside the domain"):
        rewritten(IDS[:1])
    with pytest.raises(cachefree.DomainError, match="outside the domain"):
        rewritten(IDS[:1], tuple(part[:1] for part in cache))


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (CountsOtherwiseAtFirst, r"the result\[2\] is query where query \+ 1 is expected"),
        (ListAtFirst, "the result is a list of 2 where a tuple of 2 is expected"),
    ],
)
def test_another_result_of_first_calls_is_refused(build, says) -> None:
    with pytest.raises(cachefree.UnsupportedBranchError, match=says):
        rewritten_small(small(build))


def test_a_cache_is_handed_on_as_a_list_or_a_tuple() -> None:
    model = small(CacheAsListAtFirst)
    rewritten = rewritten_small(model)
    cache = rewritten(IDS)[1]
    torch.testing.assert_close(rewritten(IDS, cache)[0], model(IDS, model(IDS)[1])[0])


def test_numbers_that_follow_from_sizes_are_returned() -> None:
    model = small(CountsTokens)
    rewritten = rewritten_small(model)
    for length in (1, 2, 5):
        own, mine = model(IDS[:, :length]), rewritten(IDS[:, :length])
        assert mine[2:] == own[2:]
        assert rewritten(IDS, mine[1])[2:] == model(IDS, own[1])[2:]


class ClassOfASize(Small):
    def forward(self, ids, past=None):
        return *super().forward(ids, past), ids.shape[1].__class__


class QuotientOfATenth(Small):
    def forward(self, ids, past=None):
        return *super().forward(ids, past), ids.shape[1] // 0.1


@pytest.mark.parametrize("build", [ClassOfASize, QuotientOfATenth])
def test_what_only_a_symbol_returns_is_refused(build) -> None:
    with pytest.raises(cachefree.CaptureError, match="returns something else when its sizes"):
        rewritten_small(small(build))


class RootOfTokens(Small):
    def forward(self, ids, past=None):
        return *super().forward(ids, past), math.sqrt(ids.shape[1]), ids.shape[1] // 2.5


def test_numbers_that_are_no_integers_are_pythons_own() -> None:
    model = small(RootOfTokens)
    rewritten = rewritten_small(model)
    for length in (1, 4, 5):
        given = rewritten(IDS[:, :length])[2:]
        assert given == model(IDS[:, :length])[2:]
        assert [type(number) for number in given] == [float, float]


class AsksForTenths(Small):
    """At 9 tokens Python's sum is above 8.7, and that of 0.1 and 0.2 taken together is not."""

    def forward(self, ids, past=None):
        logits, cache = super().forward(ids, past)
        return logits * 2 if cache[0].shape[1] - 0.1 - 0.2 > 8.7 else logits, cache


def test_a_size_at_which_rounding_decides_is_outside_the_domain() -> None:
    model = small(AsksForTenths)
    rewritten = rewritten_small(model)
    ids = torch.arange(20)[None] % 12
    torch.testing.assert_close(rewritten(ids[:, :8])[0], model(ids[:, :8])[0])
    with pytest.raises(cachefree.DomainError, match="outside the domain"):
        rewritten(ids[:, :9])


class CountsSource(Translator):
    def forward(self, ids, source=None, past=None):
        return *super().forward(ids, source, past), 0 if source is None else source.shape[1]


class TellsOfSource(Translator):
    def forward(self, ids, source=None, past=None):
        return *super().forward(ids, source, past), "given" if source is not None else "left out"


class NotesThatItIsLeftOut(Translator):
    def forward(self, ids, source=None, past=None):
        if source is None:
            self.was_left_out = True
        return super().forward(ids, source, past)


@pytest.mark.parametrize("build", [CountsSource, TellsOfSource, NotesThatItIsLeftOut])
def test_what_changes_a_result_is_not_left_out(build) -> None:
    model = seeded(build)()
    source = torch.zeros(2, 5, dtype=torch.long)
    rewritten = cachefree.rewrite(model, (TRANSLATED, source))
    cache = rewritten(TRANSLATED, source)[1]
    with pytest.raises(cachefree.DomainError, match="The argument 'source' is missing"):
        rewritten(TRANSLATED, past=cache)
