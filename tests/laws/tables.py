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
                "rows of einsum that are not named",
                ("n",),
                lambda x: torch.einsum("..., f -> ... f", _angles(x), _angles(x))[: x.shape[0]],
            ),
            Instance(
                "one row for all, not named",
                ("n",),
                lambda x: torch.einsum("...i,...i->...", _angles(x)[None], _angles(x)[:, None])[
                    : x.shape[0]
                ],
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
    "slice-of-written": Tried(
        (
            Instance(
                "rows of the rows",
                ("9 2", "n 2"),
                lambda x, y: torch.slice_scatter(x, y[:4], 0, 2, 2 + y[:4].shape[0])[2:][
                    : y[:4].shape[0]
                ],
            ),
            Instance(
                "columns, from the beginning on",
                ("b n", "b n"),
                lambda x, y: torch.slice_scatter(torch.cat([x, x], 1), y, 1, 0, y.shape[1])[
                    :, : y.shape[1] // 2
                ],
            ),
        ),
        (
            Instance(
                "a row before them",
                ("9 2", "3 2"),
                lambda x, y: torch.slice_scatter(x, y, 0, 2, 5)[1:4],
            ),
            Instance(
                "a row after them",
                ("9 2", "3 2"),
                lambda x, y: torch.slice_scatter(x, y, 0, 2, 5)[3:6],
            ),
            Instance(
                "every other row",
                ("9 2", "3 2"),
                lambda x, y: torch.slice_scatter(x, y, 0, 2, 8, 2)[2:5],
            ),
            Instance(
                "counted from the end",
                ("9 2", "3 2"),
                lambda x, y: torch.slice_scatter(x, y, 0, -5, -2)[:2],
            ),
            Instance(
                "along another axis",
                ("4 4", "4 2"),
                lambda x, y: torch.slice_scatter(x, y, 1, 0, 2)[:2],
            ),
            Instance(
                "of another dtype",
                ("9 2", "3 2"),
                lambda x, y: torch.slice_scatter(x.double(), y, 0, 2, 5)[2:4],
            ),
        ),
    ),
    "written-over": Tried(
        (
            Instance(
                "by more rows",
                ("9 2", "2 2", "4 2"),
                lambda x, y, z: torch.slice_scatter(torch.slice_scatter(x, y, 0, 3, 5), z, 0, 2, 6),
            ),
            Instance(
                "by as many",
                ("2 n", "b n", "b n"),
                lambda x, y, z: torch.slice_scatter(
                    torch.slice_scatter(torch.cat([y, x]), y, 0, 0, y.shape[0]), z, 0, 0, y.shape[0]
                ),
            ),
        ),
        (
            Instance(
                "but for one row",
                ("9 2", "4 2", "4 2"),
                lambda x, y, z: torch.slice_scatter(torch.slice_scatter(x, y, 0, 3, 7), z, 0, 2, 6),
            ),
            Instance(
                "but for the first row",
                ("9 2", "4 2", "4 2"),
                lambda x, y, z: torch.slice_scatter(torch.slice_scatter(x, y, 0, 1, 5), z, 0, 2, 6),
            ),
            Instance(
                "along another axis",
                ("4 4", "2 4", "4 3"),
                lambda x, y, z: torch.slice_scatter(torch.slice_scatter(x, y, 0, 0, 2), z, 1, 0, 3),
            ),
            Instance(
                "every other row",
                ("9 2", "2 2", "3 2"),
                lambda x, y, z: torch.slice_scatter(
                    torch.slice_scatter(x, y, 0, 0, 2), z, 0, 0, 5, 2
                ),
            ),
        ),
    ),
}
