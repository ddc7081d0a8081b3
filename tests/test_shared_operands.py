"""Values with several results, each used on its own way to the output."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import cachefree

from .small import small

Past = tuple[torch.Tensor, torch.Tensor]


class BestOfMixed(nn.Module):
    """The first call's mask is a flag, so that all that follows it is equal and not the same."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.qkv = nn.Linear(8, 24)

    def forward(self, ids: torch.Tensor, past: Past | None = None) -> tuple[torch.Tensor, Past]:
        q, k, v = self.qkv(self.embed(ids)).chunk(3, -1)
        if past is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
            places = torch.arange(k.shape[1])
            mask = places <= places[k.shape[1] - q.shape[1] :, None]
            y = F.scaled_dot_product_attention(q, k, v, mask)
        best, order = torch.topk(y, 3, -1)
        return best + order, (k, v)


def test_both_results_of_an_operator_are_compared_after_it() -> None:
    torch.manual_seed(0)
    model = small(BestOfMixed)
    rewritten = cachefree.rewrite(model, (torch.zeros(2, 5, dtype=torch.long),))
    assert rewritten.report.verdict is cachefree.Verdict.PROVED_REAL
    cachefree.check_certificate(rewritten.certificate, rewritten)
    ids = torch.randint(11, (2, 7))
    mine, own = rewritten(ids[:, :4]), model(ids[:, :4])
    torch.testing.assert_close(mine, own)
    torch.testing.assert_close(rewritten(ids[:, 4:], mine[1]), model(ids[:, 4:], own[1]))
