"""Every class of cache code: models that are taken, and models that are rightly refused."""

from __future__ import annotations

import pytest
import torch

import cachefree

from .assertions import Unchanged, graph_is_plain, says_what_to_do
from .models.by_class import REFUSED, TAKEN, Refused
from .models.kept import KeptCase
from .test_lifting import equal_sequences, rewritten_from


@pytest.mark.parametrize("case", TAKEN, ids=str)
def test_taken_model_equals_the_model(case: KeptCase) -> None:
    model = case.build()
    rewritten = rewritten_from(case, model)
    assert rewritten.report.verdict.is_proof, rewritten.report
    graph_is_plain(rewritten.graph_module)
    assert equal_sequences(case, model, [rewritten]) >= 10


@pytest.mark.parametrize("refused", REFUSED, ids=str)
def test_refused_model_is_refused(refused: Refused) -> None:
    model = refused.build()
    unchanged = Unchanged(model)
    with pytest.raises(cachefree.CacheFreeError) as caught:
        cachefree.rewrite(model, refused.example, **refused.options)
    unchanged.check()
    for text in refused.says:
        assert text in str(caught.value), str(caught.value)
    says_what_to_do(caught.value)
    assert torch.is_grad_enabled()
