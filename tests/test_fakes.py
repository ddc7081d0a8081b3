"""Weights as fake tensors: kept from run to run, unless a run may have changed them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cachefree.calls import Call
from cachefree.fake_runs import run_on_fakes
from cachefree.fakes import weights_as_fakes
from cachefree.inputs import call_of
from cachefree.looked_up import forget


class Product(nn.Module):
    """``x (B, 3)`` times a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 5), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class Transposes(Product):
    """The weight is transposed in place before it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5, 3), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.t_()


@pytest.fixture(autouse=True)
def _nothing_is_known() -> None:
    forget()


def _call(model: nn.Module) -> Call:
    return call_of(model, (torch.zeros(2, 3),), {}, {})


def _size(model: nn.Module) -> tuple[int, ...]:
    (result,), _ = run_on_fakes(model, _call(model), {})
    return tuple(result.shape)


def _twin(model: nn.Module) -> torch.Tensor:
    with weights_as_fakes(model) as weights:
        return weights.twin(model.weight)  # type: ignore[arg-type]


def test_a_weight_has_one_twin_in_all_runs() -> None:
    model = Product()
    assert _size(model) == (2, 5)
    assert _twin(model) is _twin(model)


@pytest.mark.parametrize("change", ["other", "half", "wider"])
def test_a_weight_that_is_another_one_by_now_has_another_twin(change: str) -> None:
    model = Product()
    before = _twin(model)
    if change == "other":
        model.weight = nn.Parameter(torch.ones(3, 5), requires_grad=False)
    else:
        model.weight.data = torch.ones(3, 5).half() if change == "half" else torch.ones(3, 7)
    after = _twin(model)
    assert after is not before
    assert (after.shape, after.dtype) == (model.weight.shape, model.weight.dtype)


def test_what_a_run_writes_to_a_weight_is_not_there_in_the_next_one() -> None:
    model = Transposes()
    assert [_size(model) for _ in range(3)] == [(2, 5)] * 3
    assert model.weight.shape == (5, 3)


def test_a_run_within_a_run_has_modes_of_its_own() -> None:
    model = Product()
    with weights_as_fakes(model) as one, weights_as_fakes(model) as other:
        assert one is not other
        assert one.mode is not other.mode


def test_a_run_that_fails_leaves_nothing() -> None:
    model = Product()
    before = _twin(model)
    with pytest.raises(RuntimeError):
        run_on_fakes(model, call_of(model, (torch.zeros(2, 4),), {}, {}), {})
    assert _twin(model) is not before
