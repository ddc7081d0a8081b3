"""Instances of the laws of concatenation, and of slices of it."""

from __future__ import annotations

import torch

from .equations import Instance
from .families import Family, Tried

JOIN: Family = {
    "concat": Tried(
        (
            Instance("cat", ("b p 4", "b n 4"), lambda x, y: torch.cat((x, y), 1)),
            Instance("concat", ("b p", "b n"), lambda x, y: torch.concat((x, y), dim=-1)),
            Instance("two dtypes", ("b p:float16", "b n"), lambda x, y: torch.cat((x, y), 1)),
        ),
        (Instance("a sum", ("b n", "b n"), lambda x, y: x + y),),
    ),
    "hstack": Tried(
        (
            Instance("matrices", ("b p", "b n"), lambda x, y: torch.hstack((x, y))),
            Instance("vectors", ("p", "n"), lambda x, y: torch.hstack((x, y))),
            Instance("vstack", ("p 4", "n 4"), lambda x, y: torch.vstack((x, y))),
        ),
        (Instance("vstack of vectors", ("n", "n"), lambda x, y: torch.vstack((x, y))),),
    ),
    "stack": Tried(
        (
            Instance("in front", ("b n", "b n"), lambda x, y: torch.stack((x, y))),
            Instance("at the end", ("b n", "b n"), lambda x, y: torch.stack((x, y), -1)),
            Instance("numbers", ("b n",), lambda x: torch.stack((x, x, x), 1)),
        ),
        (Instance("a join", ("b n", "b n"), lambda x, y: torch.cat((x, y))),),
    ),
    "cat-empty": Tried(
        (
            Instance("an empty past", ("b p 4", "b n 4"), lambda x, y: torch.cat((x, y), 1)),
            Instance("an empty past of another dtype", ("b p:float16", "b n"),
                     lambda x, y: torch.cat((x, y), 1)),
            Instance("an empty past that decides the dtype", ("b p:float64", "b n"),
                     lambda x, y: torch.cat((x, y), 1)),
            Instance("joins of joins", ("b p", "b n", "b m"),
                     lambda x, y, z: torch.cat((x, torch.cat((y, z), 1)), 1)),
            Instance("an empty tensor of rank one", ("b n",),
                     lambda x: torch.cat((x.new_zeros(0), x), 1)),
            Instance("slices that meet", ("b 9",), lambda x: torch.cat((x[:, 1:4], x[:, 4:6]), 1)),
            Instance("ranges that meet", ("n", "p"), lambda x, y: torch.cat(
                (torch.arange(x.shape[0]), torch.arange(x.shape[0], x.shape[0] + y.shape[0])))),
            Instance("one row twice", ("b 1 4",), lambda x: torch.cat((x, x), 1)),
            Instance("one row many times", ("1 4",), lambda x: torch.cat(
                (x.expand(3, -1), x, x.expand(2, -1)))),
            Instance("rows of a vector", ("4",), lambda x: torch.cat(
                (x.expand(3, -1), x.expand(2, -1)))),
            Instance("equal constants", ("b n", "b p"), lambda x, y: torch.cat(
                (torch.ones_like(x), torch.ones_like(y)), 1)),
        ),
        (
            Instance("something past", ("b p", "b n"), lambda x, y: torch.cat((x, y), 1),
                     {"p": 1, "n": 1}),
            Instance("several rows twice", ("3 2",), lambda x: torch.cat((x, x), 1)),
            Instance("as many rows as there are", ("3 n",), lambda x: torch.cat((x, x), 1),
                     {"n": 1}),
            Instance("rows of two tensors", ("1 4", "1 4"), lambda x, y: torch.cat(
                (x.expand(3, -1), y.expand(2, -1)))),
            Instance("rows expanded along another axis", ("2 4",), lambda x: torch.cat(
                (x.expand(3, -1, -1), x.expand(3, -1, -1)), 1)),
            Instance("slices with a gap", ("3 9",), lambda x: torch.cat((x[:, 1:4], x[:, 5:6]), 1)),
            Instance("slices in another order", ("3 9",),
                     lambda x: torch.cat((x[:, 4:6], x[:, 1:4]), 1)),
            Instance("slices of two tensors", ("3 9", "3 9"),
                     lambda x, y: torch.cat((x[:, 1:4], y[:, 4:6]), 1)),
            Instance("a join along another axis", ("2 n", "2 n", "2 m"),
                     lambda x, y, z: torch.cat((torch.cat((x, y), 0), torch.cat((z, z), 0)), 1),
                     {"n": 1, "m": 1}),
            Instance("unequal constants", ("3 n",), lambda x: torch.cat(
                (torch.zeros_like(x), -torch.zeros_like(x)), 1), {"n": 1}),
            Instance("ranges that do not meet", ("n",), lambda x: torch.cat(
                (torch.arange(x.shape[0]), torch.arange(x.shape[0] + 1, x.shape[0] + 3))),
                {"n": 1}),
        ),
    ),
    "slice-of-cat": Tried(
        (
            Instance("the first part", ("b p", "b n"),
                     lambda x, y: torch.cat((x, y), 1)[:, : x.shape[1]]),
            Instance("the second part", ("b p", "b n"),
                     lambda x, y: torch.cat((x, y), 1)[:, x.shape[1]:]),
            Instance("the middle", ("b p", "b n", "b m"), lambda x, y, z: torch.cat((x, y, z), 1)[
                :, x.shape[1]: x.shape[1] + y.shape[1]]),
            Instance("along another axis", ("6 p", "6 n"),
                     lambda x, y: torch.cat((x, y), 1)[2:5]),
            Instance("of both parts", ("b 4", "b 5"), lambda x, y: torch.cat((x, y), 1)[:, 2:7]),
        ),
        (
            Instance("whether it reaches the first part is not known", ("b 2", "b n"),
                     lambda x, y: torch.cat((x, y), 1)[:, y.shape[1]:], {"n": 1}),
            Instance("where the parts meet is not known", ("b p", "b n"),
                     lambda x, y: torch.cat((x, y), 1)[:, 3:], {"p": 2, "n": 2}),
        ),
    ),
}  # fmt: skip
