"""Programs in float64: nothing is left that rounds to less."""

from __future__ import annotations

import torch

from cachefree.doubled import coarsest, doubled, has_wide_form, widened
from cachefree.graph import emit
from cachefree.sizes import size_symbol
from cachefree.terms import Table, Term

aten = torch.ops.aten
CPU = torch.device("cpu")
ROWS = size_symbol("rows")


def _powers(table: Table, dtype: torch.dtype | None) -> tuple[Term, Term]:
    """0.9 to the power of integers, which is of the default dtype, and an input beside it."""
    x = table.input("x", (ROWS,), torch.float16, CPU)
    places = table.make("arange", (0, ROWS, 1, torch.int64, CPU), (ROWS,), torch.int64, CPU)
    if dtype is not None:
        places = table.make("cast", (places, dtype, CPU), (ROWS,), dtype, CPU)
    powers = table.make(aten.pow.Scalar, (0.9, places), (ROWS,), torch.float32, CPU)
    return table.make(aten.add.Tensor, (powers, x, 1), (ROWS,), torch.float32, CPU), x


def test_what_comes_of_integers_is_as_wide() -> None:
    for dtype in (None, torch.float32):
        total, x = _powers(Table(), dtype)
        (wide,), inputs = doubled([total], [x])
        assert coarsest([total]) is torch.float16
        assert coarsest([wide]) is None
        graph = emit(torch.nn.Module(), [("x", inputs[0])], [("y", wide)])
        given = torch.rand(40, dtype=torch.float64)
        (found,) = graph(given)
        exact = torch.tensor(0.9, dtype=torch.float64) ** torch.arange(40) + given
        torch.testing.assert_close(found, exact, rtol=1e-15, atol=0)


def test_constants_and_complex_numbers_are_widened() -> None:
    constant = Table().constant(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    (wide,), _ = doubled([constant], [])
    assert wide.payload.dtype is torch.float64
    assert widened(torch.zeros(1, dtype=torch.complex64)).dtype is torch.complex128
    assert widened(torch.zeros(1, dtype=torch.int32)).dtype is torch.int32


def test_bits_that_are_read_have_no_wide_form() -> None:
    table = Table()
    x = table.input("x", (ROWS,), torch.float32, CPU)
    bits = table.make(aten.view.dtype, (x, torch.int32), (ROWS,), torch.int32, CPU)
    assert has_wide_form([x])
    assert not has_wide_form([bits])
