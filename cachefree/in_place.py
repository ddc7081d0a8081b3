"""The value that an operator leaves in the tensor that it writes to."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.utils._python_dispatch import _disable_current_modes

from cachefree.errors import SourceLine
from cachefree.terms import Table, Term, replace_operands

__all__ = ["as_place", "dtype_of", "value_written", "without_the_write"]

aten = torch.ops.aten
_WITHOUT_THE_WRITE = {
    "__iand__": "bitwise_and",
    "__ior__": "bitwise_or",
    "__ixor__": "bitwise_xor",
}


def without_the_write(target: Any, name: str) -> Any:
    """The operator that computes what another one writes; None where there is none.

    Args:
        target: The operator that writes.
        name: Its name: ``"add_"``.
    """
    packet = getattr(aten, _WITHOUT_THE_WRITE.get(name, name[:-1]), None)
    names = () if packet is None else (target._overloadname, *packet.overloads())
    overloads = (getattr(packet, each, None) for each in names)
    return next((each for each in overloads if each and _takes(each) == _takes(target)), None)


def _takes(operator: Any) -> list[tuple[str, str]]:
    """Name and type of each argument."""
    return [(argument.name, str(argument.type)) for argument in operator._schema.arguments]


def dtype_of(operator: Any, args: tuple[Any, ...], before: Term) -> torch.dtype:
    """The dtype that an operator computes in, where its writing form keeps that of the tensor.

    Args:
        operator: The one that computes what is written.
        args: Its arguments.
        before: What was there.
    """
    assert before.dtype is not None
    if torch.Tag.pointwise not in operator.tags:
        return before.dtype  # these take tensors of one dtype
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        made = replace_operands(args, _stand_in)
        named = {argument.name for argument in operator._schema.arguments if argument.kwarg_only}
        places = [argument.name for argument in operator._schema.arguments]
        pairs = list(zip(places, made, strict=True))
        given = [value for name, value in pairs if name not in named]
        dtype: torch.dtype = operator(*given, **{n: v for n, v in pairs if n in named}).dtype
    return dtype


def _stand_in(arg: Any) -> Any:
    """What stands for an argument where nothing but dtypes matters."""
    if isinstance(arg, Term):
        return torch.empty((1,) * len(arg.sizes), dtype=arg.dtype, device="meta")
    if isinstance(arg, sympy.Basic):
        return 1 if arg.is_integer else 1.0
    return arg


def value_written(
    table: Table, name: str, before: Term, args: tuple[Any, ...], line: SourceLine | None
) -> Term | None:
    """What a copy or a fill leaves; None for other operators.

    Args:
        table: Where the terms are made.
        name: Of the operator: ``"copy_"``.
        before: What was there.
        args: The operator's arguments.
        line: Where it is called.
    """
    if name == "copy_":
        return as_place(table, args[1], before)
    if name in ("fill_", "zero_") and not any(isinstance(arg, Term) for arg in args[1:]):
        number = args[1] if name == "fill_" else 0
        made = (before.shape, number, before.dtype, before.device)
        return table.make("full", made, before.shape, before.dtype, before.device, line)
    return None


def as_place(table: Table, source: Term, place: Term) -> Term:
    """A value with the type and the shape of the place that it is written to."""
    if source.dtype != place.dtype or source.device != place.device:
        cast = (source, place.dtype, place.device)
        source = table.make("cast", cast, source.shape, place.dtype, place.device, source.line)
    if source.shape != place.shape:
        wide = (source, place.shape)
        source = table.make("expand", wide, place.shape, place.dtype, place.device, source.line)
    return source
