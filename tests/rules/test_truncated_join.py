"""A memory in two cases: the new rows alone fill it, or the past's last rows are kept too."""

from __future__ import annotations

import pytest
import torch

import cachefree
from cachefree.rules.truncated_join import TruncatedJoin
from tests.assertions import equal_calls, says_what_to_do
from tests.small import Small, rewritten_small, small

from .rewriting import Case, closed_by


class TwoCases(Small):
    """The update of GLM's memories, for keys and values of hidden states."""

    keep = 6

    def forward(self, ids, past=None):
        start = 0 if past is None else past.shape[1]
        new = self.emb(ids) + self.pos(torch.arange(start, start + ids.shape[1]))
        seen = new if past is None else torch.cat((past, new), dim=1)
        q, _, _ = self.qkv(new).chunk(3, dim=-1)
        _, k, v = self.qkv(seen).chunk(3, dim=-1)
        return self.out(self.attend(q, k) @ v), self.kept(past, new)

    def kept(self, past, new):
        n = new.shape[1]
        length = min(self.keep, (0 if past is None else past.shape[1]) + n)
        if length <= n:
            return new[:, -length:]
        return torch.cat((past[:, -length + n :], new), dim=1)


class CutAfterwards(TwoCases):
    """Joins what there is, and cuts it: one expression for both cases."""

    def kept(self, past, new):
        whole = new if past is None else torch.cat((past, new), dim=1)
        return whole[:, -self.keep :]


class FirstRows(TwoCases):
    """Keeps the first rows where the new ones fill the memory: another thing."""

    def kept(self, past, new):
        n = new.shape[1]
        length = min(self.keep, (0 if past is None else past.shape[1]) + n)
        if length <= n:
            return new[:, :length]
        return torch.cat((past[:, -length + n :], new), dim=1)


class OneRowTooFew(TwoCases):
    """Keeps one row less of the past than there is room for, but on the first call."""

    def kept(self, past, new):
        n = new.shape[1]
        if past is None:
            return new[:, -self.keep :]
        return torch.cat((past[:, -self.keep + n + 1 :], new), dim=1)[:, -self.keep + 1 :]


class Averaged(TwoCases):
    """Scales what it keeps of the past."""

    def kept(self, past, new):
        n = new.shape[1]
        length = min(self.keep, (0 if past is None else past.shape[1]) + n)
        if length <= n:
            return new[:, -length:]
        return torch.cat((past[:, -length + n :] * 0.5, new), dim=1)


def test_both_cases_are_one_graph() -> None:
    rewritten = closed_by(TruncatedJoin(), TwoCases)
    logits, memory = rewritten(torch.zeros(1, 9, dtype=torch.long))
    assert memory.shape == (1, 6, 6)
    assert logits.shape == (1, 9, 12)


@pytest.mark.parametrize("keep", [1, 3])
def test_a_memory_shorter_than_the_example(keep: int) -> None:
    model = small(TwoCases)
    model.keep = keep
    assert equal_calls(Case(), model, rewritten_small(model)) >= 20


@pytest.mark.parametrize("keep", [1, 9])
def test_a_memory_of_any_length_that_is_cut_after_the_join(keep: int) -> None:
    model = small(CutAfterwards)
    model.keep = keep
    rewritten = rewritten_small(model)
    assert rewritten.report.verdict.is_proof
    assert equal_calls(Case(), model, rewritten) >= 20


@pytest.mark.parametrize("build", [FirstRows, OneRowTooFew])
def test_other_rows_are_refused(build: type) -> None:
    with pytest.raises(cachefree.CacheFreeError) as caught:
        rewritten_small(small(build))
    says_what_to_do(caught.value)


def test_a_scaled_past_is_no_join() -> None:
    """Right on the first call and where the past is dropped: refused, or kept out of the domain."""
    model = small(Averaged)
    try:
        rewritten = rewritten_small(model)
    except cachefree.CacheFreeError as error:
        assert "kept" in str(error)  # noqa: PT017 - either answer is right
        return
    equal_calls(Case(), model, rewritten, may_raise=cachefree.DomainError)
