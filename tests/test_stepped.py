"""A prompt in a parallel form, and steps from there on: the steps are scanned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import cachefree

from .assertions import equal_calls, same, says_what_to_do
from .models import ModelCase, RefusalCase
from .models.refused_stepped import REFUSED_STEPPED, AboveALength, ByATable, Decayed
from .models.stepped import STEPPED

QUICK = {"linear_attention"}
QUICK_REFUSALS = {"another_decay", "after_many_tokens", "grows_beside"}
GRID = ((1, (1, 1, 1)), (3, (7, 1)))
PROMPT = torch.arange(10).view(2, 5)


def _named(case: ModelCase | RefusalCase) -> object:
    is_quick = case.name in QUICK | QUICK_REFUSALS
    return pytest.param(case, id=case.name, marks=() if is_quick else pytest.mark.slow)


@pytest.mark.parametrize("case", [_named(case) for case in STEPPED])
def test_the_steps_are_scanned(case: ModelCase, tmp_path: Path) -> None:
    model = case.build()
    rewritten = cachefree.rewrite(model, case.example_inputs, **case.rewrite_options)
    report = rewritten.report
    assert report.verdict.name == "TESTED"
    assert len(report.loops) == 1
    assert "that the first call is its steps" in report.text()
    assert "one-token" in report.laws
    assert [str(region) for region in report.domain.regions] == [
        "first call: every size",
        "later calls: Eq(query, 1)",
    ]
    assert equal_calls(case, model, rewritten) > 0
    cachefree.to_onnx(rewritten, tmp_path / "steps.onnx")
    decoder = cachefree.load_onnx(tmp_path / "steps.onnx", like=rewritten)
    with torch.no_grad():
        assert equal_calls(case, model, decoder, grid=GRID) > 0


def test_a_later_call_of_more_tokens_is_outside_the_domain() -> None:
    model = Decayed().eval()
    rewritten = cachefree.rewrite(model, (PROMPT,), check="test")
    _, state = rewritten(PROMPT)
    same(rewritten(PROMPT[:, :1], state), model(PROMPT[:, :1], state))
    with pytest.raises(cachefree.DomainError, match="outside the domain"):
        rewritten(PROMPT, state)


def test_a_proof_is_not_claimed() -> None:
    with pytest.raises(cachefree.UnsupportedBranchError) as refused:
        cachefree.rewrite(Decayed().eval(), (PROMPT,))
    assert "The first call computes all tokens at once" in str(refused.value)
    assert 'check="test" takes the step' in str(refused.value)
    assert "return self.rate * state + kv" in str(refused.value)
    says_what_to_do(refused.value)


@pytest.mark.parametrize("case", [_named(case) for case in REFUSED_STEPPED])
def test_what_is_not_its_steps_is_refused(case: RefusalCase) -> None:
    with pytest.raises(getattr(cachefree, case.error)) as refused:
        cachefree.rewrite(case.build(), case.example_inputs, **case.rewrite_options)
    for text in case.says:
        assert text in str(refused.value)
    says_what_to_do(refused.value)


def test_a_table_that_the_tests_relied_on_is_watched() -> None:
    model = ByATable().eval()
    rewritten = cachefree.rewrite(model, (PROMPT,), check="test")
    assert "the values of mask, which the tests relied on" in rewritten.report.notes
    same(rewritten(PROMPT), model(PROMPT))
    model.mask[3, 2] = False
    with pytest.raises(cachefree.UnsupportedBranchError, match="is not its steps"):
        rewritten(PROMPT)


@pytest.mark.slow
def test_prompts_that_are_not_their_steps_are_outside_the_domain() -> None:
    rewritten = cachefree.rewrite(AboveALength().eval(), (PROMPT,), check="test")
    assert "first call: query <= 24" in str(rewritten.report.domain)
    with pytest.raises(cachefree.DomainError):
        rewritten(torch.zeros(1, 25, dtype=torch.long))
