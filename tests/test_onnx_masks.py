"""Masks that torch repeats for every query or key are repeated in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as attend

import cachefree

from .assertions import same
from .small import Small, small

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
HIDES_LAST = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


class Crossed(Small):
    """Attends to what it is given, under a mask over its rows."""

    def forward(self, ids: Any, rows: Any, mask: Any, past: Any = None) -> Any:
        logits, present = super().forward(ids, past)
        x = self.emb(ids)[:, None]
        return logits + self.out(attend(x, rows, rows, attn_mask=self.shaped(mask)))[:, 0], present

    def shaped(self, mask: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class RowForEveryQuery(Crossed):
    def shaped(self, mask: torch.Tensor) -> torch.Tensor:
        return mask[:, None, None, :].bool()


class Added(Crossed):
    def shaped(self, mask: torch.Tensor) -> torch.Tensor:
        return (1.0 - mask.float())[:, None, None, :] * -5.0


class ColumnForEveryKey(Crossed):
    def shaped(self, mask: torch.Tensor) -> torch.Tensor:
        return mask.float().sum(-1)[:, None, None, None] * 0.1


@pytest.mark.parametrize("build", [RowForEveryQuery, Added, ColumnForEveryKey])
def test_a_mask_is_repeated(build: type[nn.Module], tmp_path: Path) -> None:
    model = small(build)
    rows = torch.randn(2, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    rewritten = cachefree.rewrite(model, (IDS[:, :3], rows, HIDES_LAST), check="off")
    path = cachefree.to_onnx(rewritten, tmp_path / "m.onnx")
    decoder = cachefree.load_onnx(path, like=rewritten)
    mine = theirs = None
    for new in (IDS[:, :3], IDS[:, 3:4], IDS[:, 4:]):
        with torch.no_grad():
            expected = model(new, rows, HIDES_LAST, theirs)
        found = decoder(new, rows, HIDES_LAST, mine)
        same(found, expected)
        mine, theirs = found[1], expected[1]
