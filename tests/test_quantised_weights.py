"""Weights that a package quantises in place: the one graph computes with what the model has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import cachefree

from .assertions import equal_calls
from .models.gpt import CASES, NanoGPT

pytest.importorskip("torchao", reason="torchao quantises the weights of these tests")

CASE = next(case for case in CASES if isinstance(case.build(), NanoGPT))


def _quantise(model: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    weights = {type(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    assert nn.Parameter not in weights  # each is a tensor that holds integers and scales


def test_weights_quantised_after_the_rewrite_are_seen() -> None:
    model = CASE.build()
    rewritten = cachefree.rewrite(model)
    ids = torch.arange(10).view(2, 5)
    before = rewritten(ids)[0]
    _quantise(model)
    assert equal_calls(CASE, model, rewritten)
    assert not torch.equal(rewritten(ids)[0], before)


def test_a_model_with_quantised_weights_is_rewritten(tmp_path: Path) -> None:
    model = CASE.build()
    _quantise(model)
    rewritten = cachefree.rewrite(model)
    assert rewritten.report.verdict.name.startswith("PROVED")
    assert equal_calls(CASE, model, rewritten)
    path = cachefree.to_onnx(rewritten, tmp_path / "model.onnx")
    assert equal_calls(CASE, model, cachefree.load_onnx(path, like=rewritten))
