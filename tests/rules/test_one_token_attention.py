"""`is_causal` for several tokens, no mask for one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import cachefree
from cachefree.rules.one_token_attention import OneTokenAttention
from tests.assertions import equal_calls
from tests.small import Small, rewritten_small, small

from .rewriting import Case, closed_by


class FlagBySize(Small):
    """Many codes are so: right for a first call, and for later ones of one token."""

    def forward(self, ids, past=None):
        start = 0 if past is None else past[0].shape[1]
        x = self.emb(ids) + self.pos(torch.arange(start, start + ids.shape[1]))
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=1), torch.cat((past[1], v), dim=1)
        return self.out(self.mixed(*(t.unsqueeze(1) for t in (q, k, v))).squeeze(1)), (k, v)

    def mixed(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)


class ScaledForOne(FlagBySize):
    """One token is scaled otherwise as well."""

    def mixed(self, q, k, v):
        if q.shape[2] > 1:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.scaled_dot_product_attention(q, k, v, scale=0.1)


def test_one_graph_for_one_token_and_for_several() -> None:
    """A chunk over a past is masked top left, as torch aligns the flag, and the model has it."""
    model = small(FlagBySize).double()
    rewritten = rewritten_small(model)
    assert rewritten.report.verdict is cachefree.Verdict.PROVED_REAL
    assert equal_calls(Case(), model, rewritten) >= 20
    targets = [n.target for n in rewritten.graph_module.graph.nodes if n.op == "call_function"]
    assert torch.ops.aten.tril.default in targets
    (attention,) = [
        n
        for n in rewritten.graph_module.graph.nodes
        if n.target is torch.ops.aten.scaled_dot_product_attention.default
    ]
    assert len(attention.args) == 4, "a mask, and no flag"


def test_the_report_names_the_rule() -> None:
    rewritten = closed_by(OneTokenAttention(), FlagBySize)
    (branch,) = [b for b in rewritten.report.branches if b.rule == OneTokenAttention().name]
    assert "is_causal=q.shape[2] > 1" in branch.where.text
    assert branch.neutral == OneTokenAttention().neutral


def test_another_scale_for_one_token_is_refused() -> None:
    with pytest.raises(cachefree.UnsupportedBranchError) as caught:
        rewritten_small(small(ScaledForOne))
    assert "scale=0.1" in str(caught.value)


def test_flag_of_the_first_call_and_of_several_tokens_at_once() -> None:
    class Both(FlagBySize):
        def mixed(self, q, k, v):
            is_first = q.shape[2] == k.shape[2]
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=bool(is_first and q.shape[2] > 1)
            )

    model = small(Both).double()
    try:
        rewritten = rewritten_small(model)
    except cachefree.UnsupportedBranchError as error:
        assert "is_causal" in str(error)  # noqa: PT017 - either answer is right
        return
    equal_calls(Case(), model, rewritten, may_raise=cachefree.DomainError)
