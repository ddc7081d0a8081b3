"""What is taken for attention, and what is not, on the graph alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import cachefree
from cachefree.onnx.attention.separate import with_attention
from cachefree.onnx.attention.shared import GROUPED, SCATTERED, with_shared

from .models.case import seeded

IDS = torch.tensor([[4, 8, 15], [16, 2, 3]])


class Head(nn.Module):
    """One layer whose attention is ``attend``."""

    def __init__(self, attend: Callable[..., Any]) -> None:
        super().__init__()
        self.emb, self.qkv, self.out = nn.Embedding(20, 16), nn.Linear(16, 48), nn.Linear(16, 20)
        self.attend = attend

    def forward(self, ids, past=None):
        b, n = ids.shape
        q, k, v = (
            part.view(b, n, 2, 8).transpose(1, 2) for part in self.qkv(self.emb(ids)).chunk(3, -1)
        )
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        y = self.attend(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, n, 16)), (k, v)


def hidden(q: torch.Tensor, k: torch.Tensor, window: int = 0) -> torch.Tensor:
    n, total = q.shape[2], k.shape[2]
    ones = torch.ones(n, total, dtype=torch.bool, device=q.device)
    later = ones.triu(total - n + 1)
    return later | ones.tril(total - n - window) if window else later


def plain(q, k, v):
    return (q @ k.mT / 8).masked_fill(hidden(q, k), -torch.inf).softmax(-1) @ v


def window(q, k, v):
    return (q @ k.mT / 8).masked_fill(hidden(q, k, 4), -torch.inf).softmax(-1) @ v


def sees_all(q, k, v):
    return (q @ k.mT / 8).softmax(-1) @ v


def hardly_hidden(q, k, v):
    return (q @ k.mT / 8).masked_fill(hidden(q, k), -50.0).softmax(-1) @ v


def shuffled_heads(q, k, v):
    return (q @ k.flip(1).mT / 8).masked_fill(hidden(q, k), -torch.inf).softmax(-1) @ v


def swapped_heads(q, k, v):
    turned = k.transpose(0, 1).reshape(k.shape)  # the batch in the place of the heads
    return (q @ turned.mT / 8).masked_fill(hidden(q, k), -torch.inf).softmax(-1) @ v


def relative_to_first(q, k, v):
    scores = (q @ k.mT / 8).masked_fill(hidden(q, k), -torch.inf)
    return (scores.softmax(-1) * 0.5) @ v


def over_queries(q, k, v):
    return (q @ k.mT / 8).softmax(-2) @ v


def negative(q, k, v):
    return (q @ k.mT * -0.5).masked_fill(hidden(q, k), -torch.inf).softmax(-1) @ v


def graph(attend: Callable[..., Any]) -> Any:
    module = seeded(lambda: Head(attend))()
    rewritten = cachefree.rewrite(module, (IDS,), check="off")
    return rewritten.graph_module, rewritten.interface


@pytest.mark.parametrize(
    ("attend", "kernel"), [(plain, GROUPED), (window, GROUPED), (sees_all, SCATTERED)]
)
def test_what_a_mask_allows(attend: Callable[..., Any], kernel: str) -> None:
    module, interface = graph(attend)
    found = with_shared(module, interface)
    assert set(found.report.kernels.values()) == {kernel}
    assert not found.report.reasons
    nodes = [node for node in found.module.graph.nodes if "symbolic" in str(node.target)]
    grouped = [node for node in nodes if node.args[1] == GROUPED]
    # a mask that hides the future and nothing else is the kernel's own; a window is handed over
    assert [node.args[0][10] is None for node in grouped] == {
        plain: [True], window: [False], sees_all: []
    }[attend]  # fmt: skip


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (hardly_hidden, "it puts -50.0 among scores"),
        (shuffled_heads, "no attention reads it as keys and values"),
        (swapped_heads, "are not the batch and heads"),
        (relative_to_first, "its weights go into aten.mul.Tensor"),
        (over_queries, "its softmax is not over the keys"),
        (negative, "its scores are multiplied by -0.5"),
    ],
)
def test_what_is_not_taken(attend: Callable[..., Any], reason: str) -> None:
    try:
        module, interface = graph(attend)
    except cachefree.CacheFreeError as error:
        pytest.skip(f"refused before: {error}")
    found = with_attention(module, interface)
    assert not found.report.kernels
    assert reason in found.report.reasons["past[0]"]
    # the graph that is left is the graph that was there
    for past, new in ((0, 3), (4, 1), (2, 2)):
        call = (IDS[:, :new] if new < 4 else IDS, *torch.randn(2, 2, 2, past, 8))
        for one, other in zip(found.module(*call), module(*call), strict=True):
            torch.testing.assert_close(one, other)
