"""Instances of the laws of constants, ranges and masks."""

from __future__ import annotations

import torch

from cachefree.sizes import size_symbol
from cachefree.terms import Table, Term

from .equations import Instance
from .families import Family, Tried

aten = torch.ops.aten


def range_to_a_fraction(table: Table, x: Term) -> Term:
    """`arange(0, n / 2, 1, dtype=int64)`, whose length is rounded up."""
    from torch.utils._sympy.functions import CeilToInt

    end = size_symbol("n") / 2
    args = (0, end, 1, torch.int64, None, x.device, None)
    return table.make(aten.arange.start_step, args, (CeilToInt(end),), torch.int64, x.device)


def constant(*numbers: float, dtype: torch.dtype = torch.float32) -> object:
    def build(table: Table, x: Term) -> Term:
        return table.constant(torch.tensor(numbers, dtype=dtype))

    return build


SEQUENCE: Family = {
    "fill": Tried(
        (
            Instance("zeros", ("b n",), lambda x: torch.zeros(x.shape)),
            Instance("ones_like", ("b n:int64",), lambda x: torch.ones_like(x)),
            Instance("new_zeros", ("b n:float16",), lambda x: x.new_zeros(x.shape[1])),
            Instance("full", ("b n",), lambda x: torch.full((x.shape[0],), 0.1)),
            Instance("full_like", ("b n:float16",), lambda x: torch.full_like(x, 0.1)),
            Instance("new_full", ("b n",), lambda x: x.new_full((x.shape[1], 2), -float("inf"))),
            Instance("fill", ("b n:int32",), lambda x: torch.fill(x, 7)),
        ),
        (
            Instance("filled with a number that is read", ("b n", ""),
                     lambda x, y: torch.fill(x, y)),
            Instance("empty", ("b n",), lambda x: x * 0, {"b": 1, "n": 1}),
            Instance("whether a size is zero", ("b n",), lambda x: torch.full(
                     (2,), x.shape[1] - 1, dtype=torch.bool), {"n": 1}),
            Instance("a size in eight bits", ("b n",), lambda x: torch.full(
                     (2,), x.shape[1], dtype=torch.int8)),
        ),
    ),
    "full": Tried(
        (
            Instance("rounded to half", ("b n:float16",), lambda x: torch.full_like(x, 0.1)),
            Instance("a truth value", ("b n:bool",), lambda x: torch.full_like(x, 3)),
            Instance("an integer for a float", ("b n",), lambda x: torch.full_like(x, 2)),
            Instance("no elements", ("b n",), lambda x: torch.full_like(x, 2.5)),
        ),
        (
            Instance("−0.0 is not 0.0", ("b n",), lambda x: torch.full_like(x, -0.0),
                     {"b": 1, "n": 1}),
        ),
    ),
    "constant": Tried(
        (
            Instance("one number", ("n",), constant(2.5), is_term=True),
            Instance("several equal numbers", ("n",), constant(2.5, 2.5), is_term=True),
            Instance("NaN", ("n",), constant(float("nan")), is_term=True),
            Instance("−0.0", ("n",), constant(-0.0), is_term=True),
            Instance("a truth value", ("n",), constant(True, dtype=torch.bool), is_term=True),
        ),
        (
            Instance("two numbers", ("n",), constant(2.5, 2.25), is_term=True),
            Instance("0.0 and −0.0", ("n",), constant(0.0, -0.0), is_term=True),
        ),
    ),
    "range": Tried(
        (
            Instance("to a size", ("n",), lambda x: torch.arange(x.shape[0])),
            Instance("from a size", ("p", "n"), lambda x, y: torch.arange(
                x.shape[0], x.shape[0] + y.shape[0])),
            Instance("int32", ("n",), lambda x: torch.arange(x.shape[0], dtype=torch.int32)),
        ),
        (
            Instance("steps of two", ("n",), lambda x: torch.arange(0, x.shape[0], 2)),
            Instance("floats", ("n",), lambda x: torch.arange(x.shape[0], dtype=torch.float32)),
            Instance("to a fraction", ("n",), range_to_a_fraction, {"n": 1}, is_term=True),
        ),
    ),
    "shift-range": Tried(
        (
            Instance("plus a size", ("p", "n"), lambda x, y: torch.arange(y.shape[0])
                     + x.shape[0]),
            Instance("minus a number", ("n",), lambda x: torch.arange(x.shape[0]) - 3),
            Instance("as a column", ("n",), lambda x: torch.arange(x.shape[0])[:, None] + 2),
            Instance("a constant plus a range", ("n",), lambda x: torch.full((x.shape[0],), 4)
                     + torch.arange(x.shape[0])),
        ),
        (
            Instance("a number minus a range", ("n",), lambda x: 3 - torch.arange(x.shape[0])),
            Instance("a constant minus a range", ("n",), lambda x: torch.full((x.shape[0],), 4)
                     - torch.arange(x.shape[0])),
            Instance("a fraction", ("n",), lambda x: torch.arange(x.shape[0]) + 0.5),
            Instance("twice the offset", ("n",), lambda x: torch.add(
                torch.arange(x.shape[0]), 3, alpha=2)),
            Instance("a tensor", ("n:int64",), lambda x: torch.arange(x.shape[0]) + x),
        ),
    ),
    "slice-of-range": Tried(
        (
            Instance("from its middle", ("n",), lambda x: torch.arange(x.shape[0] + 4)[2:5]),
            Instance("its end", ("p", "n"), lambda x, y: torch.arange(
                x.shape[0] + y.shape[0])[x.shape[0]:]),
        ),
        (Instance("every other", ("n",), lambda x: torch.arange(x.shape[0] + 4)[::2]),),
    ),
    "constant-folding": Tried(
        (
            Instance("a comparison", ("b n",), lambda x: torch.ones_like(x) > 0.5),
            Instance("not", ("b n:bool",), lambda x: ~torch.ones_like(x)),
            Instance("a cast", ("b n",), lambda x: torch.full_like(x, 2.7).long()),
            Instance("NaN is not equal", ("b n",), lambda x: torch.full_like(x, float("nan"))
                     == float("nan")),
        ),
        (
            Instance("a size", ("n",), lambda x: torch.full((2,), x.shape[0]) > 3, {"n": 1}),
            Instance("a tensor", ("b n",), lambda x: x > 0.5, {"b": 1, "n": 1}),
            Instance("a cast of what no integer is near", ("b n",),
                     lambda x: torch.full_like(x, float("inf")).int(), {"b": 1, "n": 1}),
        ),
    ),
}  # fmt: skip

