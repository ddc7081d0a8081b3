"""A mask that the first call alone applies: by flag, by fill, by choice, by sum."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import cachefree
from cachefree.rules.first_call_mask import FirstCallMask
from tests.models.case import one_token_later
from tests.small import IDS, Small, small

from .rewriting import closed_by, refused


class Masked(Small):
    """Later calls take one token, which sees everything."""

    def forward(self, ids, past=None):
        assert past is None or ids.shape[1] == 1
        start = 0 if past is None else past[0].shape[1]
        x = self.emb(ids) + self.pos(torch.arange(start, start + ids.shape[1]))
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=1), torch.cat((past[1], v), dim=1)
        return self.out(self.mixed(q, k, v, past)), (k, v)

    def mixed(self, q, k, v, past):
        scores = q @ k.mT
        if past is None:
            scores = self.hide(scores, scores.shape[-1])
        return scores.softmax(-1) @ v


class ByFlag(Masked):
    def mixed(self, q, k, v, past):
        heads = (t.unsqueeze(1) for t in (q, k, v))
        return F.scaled_dot_product_attention(*heads, is_causal=past is None).squeeze(1)


class ByFlagBehindAView(ByFlag):
    """The attention's result is viewed as the shape that it has."""

    def mixed(self, q, k, v, past):
        heads = (t.unsqueeze(1) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(*heads, is_causal=past is None)
        return mixed.view(q.shape[0], 1, *q.shape[1:]).squeeze(1)


class ByMaskOfAttention(Masked):
    def mixed(self, q, k, v, past):
        n = q.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool).tril() if past is None else None
        heads = (t.unsqueeze(1) for t in (q, k, v))
        return F.scaled_dot_product_attention(*heads, attn_mask=mask).squeeze(1)


class ByFill(Masked):
    def hide(self, scores, n):
        later = torch.ones(n, n, dtype=torch.bool).triu(1)
        return scores.masked_fill(later, -torch.inf)


class ByChoice(Masked):
    def hide(self, scores, n):
        seen = torch.ones(n, n, dtype=torch.bool).tril()
        return torch.where(seen, scores, -1e9)


class BySum(Masked):
    def hide(self, scores, n):
        return scores + torch.full((n, n), float("-inf"), dtype=scores.dtype).triu(1)


CLOSED = (ByFlag, ByFlagBehindAView, ByMaskOfAttention, ByFill, ByChoice, BySum)


@pytest.mark.parametrize("build", CLOSED, ids=lambda build: build.__name__)
def test_the_mask_is_switched_off_once_there_is_a_past(build: type[Masked]) -> None:
    rewritten = closed_by(FirstCallMask(), build, one_token_later)
    ops = {str(n.target) for n in rewritten.graph_module.graph.nodes if n.op == "call_function"}
    assert "aten.gt.Scalar" in ops, "the switch"


class SharpenedFirst(Masked):
    """The first call is scaled, too: no mask."""

    def hide(self, scores, n):
        return ByFill.hide(self, scores, n) * 2


class WeightedFirst(Masked):
    """A learned bias that only the first call adds, of a full matrix."""

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.ones(6, 6))

    def mixed(self, q, k, v, past):
        if past is None:
            q = q @ self.bias
        return (q @ k.mT).softmax(-1) @ v


class NarrowedFirst(Masked):
    """Values are halved on the first call."""

    def mixed(self, q, k, v, past):
        scores = q @ k.mT
        if past is None:
            v = v * 0.5
        return scores.softmax(-1) @ v


@pytest.mark.parametrize("build", [SharpenedFirst, WeightedFirst, NarrowedFirst])
def test_what_is_no_mask_is_refused(build: type[Masked]) -> None:
    error = refused(build)
    assert "test_first_call_mask.py" in str(error)


class PaddedOtherwise(Small):
    """One new token is hidden with another number, by an argument that later calls give longer."""

    def forward(self, ids, pad, past=None):
        self.pad = pad
        return super().forward(ids, past)

    def attend(self, q, k):
        n, m = q.shape[1], k.shape[1]
        seen, scores = self.pad[:, None].bool(), q @ k.mT
        if m != n and n == 1:
            return scores.masked_fill(~seen, -1e30).softmax(-1)
        seen = seen & torch.ones(n, m, dtype=torch.bool).tril(m - n)
        return scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1)


def test_no_mask_is_made_of_an_input_that_has_another_size_on_later_calls() -> None:
    pad = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(cachefree.UnsupportedBranchError, match="different things"):
        cachefree.rewrite(small(PaddedOtherwise), (IDS[:2, :3], pad))
