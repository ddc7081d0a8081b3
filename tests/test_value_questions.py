"""Code that asks whether a mask hides anything: both answers are one graph, or it is refused."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch

import cachefree
from cachefree.value_questions import ANSWERS

from .assertions import same, says_what_to_do
from .models.by_values import (
    VOCABULARY,
    AnyHidden,
    ContainsZero,
    CopyWrittenAsData,
    DoublesLaterWhereFull,
    DoublesWhereFull,
    HidesAllButOnes,
    HidesItsZeros,
    HidesUntrue,
    HidesZeros,
    KeepsATable,
    MakesAndWrites,
    MakesItsMask,
    MaskedUnlessFull,
    NotHidden,
    OneIsSeen,
    SeesAllWhereFull,
    Truths,
    TwoNumbers,
    WrittenAsData,
    WrittenBefore,
)
from .models.case import seeded

IDS = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(4))


def _example(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {"ids": IDS[:, :5], "attention_mask": torch.ones(2, 5, dtype=dtype)}


def _chunks(model: object, whole: torch.Tensor, sizes: tuple[int, ...]) -> list[object]:
    results, done, past = [], 0, None
    for size in sizes:
        ids = IDS[:, done : done + size]
        done += size
        result = model(ids, whole[:, :done], past)  # type: ignore[operator]
        results.append(result)
        past = result[1]
    return results


@pytest.mark.parametrize("kind", [MaskedUnlessFull, AnyHidden, Truths, NotHidden, ContainsZero])
def test_a_mask_that_is_left_out_where_it_hides_nothing(kind: type[MaskedUnlessFull]) -> None:
    model = seeded(kind)().eval()
    dtype = torch.bool if kind in (Truths, NotHidden, ContainsZero) else torch.int64
    one = cachefree.rewrite(model, _example(dtype))
    assert one.report.verdict is cachefree.Verdict.PROVED_REAL
    assert [str(region) for region in one.report.domain.regions] == [
        "first call: every size",
        "later calls: every size",
    ]
    assert any("attention_mask is 1 throughout" in note for note in one.report.notes)
    full = torch.ones(2, 12, dtype=dtype)
    padded = full.clone()
    padded[1, :2] = 0
    holed = full.clone()
    holed[:, 3] = 0
    chunkings = ((5, 1, 3, 1), (1, 1, 4), (2, 7))
    for whole, sizes in itertools.product((full, padded, holed), chunkings):
        same(_chunks(one, whole, sizes), _chunks(model, whole, sizes))


@pytest.mark.parametrize(
    "kind",
    [
        HidesZeros,
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in (HidesItsZeros, HidesUntrue)),
    ],
)
def test_integers_none_of_which_is_zero(kind: type[MaskedUnlessFull]) -> None:
    model = seeded(kind)().eval()
    one = cachefree.rewrite(model, _example(torch.int64))
    assert any("attention_mask is nonzero throughout" in note for note in one.report.notes)
    twos = torch.full((2, 12), 2, dtype=torch.int64)
    padded = twos.clone()
    padded[1, :2] = 0
    for whole, sizes in itertools.product((twos, padded), ((5, 1, 3, 1), (1, 1, 4))):
        same(_chunks(one, whole, sizes), _chunks(model, whole, sizes))


def test_questions_of_another_model_are_forgotten() -> None:
    cachefree.rewrite(seeded(HidesZeros)().eval(), _example(torch.int64))
    assert not ANSWERS.asked


def test_what_is_kept_beside_a_question_about_values_bounds_the_domain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def in_vain(*_: object) -> None:
        raise AssertionError("a second proof that cannot be had is not begun")

    monkeypatch.setattr(importlib.import_module("cachefree.paths"), "confirm_remembered", in_vain)
    model = seeded(KeepsATable)().eval()
    one = cachefree.rewrite(model, _example(torch.int64))
    assert one.report.verdict is cachefree.Verdict.PROVED_REAL
    assert [str(region) for region in one.report.domain.regions] == [
        "first call: query <= 16",
        "later calls: past + query <= 16",
    ]
    full = torch.ones(2, 12, dtype=torch.int64)
    same(_chunks(one, full, (5, 1, 3, 1)), _chunks(model, full, (5, 1, 3, 1)))
    with pytest.raises(cachefree.DomainError):
        one(torch.zeros(1, 17, dtype=torch.int64), torch.ones(1, 17, dtype=torch.int64))


def test_a_mask_that_the_code_makes_is_known() -> None:
    model = seeded(MakesItsMask)().eval()
    one = cachefree.rewrite(model, {"ids": IDS[:, :5]})
    assert one.report.verdict is cachefree.Verdict.PROVED_REAL
    assert not any("throughout" in note for note in one.report.notes)
    full = torch.ones(2, 12, dtype=torch.int64)
    expected = _chunks(model, full, (5, 1, 3))
    past = None
    for at, (start, stop) in enumerate(((0, 5), (5, 6), (6, 9))):
        result = one(IDS[:, start:stop], past=past)
        same(result, expected[at])
        past = result[1]


@pytest.mark.parametrize("kind", [DoublesWhereFull, DoublesLaterWhereFull, HidesAllButOnes])
def test_another_path_where_the_mask_hides_nothing(kind: type[MaskedUnlessFull]) -> None:
    with pytest.raises(cachefree.UnsupportedBranchError) as caught:
        cachefree.rewrite(seeded(kind)().eval(), _example(torch.int64))
    says_what_to_do(caught.value)


def test_a_full_mask_that_is_left_out_too_often_bounds_the_domain() -> None:
    model = seeded(SeesAllWhereFull)().eval()
    one = cachefree.rewrite(model, _example(torch.int64))
    full = torch.ones(2, 12, dtype=torch.int64)
    same(_chunks(one, full, (5, 1, 1)), _chunks(model, full, (5, 1, 1)))
    with pytest.raises(cachefree.DomainError):
        _chunks(one, full, (5, 3))


def test_a_mask_that_was_made_and_written_to_is_not_known() -> None:
    with pytest.raises(cachefree.CacheFreeError, match="depends on the values of a tensor"):
        cachefree.rewrite(seeded(MakesAndWrites)().eval(), {"ids": IDS[:, :5]})


@pytest.mark.parametrize(
    "kind", [OneIsSeen, WrittenBefore, WrittenAsData, CopyWrittenAsData, TwoNumbers]
)
def test_questions_that_do_not_tell_every_element(kind: type[MaskedUnlessFull]) -> None:
    with pytest.raises(cachefree.CacheFreeError) as caught:
        cachefree.rewrite(seeded(kind)().eval(), _example(torch.int64))
    assert "depends on the values of a tensor" in str(caught.value)
    says_what_to_do(caught.value)


def test_there_is_no_certificate() -> None:
    one = cachefree.rewrite(seeded(MaskedUnlessFull)().eval(), _example(torch.int64))
    with pytest.raises(cachefree.CacheFreeError, match="asks for the values of an input"):
        _ = one.certificate
