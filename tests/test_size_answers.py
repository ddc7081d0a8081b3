"""Code that asks for values of what it makes of sizes alone: a question about sizes."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cachefree
from cachefree.known_values import KnownValues

from .assertions import same, says_what_to_do
from .models.by_sizes import (
    VOCABULARY,
    AnotherBeyond,
    AsksForTheLastPosition,
    AsksOfItsMask,
    Contains,
    EveryFifth,
    JoinsItsMask,
    OfAWindow,
    OfSameLength,
    WithAnInput,
    WithATable,
    WrittenAsData,
)
from .models.case import seeded

IDS = torch.randint(0, VOCABULARY, (3, 30), generator=torch.Generator().manual_seed(4))


def _rewritten(kind: type[AsksOfItsMask]) -> tuple[torch.nn.Module, cachefree.Rewritten]:
    model = seeded(kind)()
    return model, cachefree.rewrite(model, (IDS[:2, :5],))


def _equal(model: torch.nn.Module, one: cachefree.Rewritten, chunks: tuple[int, ...]) -> None:
    for batch in (1, 3):
        done, past = 0, None
        for size in chunks:
            ids = IDS[:batch, done : done + size]
            done += size
            expected = model(ids, past)
            same(one(ids, past), expected, f"batch {batch}, {done} tokens")
            past = expected[1]


@pytest.mark.parametrize(
    "kind",
    [
        AsksOfItsMask,
        pytest.param(OfAWindow, marks=pytest.mark.slow),
        pytest.param(JoinsItsMask, marks=pytest.mark.slow),
        pytest.param(Contains, marks=pytest.mark.slow),
        OfSameLength,
    ],
)
def test_a_mask_that_is_left_out_where_it_hides_nothing(kind: type[AsksOfItsMask]) -> None:
    model, one = _rewritten(kind)
    assert one.report.verdict.is_proof
    regions = [str(region) for region in one.report.domain.regions]
    assert regions == ["first call: every size", "later calls: every size"]
    for chunks in ((5, 1, 3, 1), (1, 1, 4), (2, 7), (1, 1, 1, 1, 1, 1)):
        _equal(model, one, chunks)


def test_the_largest_position_as_a_number() -> None:
    model, one = _rewritten(AsksForTheLastPosition)
    regions = [str(region) for region in one.report.domain.regions]
    assert regions == ["first call: query <= 40", "later calls: past + query <= 40"]
    _equal(model, one, (5, 1, 3, 1))


def test_another_path_from_a_length_on_bounds_the_domain() -> None:
    model, one = _rewritten(AnotherBeyond)
    regions = [str(region) for region in one.report.domain.regions]
    assert regions == ["first call: query >= 10", "later calls: past + query >= 10"]
    _equal(model, one, (10, 1, 3))
    with pytest.raises(cachefree.DomainError):
        one(IDS[:, :9])


@pytest.mark.parametrize("kind", [WithAnInput, WithATable, WrittenAsData, EveryFifth])
def test_what_is_no_question_of_sizes_is_refused(kind: type[AsksOfItsMask]) -> None:
    with pytest.raises(cachefree.CacheFreeError) as caught:
        cachefree.rewrite(seeded(kind)(), (IDS[:2, :5],))
    assert "depends on the values of a tensor" in str(caught.value)
    says_what_to_do(caught.value)


def test_values_beside_fake_tensors() -> None:
    with FakeTensorMode() as mode, KnownValues() as known:
        given = mode.from_tensor(torch.ones(3))
        made = torch.zeros(4, 4)
        row = made[1]
        row[2:] = 3
        assert known.number(made.max()) == 3
        assert known.number(made[0].sum()) == 0
        assert known.of(given) is None
        assert known.of(torch.rand(2)) is None
        assert known.number(given.new_full((2,), 7).sum()) == 14
        assert known.of(given.new_full((2,), 7) * given[:2]) is None
        assert known.of(torch.empty(2)) is None
        row[:3] = given
        assert known.of(made) is None, "what is written to a part is in the whole"
