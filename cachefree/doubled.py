"""Programs in float64: the same terms, every floating dtype as wide as it gets.

What two programs compute over the real numbers is told from rounding there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cachefree.terms import Table, Term, operands, replace_operands, topological

__all__ = ["coarsest", "doubled", "has_wide_form", "widened"]

aten = torch.ops.aten
_READS_BITS = (aten.view.dtype,)


def doubled(outputs: Sequence[Term], inputs: Sequence[Term]) -> tuple[list[Term], list[Term]]:
    """The programs with float64 for each floating dtype, and complex128 for each complex one.

    Args:
        outputs: The program.
        inputs: Its inputs, some of which it may not read.

    Returns:
        The outputs and the inputs.
    """
    table = Table()
    done: dict[Term, Term] = {}
    for term in topological([*outputs, *inputs]):
        done[term] = _doubled(table, term, done)
    return [done[term] for term in outputs], [done[term] for term in inputs]


def has_wide_form(outputs: Sequence[Term]) -> bool:
    """Whether no operator reads the bits of a number, which are others in float64."""
    return not any(term.op in _READS_BITS for term in topological(outputs))


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in float64, or in complex128; integers stay as they are."""
    return tensor.to(_wide(tensor.dtype))


def coarsest(outputs: Sequence[Term]) -> torch.dtype | None:
    """The coarsest floating dtype of a program; None where it has none but float64."""
    dtypes = {
        term.dtype
        for term in topological(outputs)
        if term.dtype is not None and term.dtype.is_floating_point
    } - {torch.float64}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=None)


def _wide(dtype: Any) -> Any:
    if not isinstance(dtype, torch.dtype):
        return dtype
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


def _doubled(table: Table, term: Term, done: dict[Term, Term]) -> Term:
    if term.op == "constant":
        return table.constant(widened(term.payload))
    args = replace_operands(
        term.args, lambda arg: done[arg] if isinstance(arg, Term) else _wide(arg)
    )
    if _takes_the_default(term):
        args = _told(table, term, args)
    payload = term.payload
    if term.shape is None and payload is not None:
        payload = tuple((shape, _wide(dtype), device) for shape, dtype, device in payload)
    return table.make(term.op, args, term.shape, _wide(term.dtype), term.device, term.line, payload)


def _takes_the_default(term: Term) -> bool:
    """Whether floating numbers come of integers alone: they are of torch's default dtype."""
    return (
        isinstance(term.op, torch._ops.OpOverload)
        and term.dtype is not None
        and term.dtype.is_floating_point
        and all(
            below.dtype is not None
            and not (below.dtype.is_floating_point or below.dtype.is_complex)
            for below in operands(term)
        )
    )


def _told(table: Table, term: Term, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with the dtype that was taken for granted."""

    def wide(arg: Any) -> Any:
        if not isinstance(arg, Term) or arg.dtype == torch.bool:
            return arg
        cast = (arg, torch.float64, arg.device)
        return table.make("cast", cast, arg.shape, torch.float64, arg.device, arg.line)

    names = [argument.name for argument in term.op._schema.arguments]
    told = tuple(
        torch.float64 if name == "dtype" and arg is None else arg
        for name, arg in zip(names, args, strict=False)
    )
    if told != args or "dtype" in names:
        return told
    changed: tuple[Any, ...] = replace_operands(told, wide)
    return changed
