"""What a model keeps from call to call: taken where no result depends on it, else refused."""

from __future__ import annotations

import pytest
import torch

import cachefree

from .assertions import equal_calls, says_what_to_do
from .models import ModelCase, RefusalCase
from .models.tables import (
    REFUSED_TABLES,
    TABLES,
    BlockWithAMaskEachTime,
    Decoder,
    RotaryInSharedMemory,
    RotaryOfTheLastLength,
)

QUICK = {"mask_grown", "warms_up"}


def _named(case: ModelCase | RefusalCase) -> object:
    return pytest.param(case, id=case.name, marks=() if case.name in QUICK else pytest.mark.slow)


@pytest.mark.parametrize("case", [_named(case) for case in TABLES])
def test_what_is_built_of_sizes_is_no_state(case: ModelCase) -> None:
    model = case.build()
    rewritten = cachefree.rewrite(model)
    verdict = rewritten.report.verdict
    assert verdict.is_proof if case.expects_proof else verdict.name == "CHECKED"
    assert any("no result depends on what calls leave" in note for note in rewritten.report.notes)
    assert [slot.past.path for slot in rewritten.interface.cache] == ["past[0]", "past[1]"]
    assert equal_calls(case, model, rewritten) > 0
    with torch.no_grad():  # what the model holds now changes nothing
        model(torch.zeros(1, 50, dtype=torch.long))
    assert equal_calls(case, model, rewritten) > 0


@pytest.mark.parametrize("case", [_named(case) for case in REFUSED_TABLES])
def test_what_depends_on_earlier_sizes_is_refused(case: RefusalCase) -> None:
    with pytest.raises(getattr(cachefree, case.error)) as refused:
        cachefree.rewrite(case.build())
    for text in case.says:
        assert text in str(refused.value)
    says_what_to_do(refused.value)


class BlockThatHalvesAtFirst(BlockWithAMaskEachTime):
    def forward(self, x, past=None):
        return super().forward(0.5 * x if past is None else x, past)


def test_a_table_is_no_cache_in_place_of_the_argument() -> None:
    model = Decoder(BlockThatHalvesAtFirst, RotaryOfTheLastLength).eval()
    with pytest.raises(cachefree.UnsupportedBranchError, match="compute different things"):
        cachefree.rewrite(model)


@pytest.mark.slow
def test_a_table_that_is_read_by_another_name_is_refused() -> None:
    model = Decoder(BlockWithAMaskEachTime, RotaryInSharedMemory).eval()
    with pytest.raises(cachefree.CaptureError, match=r"in place to 'block\.rotary\.angles'"):
        cachefree.rewrite(model, cache="past")
