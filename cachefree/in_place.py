"""The value that an operator leaves in the tensor that it writes to."""

from __future__ import annotations

from typing import Any

import torch

from cachefree.errors import SourceLine
from cachefree.terms import Table, Term

__all__ = ["value_written", "without_the_write"]

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
    return None if packet is None else getattr(packet, target._overloadname, None)


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
        return _as_is(table, args[1], before)
    if name in ("fill_", "zero_") and not any(isinstance(arg, Term) for arg in args[1:]):
        number = args[1] if name == "fill_" else 0
        made = (before.shape, number, before.dtype, before.device)
        return table.make("full", made, before.shape, before.dtype, before.device, line)
    return None


def _as_is(table: Table, source: Term, place: Term) -> Term:
    """A value with the type and the shape of the place that it is copied to."""
    if source.dtype != place.dtype or source.device != place.device:
        cast = (source, place.dtype, place.device)
        source = table.make("cast", cast, source.shape, place.dtype, place.device, source.line)
    if source.shape != place.shape:
        wide = (source, place.shape)
        source = table.make("expand", wide, place.shape, place.dtype, place.device, source.line)
    return source
