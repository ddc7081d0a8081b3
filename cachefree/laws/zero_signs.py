"""Where nothing tells −0.0 from 0.0."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from cachefree.terms import Term, operands, topological

__all__ = ["is_sign_of_zero_lost"]

aten = torch.ops.aten
_CARRY = (
    *("reshape", "permute", "expand", "slice", "cat", "cast", "add", "sub", "rsub", "mul", "neg"),
    *("masked_fill", "where", "slice_scatter", "select_scatter", "tril", "triu"),
)
_LOSE = ("eq", "ne", "lt", "le", "gt", "ge", "softmax", "_softmax")
_SDPA = aten.scaled_dot_product_attention.default
_MASK = 3


def is_sign_of_zero_lost(term: Term, outputs: Iterable[Term]) -> bool:
    """Whether all that is computed of a value is the same for −0.0 and 0.0, as real numbers are.

    A comparison and weights of attention are. A quotient is not, nor is a result itself. Views,
    sums, products and choices hand the sign on.

    Args:
        term: The value.
        outputs: The results of the program.
    """
    outputs = tuple(outputs)
    readers: dict[Term, list[Term]] = {}
    for reader in topological(outputs):
        for operand in operands(reader):
            readers.setdefault(operand, []).append(reader)
    pending, seen = [term], {term}
    while pending:
        value = pending.pop()
        if value in outputs:
            return False
        for reader in readers.get(value, ()):
            if reader in seen or _loses(reader, value):
                continue
            if _name(reader) not in _CARRY:
                return False
            seen.add(reader)
            pending.append(reader)
    return True


def _loses(reader: Term, value: Term) -> bool:
    if reader.op is _SDPA:
        return all(operand is not value for operand in reader.args[:_MASK])
    return _name(reader) in _LOSE


def _name(term: Term) -> str:
    return str(term.op).removeprefix("aten.").split(".")[0]
