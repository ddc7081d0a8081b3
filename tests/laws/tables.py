"""Instances of the laws of tables: values that are computed of no input, row by row."""

from __future__ import annotations

import torch

from .equations import Instance
from .families import Family, Tried


def _angles(x: torch.Tensor, more: int = 3) -> torch.Tensor:
    return torch.arange(x.shape[0] + more).float() / 7


TABLES: Family = {
    "slice-of-pointwise": Tried(
        (
            Instance("a cosine", ("n",), lambda x: _angles(x).cos()[1 : x.shape[0] + 1]),
            Instance("a cast", ("n",), lambda x: torch.arange(x.shape[0] + 2).half()[: x.shape[0]]),
            Instance(
                "one row for all",
                ("n",),
                lambda x: (_angles(x)[:, None] * torch.tensor([[1.0, 2.0]]))[: x.shape[0]],
            ),
            Instance(
                "fewer dimensions",
                ("n",),
                lambda x: (_angles(x)[:, None] + _angles(x))[:, 2 : x.shape[0] + 2],
            ),
        ),
        (
            Instance("of an input", ("n 4",), lambda x: x.cos()[:, 1:3]),
            Instance("a sum over all", ("n",), lambda x: _angles(x).cumsum(0)[: x.shape[0]]),
            Instance("drawn", ("n",), lambda x: torch.ones(x.shape[0] + 3).flip(0)[: x.shape[0]]),
        ),
    ),
    "slice-of-product": Tried(
        (
            Instance(
                "rows of an outer product",
                ("n",),
                lambda x: torch.outer(_angles(x), _angles(x))[1 : x.shape[0] + 1],
            ),
            Instance(
                "columns of an outer product",
                ("n",),
                lambda x: torch.outer(_angles(x), _angles(x))[:, : x.shape[0]],
            ),
            Instance(
                "rows of einsum",
                ("n",),
                lambda x: torch.einsum("i,j->ij", _angles(x), _angles(x))[: x.shape[0]],
            ),
        ),
        (
            Instance("of inputs", ("n", "4"), lambda x, y: torch.outer(x, y)[:, 1:3]),
            Instance(
                "a diagonal",
                ("n",),
                lambda x: torch.einsum("ii->i", _angles(x) + _angles(x)[:, None])[: x.shape[0]],
            ),
        ),
    ),
}
