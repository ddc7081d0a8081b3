"""Instances of the laws of states: padding in front, and what holds nothing yet."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .equations import Instance
from .families import Family, Tried

LONG = {"n": 3}

INFINITE = torch.tensor([float("inf"), 1.0, 2.0])

STATES: Family = {
    "pad": Tried(
        (
            Instance("in front", ("b n",), lambda x: F.pad(x, (2, 0))),
            Instance("behind, with a number", ("b n",), lambda x: F.pad(x, (0, 3), value=-1e30)),
            Instance("on two axes", ("b n 4",), lambda x: F.pad(x, (1, 1, 2, 0), value=0.5)),
            Instance("by nothing", ("b n",), lambda x: F.pad(x, (0, 0))),
            Instance("by a size", ("b n", "p"), lambda x, y: F.pad(x, (y.shape[0], 0))),
            Instance("a shift", ("b n 4",), lambda x: F.pad(x, (0, 0, 1, -1)), {"n": 1}),
            Instance("integers", ("b n:int64",), lambda x: F.pad(x, (1, 0), value=7)),
        ),
        (
            Instance("mirrored", ("2 3 n",), lambda x: F.pad(x, (2, 0), mode="reflect"), LONG),
            Instance("by an amount of unknown sign", ("2 n",),
                     lambda x: F.pad(x, (3 - x.shape[1], 0)), {"n": 1}),
        ),
    ),
    "pad-replicate": Tried(
        (
            Instance("in front", ("b 3 n",),
                     lambda x: F.pad(x, (2, 0), mode="replicate"), {"n": 1}),
            Instance("on both sides", ("3 n",),
                     lambda x: F.pad(x, (1, 4), mode="replicate"), {"n": 1}),
            Instance("by nothing", ("2 3 n",),
                     lambda x: F.pad(x, (0, 0), mode="replicate"), {"n": 1}),
        ),
        (
            Instance("mirrored", ("2 3 n",), lambda x: F.pad(x, (2, 0), mode="reflect"), LONG),
            Instance("in a circle", ("2 3 n",), lambda x: F.pad(x, (2, 0), mode="circular"), LONG),
            Instance("cut", ("2 3 n",), lambda x: F.pad(x, (2, -1), mode="replicate"), LONG),
        ),
    ),
    "padded-convolution": Tried(
        (
            Instance("one axis", ("b 4 n", "6 4 3", "6"),
                     lambda x, w, b: F.conv1d(x, w, b, padding=2), {"b": 1, "n": 1}),
            Instance("in groups, dilated", ("2 4 n", "4 1 3"),
                     lambda x, w: F.conv1d(x, w, padding=4, dilation=2, groups=4), {"n": 1}),
            Instance("one axis of two", ("2 3 n 5", "4 3 2 3"),
                     lambda x, w: F.conv2d(x, w, padding=(0, 1)), {"n": 2}),
        ),
        (Instance("not padded", ("2 4 n", "6 4 3"), lambda x, w: F.conv1d(x, w), LONG),),
    ),
    "slice-of-convolution": Tried(
        (
            Instance("the first rows", ("2 4 n", "6 4 3"),
                     lambda x, w: F.conv1d(x, w, padding=2)[..., : x.shape[2]], {"n": 1}),
            Instance("some rows, dilated", ("2 4 9", "6 4 2", "6"),
                     lambda x, w, b: F.conv1d(x, w, b, dilation=3)[..., 1:4]),
            Instance("with a stride", ("2 4 9", "6 4 3"),
                     lambda x, w: F.conv1d(x, w, stride=2)[..., 1:3]),
            Instance("one axis of two", ("2 3 9 5", "4 3 2 3"),
                     lambda x, w: F.conv2d(x, w)[:, :, 2:4]),
        ),
        (
            Instance("channels", ("2 4 9", "6 4 3"), lambda x, w: F.conv1d(x, w)[:, 1:4]),
            Instance("maybe no rows", ("2 4 9", "6 4 3", "p"),
                     lambda x, w, p: F.conv1d(x, w)[..., 1 : 1 + min(p.shape[0], 2)], {"p": 0}),
        ),
    ),
    "slice-of-activation": Tried(
        (
            Instance("of the rows", ("2 4 n", "6 4 3"),
                     lambda x, w: F.silu(F.conv1d(x, w))[..., 1:], {"n": 5}),
            Instance("of a part", ("2 4 9", "6 4 3"),
                     lambda x, w: F.conv1d(x, w, padding=2)[..., :9].exp()[..., 3:]),
        ),
        (
            Instance("channels", ("2 4 9", "6 4 3"), lambda x, w: F.conv1d(x, w).exp()[:, 1:4]),
            Instance("of two", ("2 4 9", "6 4 3", "6 7"),
                     lambda x, w, y: (F.conv1d(x, w) + y)[..., 1:4]),
            Instance("a sum over all", ("2 4 9", "6 4 3"),
                     lambda x, w: F.conv1d(x, w).cumsum(2)[..., 1:4]),
        ),
    ),
    "zero-product": Tried(
        (
            Instance("elements", ("b n",), lambda x: x * torch.zeros_like(x)),
            Instance("broadcast", ("b n", "n"), lambda x, y: torch.zeros_like(y) * x),
            Instance("a number", ("b n",), lambda x: torch.zeros_like(x) * 3.5),
            Instance("matrices", ("2 n 3", "2 3 4"), lambda x, y: x @ torch.zeros_like(y)),
            Instance("einsum", ("2 n", "2 n 4"),
                     lambda x, y: torch.einsum("bs,bsd->bd", x, torch.zeros_like(y))),
        ),
        (
            Instance("ones", ("b n",), lambda x: x * torch.full_like(x, 2)),
            Instance("infinity inside", ("b n",),
                     lambda x: torch.zeros_like(x) * x.masked_fill(x > 0, float("inf")).exp()
                     * torch.full_like(x, 2)),
            Instance("an infinite constant", ("b n",),
                     lambda x: torch.zeros_like(x) * torch.where(
                         x > 0, torch.full_like(x, float("inf")), x)),
            Instance("one over zero", ("b n",),
                     lambda x: torch.zeros_like(x) * (x / torch.zeros_like(x))),
            Instance("a tensor that has an infinity", ("b 3",),
                     lambda x: torch.zeros_like(x) * INFINITE, {"b": 1}),
        ),
    ),
    "lowest": Tried(
        (
            Instance("maximum", ("b n",),
                     lambda x: torch.maximum(x, torch.full_like(x, float("-inf")))),
            Instance("minimum", ("b n",),
                     lambda x: torch.minimum(torch.full_like(x, float("inf")), x)),
        ),
        (
            Instance("a low number", ("b n",), lambda x: torch.maximum(x, torch.full_like(x, -9))),
            Instance("the other infinity", ("b n",),
                     lambda x: torch.maximum(x, torch.full_like(x, float("inf")))),
            Instance("broadcast", ("b n", "3 1 1"),
                     lambda x, y: torch.maximum(x, torch.full_like(y, float("-inf")))),
        ),
    ),
    "lowest-finite": Tried(
        (
            Instance("maximum", ("b n",), lambda x: torch.maximum(
                x, torch.full_like(x, torch.finfo(torch.float32).min))),
        ),
        (
            Instance("nearly the lowest", ("b n",),
                     lambda x: torch.maximum(x, torch.full_like(x, -1e38))),
        ),
    ),
    "infinity": Tried(
        (
            Instance("less a number", ("b n",), lambda x: torch.full_like(x, float("-inf")) - x),
            Instance("from a number", ("b n",), lambda x: x - torch.full_like(x, float("-inf"))),
            Instance("and a number", ("b n",), lambda x: x + torch.full_like(x, float("inf"))),
        ),
        (
            Instance("less infinity", ("b n",), lambda x: torch.full_like(x, float("inf"))
                     - torch.where(x > 0, torch.full_like(x, float("inf")), x)),
            Instance("a large number", ("b n",), lambda x: torch.full_like(x, -1e38) - x),
        ),
    ),
    "folded-function": Tried(
        (
            Instance("exp", ("b n",), lambda x: torch.full_like(x, float("-inf")).exp()),
            Instance("sigmoid", ("b n",), lambda x: torch.zeros_like(x).sigmoid()),
            Instance("relu", ("b n",), lambda x: torch.full_like(x, -2).relu()),
        ),
        (Instance("of an input", ("b n",), lambda x: x.exp()),),
    ),
}  # fmt: skip
