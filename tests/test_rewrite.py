"""Every test model, from the call to the equal module; every refusal, with its words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import cachefree
from cachefree import CacheFreeError

from .assertions import Unchanged, equal_calls, graph_is_plain, map_tensors, says_what_to_do
from .models import CASES, REFUSALS, ModelCase, RefusalCase


def rewritten_from(case: ModelCase | RefusalCase, model: torch.nn.Module) -> cachefree.Rewritten:
    """The rewritten model, after a look at what the rewrite left behind: nothing."""
    inputs = case.example_inputs
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if dtypes == {torch.float64}:
        inputs = map_tensors(lambda t: t.double() if t.is_floating_point() else t, inputs)
    unchanged = Unchanged(model)
    try:
        return cachefree.rewrite(model, inputs, **case.rewrite_options)
    finally:
        unchanged.check()


def of_the_zoo() -> list[Any]:
    """The first model of each set of patterns; every ninth of the others; the rest is slow."""
    seen: dict[tuple[str, ...], int] = {}
    others = 0
    found: list[Any] = []
    for case in CASES:
        is_first = case.patterns not in seen
        seen[case.patterns] = 1
        others += not is_first
        is_quick = is_first or others % 9 == 0
        found.append(case if is_quick else pytest.param(case, marks=pytest.mark.slow))
    return found


@pytest.mark.parametrize("case", of_the_zoo(), ids=str)
def test_rewritten_model_equals_the_model(case: ModelCase) -> None:
    model = case.build()
    try:
        rewritten = rewritten_from(case, model)
    except CacheFreeError as error:
        if not case.may_refuse:
            raise
        says_what_to_do(error)
        return
    if case.expects_proof:
        assert rewritten.report.verdict.is_proof, rewritten.report
    graph_is_plain(rewritten.graph_module)
    unchanged = Unchanged(model)
    assert equal_calls(case, model, rewritten) >= 20
    unchanged.check()


def is_in_float32(case: ModelCase) -> bool:
    model = case.build()
    return {p.dtype for p in model.parameters()} == {torch.float32} and case.device == "cpu"


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if is_in_float32(case)], ids=str)
def test_rewritten_model_equals_the_model_in_float64(case: ModelCase) -> None:
    model = case.build().double()
    try:
        rewritten = rewritten_from(case, model)
    except CacheFreeError:
        if not case.may_refuse:
            raise
        pytest.skip("refused, as this case may be")
    equal_calls(case, model, rewritten)


def test_enough_models_are_rewritten_and_proved() -> None:
    """The tests above assert of each case what is counted here."""
    taken = [case for case in CASES if not case.may_refuse]
    assert len(taken) >= 40
    assert sum(case.expects_proof for case in taken) >= 36


def error_of(call: Callable[[], object]) -> CacheFreeError | None:
    try:
        call()
    except CacheFreeError as error:
        return error
    return None


SLOWER = (
    "another_scale_for_long_pasts",
    "dynamic_rope",
    "log_scaled_queries",
    "past_is_not_read",
)


@pytest.mark.parametrize(
    "refusal",
    [
        pytest.param(refusal, marks=pytest.mark.slow) if refusal.name in SLOWER else refusal
        for refusal in REFUSALS
    ],
    ids=str,
)
def test_refusal(refusal: RefusalCase) -> None:
    model = refusal.build()
    rewritten: list[cachefree.Rewritten] = []
    error = error_of(lambda: rewritten.append(rewritten_from(refusal, model)))
    if refusal.then is not None:
        assert error is None, error
        unchanged = Unchanged(model)
        error = error_of(lambda: refusal.then(rewritten[0]))
        unchanged.check()
    if error is None and refusal.or_correct:
        equal_calls(refusal, model, rewritten[0], may_raise=CacheFreeError)
        return
    assert error is not None, "neither refused nor shown to be right"
    assert isinstance(error, getattr(cachefree, refusal.error)), repr(error)
    for text in refusal.says:
        assert text in str(error), str(error)
    says_what_to_do(error)
