"""Models that take one token a call, with no axis for tokens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cachefree

from .assertions import graph_is_plain
from .models.kept import KeptCase
from .models.stepping import STEPPING, AttendingStep
from .test_lifting import equal_sequences, rewritten_from


@pytest.mark.parametrize("case", STEPPING, ids=str)
def test_stepping_model_equals_the_model(case: KeptCase) -> None:
    model = case.build()
    rewritten = rewritten_from(case, model)
    assert rewritten.report.verdict.is_proof, rewritten.report
    graph_is_plain(rewritten.graph_module)
    assert equal_sequences(case, model, [rewritten]) >= 10


def test_an_index_that_is_a_size_is_asked_to_lie_inside() -> None:
    class FewPositions(AttendingStep):
        def __init__(self) -> None:
            super().__init__()
            self.pos = nn.Embedding(4, 8)

    rewritten = cachefree.rewrite(FewPositions().eval())
    token = torch.tensor([3, 4])
    _, cache = rewritten(token)
    for _ in range(3):
        _, cache = rewritten(token, cache)
    with pytest.raises(cachefree.CacheFreeError, match="outside the domain"):
        rewritten(token, cache)
