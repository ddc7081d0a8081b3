"""What is filled where it is not zero is zero elsewhere."""

from __future__ import annotations

import pytest
import torch

from .test_elementwise import Mask, compared

LOWEST = torch.finfo(torch.float32).min
SPECIAL = torch.tensor([[0.0, -0.0, 1.0, float("nan"), float("inf"), 1e-40, 1.0 - 2**-24, -2.0]])


def inverted(mask: torch.Tensor) -> torch.Tensor:
    """A padding mask as one that is added, as decoders write it."""
    left = 1.0 - mask.to(torch.float32)
    return left.masked_fill(left.to(torch.bool), LOWEST)


def filled(mask: torch.Tensor, what: torch.Tensor) -> torch.Tensor:
    """A causal mask of one row, which is zeros, filled where the padding mask is not zero."""
    return what.masked_fill(inverted(mask).bool(), LOWEST)


def zeros(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(x.shape)


@pytest.mark.parametrize("dtype", ["int64", "float32", "bool"])
def test_a_mask_that_is_filled_twice_is_the_mask(dtype: str) -> None:
    found = compared(inverted, lambda x: filled(x, zeros(x)), (f"n m:{dtype}",))
    assert found.is_equal
    assert found.is_exact, "1 − x is not −0.0"
    assert not found.checked
    for mask in (SPECIAL.to(getattr(torch, dtype)), torch.tensor([[0, 1, 2, -1]])):
        assert torch.equal(inverted(mask), filled(mask, zeros(mask)))


def kept(x: torch.Tensor) -> torch.Tensor:
    return x.masked_fill(x.bool(), 2.0)


def test_the_sign_of_the_zero_counts() -> None:
    def empty(x):
        return zeros(x).masked_fill(x.bool(), 2.0)

    assert not compared(kept, empty, ("n m",)).is_equal, "x may be −0.0"
    hidden = [lambda x, made=made: torch.softmax(made(x) + x.sum(), -1) for made in (kept, empty)]
    found = compared(*hidden, ("n m",))
    assert found.is_equal
    assert not found.is_exact


def test_nan_is_no_zero() -> None:
    assert torch.equal(kept(SPECIAL), zeros(SPECIAL).masked_fill(SPECIAL.bool(), 2.0))


UNLIKE: tuple[tuple[Mask, Mask], ...] = (
    (inverted, lambda x: filled(x, zeros(x) + 1.0)),
    (inverted, lambda x: filled(x, zeros(x)).masked_fill(~x.bool(), 0.0)),
    (inverted, lambda x: zeros(x).masked_fill((2.0 - x).bool(), LOWEST)),
    (inverted, lambda x: zeros(x).masked_fill((1.0 + x).bool(), LOWEST)),
    (inverted, lambda x: zeros(x).masked_fill((1.0 - x.half()).bool(), LOWEST)),
    (inverted, lambda x: zeros(x).masked_fill((1.0 - x).bool().flip(0), LOWEST)),
    (inverted, lambda x: zeros(x).masked_fill((1.0 - x)[:1].bool(), LOWEST)),
    (inverted, lambda x: (1.0 - x).masked_fill(~(1.0 - x).bool(), LOWEST)),
    (inverted, lambda x: 1.0 - x),
)


@pytest.mark.parametrize(("one", "other"), UNLIKE)
def test_what_is_not_the_same_is_not_shown(one: Mask, other: Mask) -> None:
    assert not compared(
        lambda x: one(x).softmax(-1), lambda x: other(x).softmax(-1), ("n m",)
    ).is_equal
    given = torch.tensor([[0.0, 1.0, 2.0, 1.0 - 2**-24, -1.0], [1.0, 1.0, 0.0, 0.0, 3.0]])
    assert not torch.equal(one(given), other(given))


def test_the_same_form_of_another_tensor_is_another_truth() -> None:
    def of(x, y):
        return zeros(x).masked_fill((1.0 - y).bool(), 2.0)

    def own(x, y):
        return (1.0 - x).masked_fill((1.0 - y).bool(), 2.0)

    assert not compared(of, own, ("n m", "n m")).is_equal