MASKS: Family = {
    "where": Tried(
        (
            Instance("true", ("b n", "b n"), lambda x, y: torch.where(
                torch.ones_like(x, dtype=torch.bool), x, y)),
            Instance("false", ("b n", "b n"), lambda x, y: torch.where(
                torch.zeros_like(x, dtype=torch.bool), x, y)),
            Instance("a wider choice", ("n", "b n"), lambda x, y: torch.where(
                torch.ones_like(y, dtype=torch.bool), x, y)),
        ),
        (
            Instance("a mask", ("b n:bool", "b n", "b n"), torch.where, {"b": 1, "n": 1}),
            Instance("two dtypes", ("2 n", "2 n:float64"), lambda x, y: torch.where(
                torch.ones_like(x, dtype=torch.bool), x, y), {"n": 1}),
        ),
    ),
    "where-number": Tried(
        (
            Instance("a number instead", ("b n:bool", "b n"), lambda m, x: torch.where(
                m, x, -float("inf"))),
            Instance("a number first", ("b n:bool", "b n"), lambda m, x: torch.where(m, 0.0, x)),
        ),
        (
            Instance("the number decides the dtype", ("b n:bool", "b n:int64"),
                     lambda m, x: torch.where(m, x, 0.5)),
        ),
    ),
    "fill-nothing": Tried(
        (
            Instance("false", ("b n",), lambda x: x.masked_fill(
                torch.zeros_like(x, dtype=torch.bool), 7.0)),
            Instance("a narrower mask", ("b n",), lambda x: x.masked_fill(
                torch.zeros(x.shape[1], dtype=torch.bool), 7.0)),
        ),
        (
            Instance("true", ("b n",), lambda x: x.masked_fill(
                torch.ones_like(x, dtype=torch.bool), 7.0), {"b": 1, "n": 1}),
            Instance("a mask", ("b n", "b n:bool"), lambda x, m: x.masked_fill(m, 0.0),
                     {"b": 1, "n": 1}),
        ),
    ),
    "neutral-truth": Tried(
        (
            Instance("and true", ("b n:bool",), lambda x: x & torch.ones_like(x)),
            Instance("or false", ("b n:bool",), lambda x: torch.zeros_like(x) | x),
            Instance("and false", ("b n:bool",), lambda x: x & torch.zeros_like(x)),
            Instance("or true", ("b n:bool",), lambda x: torch.logical_or(x, torch.ones_like(x))),
        ),
        (
            Instance("bits", ("b n:int64",), lambda x: x & torch.ones_like(x),
                     {"b": 1, "n": 1}),
            Instance("truth of numbers", ("b n",), lambda x: torch.logical_and(
                x, torch.ones_like(x, dtype=torch.bool)), {"b": 1, "n": 1}),
            Instance("a wider truth", ("n:bool",), lambda x: x & x.new_ones(2, 1), {"n": 1}),
            Instance("exclusive or", ("b n:bool",), lambda x: x ^ torch.ones_like(x),
                     {"b": 1, "n": 1}),
        ),
    ),
    "mask-nothing": Tried(
        (
            Instance("a triangle of one row", ("b n",), lambda x: x + torch.triu(
                torch.full((1, 1), -7.0), 1)),
            Instance("the other side of a triangle", ("b n",), lambda x: x + torch.tril(
                torch.full((1, 1), -float("inf")), -1)),
            Instance("the mask first", ("b n",), lambda x: torch.where(
                torch.arange(x.shape[1]) < 0, -float("inf"), 0.0) + x),
        ),
        (
            Instance("a triangle of rows", ("n n",), lambda x: x + torch.triu(
                torch.full((x.shape[0], x.shape[0]), -7.0), 1), {"n": 2}),
            Instance("filled at the last", ("b n",), lambda x: x + torch.zeros(
                x.shape[1]).masked_fill(torch.arange(x.shape[1]) > x.shape[1] - 2, 1.0),
                {"b": 1, "n": 1}),
            Instance("scaled", ("b n",), lambda x: torch.add(
                torch.triu(torch.full((1, 1), -7.0), 1), x, alpha=2.0), {"b": 1, "n": 1}),
            Instance("a wider mask", ("n",), lambda x: x + torch.triu(
                torch.full((2, 1), 7.0), 1), {"n": 1}),
            Instance("of another dtype", ("b n",), lambda x: x.double() + (x.int() + torch.triu(
                torch.full((1, 1), 7.0), 1))),
        ),
    ),
}  # fmt: skip
