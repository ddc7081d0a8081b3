"""Instances of the laws of views, permutations, broadcasts, splits and slices."""

from __future__ import annotations

import torch

from cachefree.sizes import size_symbol
from cachefree.terms import Table, Term

from .equations import Instance
from .families import Family, Tried

aten = torch.ops.aten


def select_of_unknown_sign(table: Table, x: Term) -> Term:
    index = size_symbol("n") - 2
    return table.like(x, aten.select.int, (x, 1, index), (x.sizes[0],))


SHAPE: Family = {
    "only-row": Tried(
        (
            Instance("into the only row", ("b 1 n", "b n"),
                     lambda x, y: torch.select_scatter(x, y, 1, 0)),
            Instance("counted from the end", ("1 n", "n"),
                     lambda x, y: torch.select_scatter(x, y, 0, -1)),
        ),
        (
            Instance("one of several", ("b 2 n", "b n"),
                     lambda x, y: torch.select_scatter(x, y, 1, 0)),
            Instance("of another dtype", ("1 n", "n"),
                     lambda x, y: torch.select_scatter(x.double(), y, 0, 0)),
        ),
    ),
    "every-row": Tried(
        (
            Instance("all of it", ("b n", "b n"),
                     lambda x, y: torch.slice_scatter(x, y, 1, 0, x.shape[1])),
            Instance("no bounds", ("b n", "b n"), torch.slice_scatter),
        ),
        (
            Instance("all but one row", ("b n", "b n"),
                     lambda x, y: torch.slice_scatter(x, y[:, 1:], 1, 1)),
            Instance("every other row", ("b 4", "b 2"),
                     lambda x, y: torch.slice_scatter(x, y, 1, 0, 4, 2)),
            Instance("of another dtype", ("b n", "b n"),
                     lambda x, y: torch.slice_scatter(x.double(), y)),
        ),
    ),
    "view": Tried(
        (
            Instance("view", ("b n 4",), lambda x: x.view(*x.shape[:2], 2, 2)),
            Instance("flatten", ("b n 4",), lambda x: x.flatten(1)),
            Instance("unflatten", ("b n 4",), lambda x: x.unflatten(-1, (2, 2))),
            Instance("unsqueeze", ("b n",), lambda x: x.unsqueeze(1)),
            Instance("squeeze", ("b 1 n",), lambda x: x.squeeze(1)),
            Instance("reshape", ("b n 4",), lambda x: x.reshape(x.shape[0], x.shape[1] * 4)),
            Instance("view_as", ("b n 4", "b n 2 2"), lambda x, y: x.view_as(y)),
        ),
        (
            Instance("transpose", ("b n",), lambda x: x.t()),
            Instance("expand", ("1 n",), lambda x: x.expand(3, -1)),
        ),
    ),
    "reshape": Tried(
        (
            Instance("its own shape", ("b n",), lambda x: x.reshape(x.shape)),
            Instance("twice", ("b n 4",), lambda x: x.flatten(1).view(*x.shape[:2], 2, 2)),
            Instance("of ones", ("b n",), lambda x: torch.ones_like(x).flatten()),
            Instance("dimensions of one moved", ("b n",), lambda x: x[:, None].transpose(1, 2)
                     .reshape(x.shape)),
        ),
        (
            Instance("after a transposition", ("b n",), lambda x: x.t().reshape(-1)),
            Instance("one flattening", ("b n 4",), lambda x: x.flatten(1)),
        ),
    ),
    "transpose": Tried(
        (
            Instance("transpose", ("b n 4",), lambda x: x.transpose(1, 2)),
            Instance("t", ("b n",), lambda x: x.t()),
            Instance("mT", ("b n 4",), lambda x: x.mT),
            Instance("permute", ("b n 4",), lambda x: x.permute(2, 0, 1)),
            Instance("negative dimensions", ("b n 4",), lambda x: x.permute(-1, 0, -2)),
            Instance("movedim", ("b n 4",), lambda x: x.movedim(0, -1)),
            Instance("swapaxes", ("b n 4",), lambda x: x.swapaxes(0, 2)),
        ),
        (
            Instance("several dimensions moved", ("b n",), lambda x: x.flip(0)),
            Instance("conjugated", ("b n 2",), lambda x: torch.view_as_real(
                     torch.view_as_complex(x).mH.resolve_conj())),
        ),
    ),
    "permute": Tried(
        (
            Instance("there and back", ("b n 4",), lambda x: x.transpose(1, 2).transpose(1, 2)),
            Instance("a cycle", ("b n 4",), lambda x: x.permute(1, 2, 0).permute(1, 2, 0)),
            Instance("another after it", ("b n 4",), lambda x: x.permute(2, 0, 1).transpose(0, 1)),
            Instance("nothing moves", ("b n 4",), lambda x: x.permute(0, 1, 2)),
            Instance("of ones", ("b n",), lambda x: torch.ones_like(x).t()),
            Instance("a dimension of one", ("b 1 n",), lambda x: x.permute(0, 2, 1)),
        ),
        (Instance("once", ("b 2 3",), lambda x: x.permute(1, 0, 2), {"b": 2}),),
    ),
    "broadcast": Tried(
        (
            Instance("expand", ("b 1",), lambda x: x.expand(-1, 3)),
            Instance("a new dimension", ("n",), lambda x: x.expand(2, -1)),
            Instance("expand_as", ("1 n", "b n"), lambda x, y: x.expand_as(y)),
            Instance("broadcast_to", ("n", "b n"), lambda x, y: x.broadcast_to(y.shape)),
        ),
        (Instance("repeat", ("n",), lambda x: x.repeat(2, 1)),),
    ),
    "repeat": Tried(
        (
            Instance("of one row", ("1 n",), lambda x: x.repeat(3, 1)),
            Instance("of a new dimension", ("b n",), lambda x: x.repeat(2, 1, 1)),
            Instance("as often as there are rows", ("b n", "1 4"),
                     lambda x, y: y.repeat(x.shape[0], 1)),
        ),
        (
            Instance("of two rows", ("2 n",), lambda x: x.repeat(3, 1)),
            Instance("of as many as there are", ("b 1",), lambda x: x.repeat(2, 3), {"b": 1}),
        ),
    ),
    "expand": Tried(
        (
            Instance("its own shape", ("b n",), lambda x: x.expand(x.shape)),
            Instance("twice", ("n",), lambda x: x.expand(2, -1).expand(3, -1, -1)),
            Instance("of ones", ("1 n",), lambda x: torch.ones_like(x).expand(4, -1)),
        ),
        (Instance("once", ("1 n",), lambda x: x.expand(4, -1)),),
    ),
    "split": Tried(
        (
            Instance("split", ("b 6",), lambda x: x.split(2, dim=1)[1]),
            Instance("a shorter last part", ("b 7",), lambda x: x.split(3, dim=-1)[2]),
            Instance("parts of given sizes", ("b 6",), lambda x: x.split([1, 5], dim=1)[1]),
            Instance("chunk", ("b 6",), lambda x: x.chunk(3, -1)[2]),
            Instance("unequal chunks", ("b 7",), lambda x: x.chunk(3, -1)[1]),
            Instance("tensor_split", ("b 7",), lambda x: x.tensor_split(3, dim=1)[1]),
            Instance("unbind", ("3 b n",), lambda x: x.unbind(0)[2]),
            Instance("at a size", ("b n", "b p"), lambda x, y: torch.cat((x, y), 1).split(
                [x.shape[1], y.shape[1]], 1)[1]),
        ),
        (Instance("another operator's results", ("b 6",), lambda x: x.topk(2)[0]),),
    ),
    "clamp-slice": Tried(
        (
            Instance("the last", ("b n",), lambda x: x[:, -2:]),
            Instance("all but the last", ("b n",), lambda x: x[:, :-2]),
            Instance("beyond the end", ("b 4",), lambda x: x[:, 1:9]),
            Instance("the other way round", ("b 4",), lambda x: x[:, 3:1]),
            Instance("from a size", ("b n", "b p"), lambda x, y: torch.cat((x, y), 1)[
                :, x.shape[1]:]),
            Instance("more than there are", ("b n",), lambda x: x[:, -100:]),
        ),
        (Instance("every other", ("4",), lambda x: x[::2]),),
    ),
    "slice": Tried(
        (
            Instance("all of it", ("b n",), lambda x: x[:, : x.shape[1]]),
            Instance("of a slice", ("b 8",), lambda x: x[:, 2:7][:, 1:3]),
            Instance("of ones", ("b 8",), lambda x: torch.ones_like(x)[:, 2:5]),
            Instance("of an expanded tensor", ("b 8",), lambda x: x.expand(3, -1, -1)[..., 2:5]),
            Instance("of the expanded dimension", ("1 8",), lambda x: x.expand(6, -1)[2:5]),
        ),
        (
            Instance("all but one", ("8",), lambda x: x[:7]),
            Instance("of a slice elsewhere", ("8 9",), lambda x: x[1:3][:, 1:3]),
        ),
    ),
    "select": Tried(
        (
            Instance("the first", ("b 5 n",), lambda x: x[:, 0]),
            Instance("the last", ("b 5 n",), lambda x: x[:, -1]),
            Instance("the last of many", ("b n",), lambda x: x[:, -1], {"n": 1}),
        ),
        (
            Instance("from either end", ("b n",), select_of_unknown_sign, {"n": 1},
                     is_term=True),
        ),
    ),
    "no-elements": Tried(
        (
            Instance("a product with nothing", ("b n", "n 3"), lambda x, y: x @ y),
            Instance("an elementwise operator", ("b n",), lambda x: x.exp()),
        ),
        (Instance("a sum over nothing", ("3 n",), lambda x: x.sum(1), {"n": 1}),),
    ),
}  # fmt: skip
