"""Instances of the laws of attention and of fused projections."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .equations import Instance
from .families import Family, Tried

HEADS = ("b 2 n 4:float64", "b 2 p 4:float64", "b 2 p 4:float64")
SQUARE = ("b 2 n 4:float64", "b 2 n 4:float64", "b 2 n 4:float64")

LOWEST = torch.finfo(torch.float64).min


def _hidden(q: torch.Tensor, k: torch.Tensor, diagonal: int, number: float) -> torch.Tensor:
    """Zeros below a diagonal, a number from it on."""
    return torch.full((q.shape[-2], k.shape[-2]), number, dtype=q.dtype).triu(diagonal)


ATTENTION: Family = {
    "lowest-hides": Tried(
        (
            Instance("a triangle", HEADS, lambda q, k, v: F.scaled_dot_product_attention(
                q, k, v, _hidden(q, k, 1, LOWEST)), {"p": 1, "n": 1}),
            Instance("a triangle of infinities", SQUARE, lambda q, k, v:
                     F.scaled_dot_product_attention(q, k, v, _hidden(q, k, 1, -torch.inf)),
                     {"n": 1}),
            Instance("nothing hidden", HEADS, lambda q, k, v: F.scaled_dot_product_attention(
                q, k, v, q.new_zeros(q.shape[-2], k.shape[-2])), {"p": 1, "n": 1}),
        ),
        (
            Instance("a row that sees nothing", SQUARE, lambda q, k, v:
                     F.scaled_dot_product_attention(q, k, v, _hidden(q, k, 0, LOWEST)), {"n": 1}),
            Instance("first rows that see nothing", HEADS, lambda q, k, v:
                     F.scaled_dot_product_attention(q, k, v, _hidden(
                         q, k, k.shape[-2] - q.shape[-2] + 1, LOWEST)), {"p": 1, "n": 1}),
            Instance("a number that is not the lowest", SQUARE, lambda q, k, v:
                     F.scaled_dot_product_attention(q, k, v, _hidden(q, k, 1, -1e4)), {"n": 1}),
            Instance("a mask that is given", (*HEADS, "n p:float64"), lambda q, k, v, m:
                     F.scaled_dot_product_attention(q, k, v, m), {"p": 1, "n": 1}),
        ),
    ),
    "attention-mask": Tried(
        (
            Instance("no mask", HEADS, F.scaled_dot_product_attention, {"p": 1, "n": 1}),
            Instance("causal, square", SQUARE, lambda q, k, v: F.scaled_dot_product_attention(
                q, k, v, is_causal=True), {"n": 1}),
            Instance("causal, more keys", HEADS, lambda q, k, v: F.scaled_dot_product_attention(
                q, k, v, is_causal=True), {"p": 1, "n": 1}),
            Instance("a mask without heads", (*HEADS, "n p:bool"),
                     lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m | m.any()),
                     {"p": 1, "n": 1}),
            Instance("a mask of one row", (*HEADS, "1 1 1 p:bool"),
                     lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m),
                     {"p": 1, "n": 1}),
        ),
        (
            Instance("keys of a wider batch",
                     ("1 2 n 4:float64", "b 2 p 4:float64", "b 2 p 4:float64"),
                     F.scaled_dot_product_attention, {"b": 2, "p": 1, "n": 1}),
            Instance("keys of a wider batch, and causal",
                     ("1 2 n 4:float64", "b 2 p 4:float64", "b 2 p 4:float64"),
                     lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
                     {"b": 2, "p": 1, "n": 1}),
            Instance("a mask of a wider batch",
                     ("1 2 n 4:float64", "1 2 p 4:float64", "1 2 p 4:float64", "b 1 1 p:bool"),
                     lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m),
                     {"b": 2, "p": 1, "n": 1}),
            Instance("a full mask", (*HEADS, "b 2 n p:bool"),
                     lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m),
                     {"b": 1, "p": 1, "n": 1}),
        ),
    ),
    "grouped-attention": Tried(
        (
            Instance("two heads a group",
                     ("b 4 n 3:float64", "b 2 p 3:float64", "b 2 p 3:float64"),
                     lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
                     {"p": 1, "n": 1}),
            Instance("one group",
                     ("b 4 n 3:float64", "b 1 p 3:float64", "b 1 p 3:float64"),
                     lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
                     {"p": 1, "n": 1}),
        ),
        (
            Instance("heads that are broadcast",
                     ("b 4 n 3:float64", "b 1 p 3:float64", "b 1 p 3:float64"),
                     F.scaled_dot_product_attention, {"p": 1, "n": 1}),
        ),
    ),
    "packed-heads": Tried(
        (
            Instance("two heads a group, one mask",
                     ("b 4 1 3:float64", "b 2 p 3:float64", "b 2 p 3:float64", "b 1 1 p:bool"),
                     lambda q, k, v, m: F.scaled_dot_product_attention(
                         q.reshape(q.shape[0], 2, 2, 3), k, v, m),
                     {"b": 1, "p": 1}),
            Instance("a mask for each head",
                     ("b 4 1 3:float64", "b 2 p 3:float64", "b 2 p 3:float64", "b 4 1 p:bool"),
                     lambda q, k, v, m: F.scaled_dot_product_attention(
                         q.reshape(q.shape[0], 2, 2, 3), k, v,
                         m.reshape(m.shape[0], 2, 2, m.shape[3])),
                     {"b": 1, "p": 1}),
        ),
        (
            Instance("several tokens",
                     ("b 2 n 3:float64", "b 2 p 3:float64", "b 2 p 3:float64", "b 1 n p:bool"),
                     F.scaled_dot_product_attention, {"b": 1, "p": 1, "n": 1}),
        ),
    ),
}  # fmt: skip

LINEAR: Family = {
    "slice-of-permute": Tried(
        (
            Instance("rows", ("b n 5",), lambda x: x.transpose(1, 2)[:, 1:4]),
            Instance("of a cycle", ("b n 5",), lambda x: x.permute(2, 0, 1)[2:4]),
            Instance("of a dimension in front", ("5 b n",), lambda x: x.permute(1, 0, 2)[:, 1:4]
                     .unsqueeze(0).permute(0, 2, 1, 3)[:, :2].sum()),
        ),
        (Instance("of the tensor itself", ("2 3 5",), lambda x: x[:, :, 1:4].transpose(1, 2)),),
    ),
    "slice-of-reshape": Tried(
        (
            Instance("an entry of a split dimension", ("b n 12",),
                     lambda x: x.unflatten(-1, (3, 4))[:, :, 1]),
            Instance("an entry of three parts", ("b n 12",),
                     lambda x: x.unflatten(-1, (3, 2, 2))[:, :, 2]),
            Instance("several entries", ("b n 12",),
                     lambda x: x.unflatten(-1, (3, 4))[:, :, 1:3]),
        ),
        (
            Instance("the inner dimension", ("2 3 12",),
                     lambda x: x.unflatten(-1, (3, 4))[..., 1:3]),
            Instance("of a flattening", ("2 3 4",), lambda x: x.flatten(1)[:, 2:5]),
        ),
    ),
    "slice-of-linear": Tried(
        (
            Instance("outputs", ("b n 4:float64", "6 4:float64", "6:float64"),
                     lambda x, w, c: F.linear(x, w, c)[..., 2:5]),
            Instance("outputs without a bias", ("b n 4:float64", "6 4:float64"),
                     lambda x, w: F.linear(x, w)[..., 2:5]),
            Instance("rows", ("b 7 4:float64", "6 4:float64", "6:float64"),
                     lambda x, w, c: F.linear(x, w, c)[:, 2:5]),
        ),
        (
            Instance("of a bilinear form", ("5 4:float64", "4 6:float64"),
                     lambda x, w: (x @ w)[:, 2:5]),
        ),
    ),
}  # fmt: skip
