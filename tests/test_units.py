"""Inputs of which several rows are one row of the cache: patches, strides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import cachefree

from .models.case import seeded
from .models.patches import CASES, Patches


def test_what_fills_no_patch_is_outside_the_domain() -> None:
    rewritten = cachefree.rewrite(seeded(Patches)(), (torch.zeros(2, 20),))
    assert "series has a multiple of 4 rows" in rewritten.report.notes
    assert rewritten(torch.zeros(3, 8))[1][0].shape == (3, 2, 16)
    with pytest.raises(cachefree.DomainError, match=r"size 11 on axis 1 where 4\*query = 8 is"):
        rewritten(torch.zeros(3, 11))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_onnx_runtime_takes_units(case: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = case.build()
    rewritten = cachefree.rewrite(model, case.example_inputs)
    decoder = cachefree.load_onnx(cachefree.to_onnx(rewritten, tmp_path / "m.onnx"), like=rewritten)
    (shape,) = (tuple(value.shape) for value in case.example_inputs)
    past, given = None, None
    for tokens in (8, 4, 12):
        inputs = torch.rand(3, tokens, *shape[2:])
        (expected, past), (found, given) = model(inputs, past), decoder(inputs, given)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
