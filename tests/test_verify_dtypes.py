"""Random generations in other dtypes: the model is cast, and rewritten again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import cachefree
from cachefree.errors import CacheFreeError, EquivalenceError
from cachefree.verification import Plan, replay, verify

from .small import IDS, Small, rewritten_small, small

EAGER = ("eager",)
OTHERS = (torch.float64, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small()


@pytest.fixture(scope="module")
def rewritten(model: nn.Module) -> cachefree.Rewritten:
    return rewritten_small(model)


def test_what_is_right_passes_in_every_dtype(
    model: nn.Module, rewritten: cachefree.Rewritten
) -> None:
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = rewritten.report
    found = verify(model, rewritten, max_examples=25, seed=0)
    assert set(found.dtypes) == set(OTHERS)
    assert all(other.generations for other in found.dtypes.values())
    assert found.generations > sum(other.generations for other in found.dtypes.values())
    assert set(found.dtypes[torch.float16].differences) == {"eager", "onnxruntime"}
    assert found.dtypes[torch.float64].differences["onnxruntime"] < 1e-6
    assert set(found.dtypes[torch.bfloat16].differences) == {"eager"}
    assert "which ONNX Runtime cannot do" in found.left_out["bfloat16 on onnxruntime"]
    assert "\n  float16      " in str(found)
    assert "\n  not compared bfloat16 on onnxruntime: the file computes in" in str(found)
    # nothing happens to the model itself
    assert rewritten.report is report
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}


class WrongInHalf(nn.Module):
    """A rewritten module that is off by one row where its weights are float16."""

    def __init__(self, right: cachefree.Rewritten) -> None:
        super().__init__()
        names = ("calling", "interface", "graph_module", "keeper", "encoder_call", "_origin")
        self.__dict__.update({name: getattr(right, name) for name in names}, right=right)
        if right.__dict__["_origin"] is not None:
            self.__dict__["_origin"] = copy.copy(right.__dict__["_origin"])
            again = self._origin._again
            self._origin._again = lambda model: WrongInHalf(again(model))

    def forward(self, ids: torch.Tensor, past: Any = None) -> Any:
        logits, present = self.right(ids, past)
        if logits.dtype is torch.float16 and past is not None:
            logits = logits.roll(1, 1)
        return logits, present


def test_what_is_wrong_in_one_dtype_is_found_and_replayed(
    model: nn.Module, rewritten: cachefree.Rewritten
) -> None:
    wrong = WrongInHalf(rewritten)
    verify(model, wrong, backends=EAGER, dtypes=(), max_examples=10, seed=0)
    with pytest.raises(EquivalenceError) as caught:
        verify(model, wrong, backends=EAGER, max_examples=40, seed=0)
    text = str(caught.value)
    assert "eager is not the model: the output [0], call 2 of 2." in text
    assert "seed: 0; in torch.float16" in text
    _, snippet = text.split("  do:    Replay it with:\n\n")
    with pytest.raises(EquivalenceError, match=r"call 2 of 2"):
        exec(snippet, {"model": model, "rewritten": wrong})  # as it is pasted
    plan = Plan((1, 2), {"batch": 1}, dtype=torch.float64)
    assert replay(model, rewritten, plan, backends=EAGER).dtypes[torch.float64].calls == 3


def test_a_dtype_that_the_model_does_not_run_in_is_told() -> None:
    class NamesItsDtype(Small):
        def forward(self, ids: torch.Tensor, past: Any = None) -> Any:
            logits, present = super().forward(ids, past)
            return logits @ torch.eye(12, dtype=torch.float32), present

    model = small(NamesItsDtype)
    rewritten = rewritten_small(model)
    found = verify(model, rewritten, backends=EAGER, max_examples=20, seed=0)
    assert not found.dtypes
    assert set(found.left_out) == {"float64", "float16", "bfloat16"}
    assert "the model itself does not run: RuntimeError: " in found.left_out["float64"]
    with pytest.raises(CacheFreeError, match=r"does not run on this generation"):
        replay(model, rewritten, Plan((1,), {"batch": 1}, dtype=torch.float16), backends=EAGER)


def test_weights_of_several_dtypes_and_copies_stay_as_they_are(
    model: nn.Module, rewritten: cachefree.Rewritten
) -> None:
    other = copy.deepcopy(rewritten)
    assert not verify(model, other, backends=EAGER, max_examples=2, seed=0).dtypes
    found = verify(model, other, backends=EAGER, dtypes=(torch.float16,), max_examples=2, seed=0)
    assert "copied without the model" in found.left_out["float16"]
    mixed = small()
    mixed.emb.weight.data = mixed.emb.weight.data.double()
    mixed.pos.weight.data = mixed.pos.weight.data.double()
    mixed.emb.register_forward_hook(lambda module, args, output: output.float())
    mixed.pos.register_forward_hook(lambda module, args, output: output.float())
    assert mixed(IDS)[0].dtype is torch.float32
    assert not verify(mixed, rewritten_small(mixed), backends=EAGER, max_examples=2, seed=0).dtypes
