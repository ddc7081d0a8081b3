"""Operators at sizes other than those that were written down."""

from __future__ import annotations

from typing import Any

import torch

from cachefree.shapes import Signatures
from cachefree.sizes import size_symbol
from cachefree.terms import Table, Term

ATEN = torch.ops.aten
BATCH, SIDE = size_symbol("batch"), size_symbol("image.1")


class Program:
    """A picture ``(B, 3, S)``, taken by pairs of columns, and squeezed."""

    def __init__(self) -> None:
        self._table = Table()
        self.picture = self._table.input(
            "image", (BATCH, 3, SIDE), torch.float32, torch.device("cpu")
        )

    def pairs(self) -> Term:
        """Raises where the picture has one column."""
        return self._table.like(
            self.picture, ATEN.unfold.default, (self.picture, 2, 2, 1), (BATCH, 3, SIDE - 1, 2)
        )

    def squeezed(self) -> Term:
        """Loses an axis where the picture has one column."""
        return self._table.like(self.picture, ATEN.squeeze.default, (self.picture,))


def _sizes(columns: int) -> dict[str, int]:
    return {"batch": 2, str(SIDE): columns}


def test_an_operator_that_raises_at_a_size_of_no_tokens_is_not_wrong() -> None:
    term = Program().pairs()
    signatures = Signatures([term])
    assert signatures.hold(_sizes(4))
    assert signatures.broken(_sizes(1)) is term
    assert signatures.wrong(_sizes(1)) is None
    assert signatures.wrong(_sizes(0)) is term  # what is left out where it is not given


def test_one_that_raises_does_not_spare_another() -> None:
    program = Program()
    pairs, squeezed = program.pairs(), program.squeezed()
    for terms in ([pairs, squeezed], [squeezed, pairs]):
        signatures: Any = Signatures(terms)
        assert signatures.hold(_sizes(4))
        assert signatures.wrong(_sizes(1)) is squeezed


def test_an_operator_that_raises_at_a_size_of_tokens_is_wrong() -> None:
    table, past = Table(), size_symbol("past")
    rows = table.input("past", (BATCH, past), torch.float32, torch.device("cpu"))
    pairs = table.like(rows, ATEN.unfold.default, (rows, 1, 2, 1), (BATCH, past - 1, 2))
    assert Signatures([pairs]).wrong({"batch": 2, "past": 1}) is pairs
