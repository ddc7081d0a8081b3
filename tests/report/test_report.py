"""The report names every branch with the user's own line, and says no more than was shown."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import torch

import cachefree
from cachefree import Verdict
from cachefree.errors import CaptureError, Refusal, SourceLine
from tests.models import CASES
from tests.small import Small, rewritten_small, small


class Branchy(Small):
    """A branch of each kind: a statement, an expression, a test by length."""

    def forward(self, ids, past=None):
        start = past[0].shape[1] if past is not None else 0
        x = self.emb(ids) + self.pos(torch.arange(start, start + ids.shape[1]))
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if past:
            k = torch.cat((past[0], k), dim=1)
            v = torch.cat((past[1], v), dim=1)
        always = self.out(self.attend(q, k) @ v)
        if len(self.qkv.weight) > 3:
            always = always + 1
        return always, (k, v)


@pytest.fixture(scope="module")
def rewritten() -> cachefree.Rewritten:
    return rewritten_small(small(Branchy))


def line_of(text: str, function: Any = Branchy) -> int:
    lines, start = inspect.getsourcelines(function)
    (found,) = [start + place for place, line in enumerate(lines) if text in line]
    return found


def test_every_branch_is_named_with_file_line_and_condition(
    rewritten: cachefree.Rewritten,
) -> None:
    found = {(b.where.file, b.where.line, b.condition) for b in rewritten.report.branches}
    assert found == {
        (__file__, line_of("if past is not None else 0"), "past is not None"),
        (__file__, line_of("        if past:"), "past"),
    }
    assert all(b.neutral == "zero length on axis 1" for b in rewritten.report.branches)
    assert all(b.rule == "neutral element of a join" for b in rewritten.report.branches)


def test_text(rewritten: cachefree.Rewritten) -> None:
    text = str(rewritten.report)
    assert text.startswith("Branchy: one graph for the first and for later calls")
    for words in (
        "PROVED_EXACT",
        "2 tensors, past[0]: (batch, past, 6), zero length on axis 1",
        "first call: every size",
        "later calls: every size",
        f"test_report.py:{line_of('if past is not None else 0')}, {line_of('        if past:')}",
        "2 × past is not None, past",
        "cat-empty",
        "operators",
    ):
        assert words in text, words


def test_as_dict_is_plain(rewritten: cachefree.Rewritten) -> None:
    found = json.loads(json.dumps(rewritten.report.as_dict()))
    assert found["model"] == "Branchy"
    assert found["verdict"] == "PROVED_EXACT"
    assert {region["region"] for region in found["domain"]} == {"first call", "later calls"}
    assert found["branches"][0].keys() >= {"file", "line", "condition", "rule", "neutral"}
    assert "cat-empty" in found["laws"]
    assert found["seconds"] > 0


def test_what_was_assumed_is_said() -> None:
    rewritten = cachefree.rewrite(small())
    notes = "\n".join(rewritten.report.notes)
    assert "ids" in notes
    assert "int64" in notes
    assert notes.splitlines()[0] in str(rewritten.report)
    assert not rewritten_small(small()).report.notes


def test_unchecked_and_tested_are_never_called_proved() -> None:
    assert not Verdict.NOT_CHECKED.is_proof
    assert not Verdict.TESTED.is_proof
    assert not Verdict.CHECKED.is_proof
    assert Verdict.PROVED_EXACT.is_proof
    assert Verdict.PROVED_REAL.is_proof


class NoisyScale(Small):
    """Equal on both paths, but by no law: the sum of a softmax is one."""

    def forward(self, ids, past=None):
        logits, present = super().forward(ids, past)
        if past is not None:
            logits = logits * logits.double().softmax(-1).sum(-1, keepdim=True).float()
        return logits, present


def test_what_cannot_be_proved_is_refused_or_tested() -> None:
    with pytest.raises(cachefree.UnsupportedBranchError) as caught:
        rewritten_small(small(NoisyScale))
    assert "softmax" in str(caught.value)
    assert 'check="test"' in str(caught.value)
    rewritten = rewritten_small(small(NoisyScale), check="test")
    assert rewritten.report.verdict is Verdict.TESTED
    assert "TESTED" in str(rewritten.report)
    assert "proved" not in str(rewritten.report).lower()
    unchecked = rewritten_small(small(NoisyScale), check="off")
    assert unchecked.report.verdict is Verdict.NOT_CHECKED
    assert "proved" not in str(unchecked.report).lower()


class Broken(Small):
    def forward(self, ids, past=None):
        logits, present = super().forward(ids, past)
        return (logits * 2 if past is not None else logits), present


def test_random_tests_refuse_what_is_wrong() -> None:
    for check in ("prove", "test"):
        with pytest.raises(cachefree.CacheFreeError):
            rewritten_small(small(Broken), check=check)


def test_unknown_checks_and_things_that_are_no_module() -> None:
    with pytest.raises(CaptureError, match=r"'hope'(.|\n)*'prove', 'test', 'off'"):
        rewritten_small(small(), check="hope")
    with pytest.raises(CaptureError, match=r"nn\.Module, not str"):
        cachefree.rewrite("model")


def test_a_refusal_says_what_where_why_and_what_to_do() -> None:
    line = line_of("        if past:")
    refusal = Refusal("What.", "Why.", "Do.", SourceLine(__file__, line, "forward", "h.0"))
    assert str(refusal).splitlines() == [
        "What.",
        f"  where: {__file__}:{line} in forward (module 'h.0')",
        "         if past:",
        "  why:   Why.",
        "  do:    Do.",
    ]
    assert str(CaptureError(refusal, "Also.")).endswith("\n\nAlso.")


BRANCHES_IN_TORCH = frozenset(("lstm_language_model",))
"""Models that hand the absent cache to a layer of torch, which asks for it."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case for case in CASES if not case.may_refuse and case.device == "cpu"], ids=str
)
def test_branches_of_the_zoo_are_conditions_of_its_files(case: Any) -> None:
    rewritten = cachefree.rewrite(case.build(), case.example_inputs, **case.rewrite_options)
    has_own = case.name not in BRANCHES_IN_TORCH
    assert bool(rewritten.report.branches) is has_own, "a branch of its own, or torch's"
    for branch in rewritten.report.branches:
        assert "/tests/models/" in branch.where.file
        assert branch.condition in branch.where.text or not branch.condition
        assert branch.rule
        assert branch.neutral
