"""Instances of the laws of copies, casts, neutral numbers and spellings."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cachefree.terms import Table, Term

from .equations import Instance
from .families import Family, Tried

aten = torch.ops.aten
WIDER = (
    ("float16", "float32", "bfloat16"),
    ("bfloat16", "float32", "float16"),
    ("float32", "float64", "float16"),
    ("float32", "float64", "int64"),
    ("float16", "float32", "int8"),
    ("int32", "float64", "float16"),
    ("int32", "int64", "int8"),
    ("int16", "float32", "uint8"),
    ("uint8", "int16", "int8"),
    ("int8", "float32", "bool"),
    ("bool", "float16", "int64"),
    ("bool", "uint8", "float32"),
)


def in_training(op: object, probability: float = 0.5) -> object:
    def build(table: Table, x: Term) -> Term:
        return table.like(x, op, (x, probability, True))

    return build


def applied(op: object, *rest: object, dtype: torch.dtype | None = None) -> object:
    """An operator on all inputs, as a term: for spellings that torch rewrites while it traces."""

    def build(table: Table, *inputs: Term) -> Term:
        first = inputs[0]
        return table.make(op, (*inputs, *rest), first.shape, dtype or first.dtype, first.device)

    return build


def expand_copy(lead: int) -> object:
    def build(table: Table, x: Term) -> Term:
        shape = (lead, *x.sizes) if lead else x.sizes
        return table.like(x, aten.expand_copy.default, (x, shape, False), shape)

    return build


def cast_twice(wide: str, target: str) -> object:
    return lambda x: x.to(getattr(torch, wide)).to(getattr(torch, target))


IDENTITY: Family = {
    "copy": Tried(
        (
            Instance("clone", ("b n",), lambda x: x.clone()),
            Instance("contiguous", ("b n",), applied(aten.contiguous.default), is_term=True),
            Instance("detach", ("b n",), lambda x: x.detach()),
            Instance("positive", ("b n",), lambda x: +x),
            Instance("alias", ("b n",), lambda x: aten.alias.default(x)),
            Instance("expand_copy of its own shape", ("b 3",), expand_copy(0), is_term=True),
        ),
        (
            Instance("expand_copy to a larger shape", ("b 3",), expand_copy(2), is_term=True),
            Instance("negative", ("b n",), lambda x: -x),
        ),
    ),
    "evaluated-dropout": Tried(
        (
            Instance("not in training", ("b n",), lambda x: F.dropout(x, 0.5, training=False)),
            Instance("probability 0", ("b n",), lambda x: F.dropout(x, 0.0, training=True)),
            Instance("whole features", ("b n",), lambda x: F.dropout1d(
                F.alpha_dropout(x, 0.5, training=False), 0.5, training=False)),
        ),
        (
            Instance("training", ("b n",), in_training(aten.dropout.default), is_term=True),
            Instance("alpha", ("b n",), in_training(aten.alpha_dropout.default), is_term=True),
        ),
    ),
    "cast": Tried(
        (
            Instance("its own dtype", ("b n",), lambda table, x: table.make(
                "cast", (x, x.dtype, x.device), x.shape, x.dtype, x.device), is_term=True),
            Instance("a copy", ("b n",), lambda x: x.to(torch.float32, copy=True)),
            Instance("half", ("b n",), lambda x: x.half()),
            *(Instance(f"{a} {b} {c}", (f"b n:{a}",), cast_twice(b, c)) for a, b, c in WIDER),
        ),
        (
            Instance("rounds", ("b n",), lambda x: x.clone() * 2),
            Instance("a cast that rounds, as a term", ("b n",), lambda table, x: table.make(
                "cast", (table.make("cast", (x, torch.float16, x.device), x.shape, torch.float16,
                                    x.device), x.dtype, x.device), x.shape, x.dtype, x.device),
                is_term=True),
            Instance("integers through float32 to fewer bits", ("b n:int16",), lambda table, x:
                     table.make("cast", (table.make("cast", (x, torch.float32, x.device), x.shape,
                                                    torch.float32, x.device), torch.int8, x.device),
                                x.shape, torch.int8, x.device), is_term=True),
            Instance("integers through float32", ("b n:int64",), lambda table, x: table.make(
                "cast", (table.make("cast", (x, torch.float32, x.device), x.shape, torch.float32,
                                    x.device), x.dtype, x.device), x.shape, x.dtype, x.device),
                is_term=True),
        ),
    ),
    "add-zero-integer": Tried(
        (
            Instance("x + 0", ("b n:int64",), lambda x: x + 0),
            Instance("0 + x", ("b n:int64",), lambda x: torch.zeros_like(x) + x),
            Instance("x - 0", ("b n:int32",), lambda x: x - 0),
            Instance("x + zeros", ("b n:int64",), lambda x: x + torch.zeros_like(x)),
        ),
        (
            Instance("0 - x", ("b n:int64",), lambda x: torch.zeros_like(x) - x),
            Instance("x + 1", ("b n:int64",), lambda x: x + 1),
            Instance("a float", ("b n",), lambda x: x + 0),
            Instance("0.0 makes a float", ("b n:int64",), lambda x: x + 0.0),
            Instance("zeros are wider", ("n:int64",), lambda x: x + x.new_zeros(2, 1)),
            Instance("zeros of another dtype", ("b n:int32",), lambda x: x + torch.zeros_like(
                x, dtype=torch.int64)),
            Instance("0 + 2x", ("b n:int64",), lambda x: torch.add(torch.zeros_like(x), x,
                                                                    alpha=2)),
        ),
    ),
    "add-zero-float": Tried(
        (
            Instance("x + 0.0", ("b n:float64",), lambda x: x + 0.0),
            Instance("0.0 + x", ("b n:float64",), lambda x: torch.zeros_like(x) + x),
            Instance("x - 0.0", ("b n:float64",), lambda x: x - 0.0),
        ),
        (
            Instance("0.0 - x", ("b n:float64",), lambda x: torch.zeros_like(x) - x),
            Instance("a tiny number", ("b n:float64",), lambda x: x + 1e-30),
            Instance("integers", ("b n:int64",), lambda x: x + 0),
            Instance("zeros are wider", ("n:float64",), lambda x: x + x.new_zeros(2, 1)),
            Instance("0.0 + 2x", ("b n:float64",), lambda x: torch.add(torch.zeros_like(x), x,
                                                                        alpha=2)),
        ),
    ),
    "times-one": Tried(
        (
            Instance("x * 1", ("b n",), lambda x: x * 1),
            Instance("1 * x", ("b n",), lambda x: torch.ones_like(x) * x),
            Instance("x / 1", ("b n",), lambda x: x / 1),
            Instance("x * 1.0 in half", ("b n:float16",), lambda x: x * 1.0),
            Instance("integers", ("b n:int64",), lambda x: x * 1),
        ),
        (
            Instance("1 / x", ("b n",), lambda x: torch.ones_like(x) / x),
            Instance("nearly 1", ("b n",), lambda x: x * 1.0000001),
            Instance("division makes a float", ("b n:int64",), lambda x: x / 1),
            Instance("1.0 makes a float", ("b n:int64",), lambda x: x * 1.0),
            Instance("ones are wider", ("n",), lambda x: x * x.new_ones(2, 1)),
            Instance("complex numbers", ("b n 2",), lambda x: torch.view_as_real(
                     torch.view_as_complex(x) * 1)),
            Instance("rounded division", ("b n",), lambda x: torch.div(x, 1,
                                                                        rounding_mode="floor")),
        ),
    ),
    "commute": Tried(
        (
            Instance("sum", ("b n", "b n"), lambda x, y: y + x),
            Instance("product", ("b n", "b n"), lambda x, y: y * x),
            Instance("a wider operand", ("n", "b n"), lambda x, y: y + x),
            Instance("two dtypes", ("b n", "b n:float64"), lambda x, y: y * x),
            Instance("equal", ("b n", "b n"), lambda x, y: y == x),
            Instance("and", ("b n:bool", "b n:bool"), lambda x, y: torch.logical_and(y, x)),
        ),
        (
            Instance("difference", ("b n", "b n"), lambda x, y: y - x),
            Instance("quotient", ("b n", "b n"), lambda x, y: y / x),
            Instance("a multiple", ("b n", "b n"), lambda x, y: torch.add(y, x, alpha=2)),
            Instance("matrices", ("n n", "n n"), lambda x, y: y @ x),
        ),
    ),
    "spelling": Tried(
        (
            Instance("true_divide", ("b n", "b n"), applied(aten.true_divide.Tensor),
                     is_term=True),
            Instance("subtract", ("b n", "b n"), applied(aten.subtract.Tensor, 1), is_term=True),
            Instance("multiply", ("b n", "b n"), applied(aten.multiply.Tensor), is_term=True),
            Instance("or", ("b n:bool", "b n:bool"), applied(aten.__or__.Tensor), is_term=True),
            Instance("and", ("b n:bool", "b n:bool"), applied(aten.__and__.Tensor), is_term=True),
            Instance("xor", ("b n:bool", "b n:bool"), applied(aten.__xor__.Tensor), is_term=True),
            *(Instance(name, ("b n", "b n"),
                       applied(getattr(aten, name).Tensor, dtype=torch.bool), is_term=True)
              for name in ("less", "less_equal", "greater", "greater_equal", "not_equal")),
        ),
        (Instance("floor_divide", ("b n", "b n"), lambda x, y: x // y),),
    ),
    "mirror": Tried(
        (
            Instance("greater", ("b n", "b n"), lambda x, y: x > y),
            Instance("greater or equal", ("n", "b n"), lambda x, y: x >= y),
        ),
        (
            Instance("less", ("b n", "b n"), lambda x, y: x < y),
            Instance("than a number", ("b n",), lambda x: x > 1),
        ),
    ),
    "not": Tried(
        (Instance("Booleans", ("b n:bool",), lambda x: ~x),),
        (Instance("bits of integers", ("b n:int64",), lambda x: ~x),),
    ),
    "not-not": Tried(
        (Instance("Booleans", ("b n:bool",), lambda x: ~~x),),
        (
            Instance("truth of numbers", ("b n",), lambda x: x.logical_not().logical_not()),
            Instance("once", ("b n:bool",), lambda x: ~x),
        ),
    ),
}  # fmt: skip
