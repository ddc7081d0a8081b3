"""Stand-ins compute what the operators compute that they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import cachefree
from cachefree.stand_ins import StandIns

from .models.case import seeded
from .models.own_ways import Pointers
from .small import IDS, Small, rewritten_small, small


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(0, 30), st.integers(0, 10**6))
def test_each_row_is_multiplied_by_the_weight_of_its_group(
    groups: int, rows: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, groups, (rows,), generator=generator).sort().values
    ends = torch.stack([(ids <= group).sum() for group in range(groups)]).to(torch.int32)
    x = torch.randn(rows, 4, generator=generator)
    weights = torch.randn(groups, 4, 8, generator=generator)
    with StandIns() as used:
        found = F.grouped_mm(x, weights, offs=ends)
    expected = torch.stack([*(x[row] @ weights[ids[row]] for row in range(rows)), torch.zeros(8)])
    torch.testing.assert_close(found, expected[:-1])
    assert list(used.used) == ["_grouped_mm"]


@pytest.mark.parametrize("bins", [2, 3, 7, 8, 60, 128])
def test_counts_are_those_of_histc(bins: int) -> None:
    ids = torch.randint(-1, bins + 1, (300,), generator=torch.Generator().manual_seed(bins))
    expected = torch.histc(ids.float(), bins=bins, min=0, max=bins - 1)
    with StandIns():
        found = torch.histc(ids.float(), bins=bins, min=0, max=bins - 1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32, torch.bool, torch.complex64])
@pytest.mark.parametrize("options", [{}, {"dtype": torch.float64}])
def test_a_tensor_is_filled_with_another_one(dtype: torch.dtype, options: dict) -> None:
    number = torch.tensor(1).to(dtype)
    if dtype.is_complex and options:
        options = {"dtype": torch.complex128}
    like = torch.zeros(3, dtype=torch.float16)
    for make in (
        lambda: torch.full((2, 3), number, **options),
        lambda: like.new_full((0, 3), number.real, **options),
        lambda: torch.full_like(like, number.real, **options),
    ):
        expected = make()
        with StandIns() as used:
            found = make()
        assert torch.equal(found, expected)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert not used.used


@pytest.mark.parametrize("scales", [{"alpha": 0.5}, {"beta": 3.0}, {"alpha": 2.0, "beta": 0.0}])
def test_products_that_are_scaled_by_tensors(scales: dict[str, float]) -> None:
    one, other = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    given = {name: torch.tensor(number) for name, number in scales.items()}
    for add in (torch.randn(2, 3, 5), torch.randn(5), torch.full((3, 1), 2.0)):
        expected = torch.baddbmm(add, one, other, **given)
        with StandIns() as used:
            found = torch.baddbmm(add, batch2=other, batch1=one, **given)
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(
                torch.addmm(add[0] if add.dim() == 3 else add, one[0], other[0], **given),
                torch.addmm(add[0] if add.dim() == 3 else add, one[0], other[0], **scales),
            )
        assert list(used.used) == ["baddbmm", "addmm"]


class MasksWithATensor(Small):
    """The lowest number comes as a tensor, as in transformers up to 4.31."""

    def attend(self, q, k):
        n, m = q.shape[1], k.shape[1]
        low = torch.tensor(torch.finfo(q.dtype).min, device=q.device)
        mask, place = torch.full((n, n), low, device=q.device), torch.arange(n)
        mask.masked_fill_(place < (place + 1).view(n, 1), 0)
        mask = mask.to(q.dtype)
        if m > n:
            mask = torch.cat([torch.zeros(n, m - n, dtype=q.dtype), mask], dim=-1)
        return (q @ k.mT + mask).softmax(-1)


class FillsWithATensorOfItsOwn(MasksWithATensor):
    def attend(self, q, k):
        return super().attend(q, k) * torch.full((k.shape[1],), q.detach().mean())


@pytest.mark.parametrize("build", [MasksWithATensor, FillsWithATensorOfItsOwn])
def test_masks_that_are_filled_with_a_tensor(build: type) -> None:
    model = small(build)
    rewritten = rewritten_small(model)
    assert rewritten.report.verdict.is_proof
    past = seen = None
    for ids in (IDS[:, :1], IDS[:, 1:4], IDS[:, 4:]):
        (expected, past), (logits, seen) = model(ids, past), rewritten(ids, seen)
        torch.testing.assert_close(logits, expected)


def test_what_it_does_not_know_is_left_alone() -> None:
    values = torch.tensor([0.5, 1.5, 4.0])
    with StandIns():
        assert torch.equal(torch.histc(values, bins=4), torch.tensor([1.0, 1.0, 0.0, 1.0]))


def test_one_hot_of_as_many_classes_as_an_input_has_rows() -> None:
    model = seeded(Pointers)()
    rewritten = cachefree.rewrite(model, (torch.zeros(2, 16), torch.zeros(2, 5, 16)))
    assert any("one_hot" in note for note in rewritten.report.notes)
    generator = torch.Generator().manual_seed(4)
    for batch, count in ((1, 4), (3, 9)):
        items = torch.randn(batch, count, 16, generator=generator)
        state = own = None
        for _ in range(3):
            x = torch.randn(batch, 16, generator=generator)
            weights, state = rewritten(x, items, state)
            due, own = model(x, items, own)
            torch.testing.assert_close(weights, due)
            assert torch.equal(state[2], own[2])
        assert own[2].sum() == 3 * batch


class AddsInfinity(Small):
    """``addmm`` looks at what is added only where its scale is not zero, however it is given."""

    def forward(self, ids, past=None):
        logits, present = super().forward(ids, past)
        infinite = torch.full((logits.shape[-1],), torch.inf)
        flat = logits.flatten(0, 1)
        scaled = torch.addmm(infinite, flat, flat.new_ones(12, 12), beta=torch.tensor(0.0))
        return logits + scaled.view(logits.shape), present


def test_a_scale_of_zero_hides_infinities() -> None:
    model = small(AddsInfinity)
    ours, theirs = rewritten_small(model)(IDS), model(IDS)
    assert theirs[0].isfinite().all()
    torch.testing.assert_close(ours[0], theirs[0])


class CountsClasses(Small):
    """A class for each token that there is: some ids are beyond it."""

    def forward(self, ids, past=None):
        logits, present = super().forward(ids, past)
        classes = torch.nn.functional.one_hot(ids % 4, present[0].shape[1])
        return logits + classes.sum(-1, keepdim=True), present


def test_a_class_beyond_their_number_is_an_error_of_the_graph_too() -> None:
    rewritten = rewritten_small(small(CountsClasses))
    with pytest.raises(RuntimeError, match="out of bounds"):
        rewritten(torch.tensor([[3]]))
