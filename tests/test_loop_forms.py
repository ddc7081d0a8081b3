"""The forms that a loop over tokens may have, and forms that no graph can be made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import cachefree

from .assertions import equal_calls, says_what_to_do
from .models import ModelCase, RefusalCase
from .models.loop_forms import LOOP_FORMS, NO_LOOP_FORMS

QUICK = {"enumerated_rows", "reads_what_it_wrote"}
QUICK_REFUSALS = {"reads_what_it_joined", "writes_to_what_it_joined", "every_second"}
GRID = ((1, (1, 1, 4)), (3, (7, 1, 2)))


def _marked(case: ModelCase | RefusalCase, quick: set[str]) -> object:
    return pytest.param(case, id=case.name, marks=() if case.name in quick else pytest.mark.slow)


@pytest.mark.parametrize("case", [_marked(case, QUICK) for case in LOOP_FORMS])
def test_a_form_of_a_loop_is_one_graph(case: ModelCase, tmp_path: Path) -> None:
    model = case.build()
    rewritten = cachefree.rewrite(model)
    assert rewritten.report.verdict.name == "PROVED_EXACT"
    assert len(rewritten.report.loops) == 1
    assert equal_calls(case, model, rewritten) > 0
    cachefree.to_onnx(rewritten, tmp_path / "loop.onnx")
    decoder = cachefree.load_onnx(tmp_path / "loop.onnx", like=rewritten)
    with torch.no_grad():
        assert equal_calls(case, model, decoder, grid=GRID) > 0


@pytest.mark.parametrize("case", [_marked(case, QUICK_REFUSALS) for case in NO_LOOP_FORMS])
def test_a_form_of_which_none_is_made_is_refused(case: RefusalCase) -> None:
    with pytest.raises(getattr(cachefree, case.error)) as refused:
        cachefree.rewrite(case.build())
    for text in case.says:
        assert text in str(refused.value)
    says_what_to_do(refused.value)
