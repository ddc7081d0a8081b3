"""Inputs that calls may leave out, which then have no rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cachefree
from cachefree.facts import Facts
from cachefree.laws.scatter import SCATTER_LAWS
from cachefree.normal import Normaliser
from cachefree.terms import Table

from .assertions import same
from .models.case import seeded
from .models.scattered import PLACE, Attends, PutsIn, Scatters, Tells

GENERATOR = torch.Generator().manual_seed(3)
IDS = torch.randint(0, PLACE, (2, 9), generator=GENERATOR)
SEEN = IDS.clone()
SEEN[:, 1:4] = PLACE
PATCHES = torch.randn(2, 3, 3, generator=GENERATOR)


def _rewritten(kind: type[nn.Module]) -> tuple[nn.Module, Any]:
    model = seeded(kind)()
    return model, cachefree.rewrite(model, {"ids": SEEN[:, :6], "patches": PATCHES})


@pytest.mark.parametrize("kind", [Scatters, pytest.param(PutsIn, marks=pytest.mark.slow)])
def test_later_calls_leave_out_what_was_put_into_the_text(kind: type[nn.Module]) -> None:
    model, one = _rewritten(kind)
    assert one.report.verdict is cachefree.Verdict.PROVED_EXACT
    assert "patches may be left out, which then has no rows" in one.report.notes
    for first in ({"ids": SEEN[:, :5], "patches": PATCHES}, {"ids": IDS[:, :5]}):
        theirs, mine = model(**first), one(**first)
        same(mine, theirs)
        for start, end in ((5, 6), (6, 9)):
            ids = IDS[:, start:end]
            theirs, mine = model(ids, past=theirs[1]), one(ids, past=mine[1])
            same(mine, theirs)
    later = SEEN[:, 1:4], PATCHES  # another picture in the middle of a text
    same(one(*later, mine[1]), model(*later, theirs[1]))


@pytest.mark.slow
def test_a_file_takes_them_at_every_call(tmp_path: Path) -> None:
    model, one = _rewritten(Scatters)
    cachefree.to_onnx(one, tmp_path / "put.onnx")
    decoder = cachefree.load_onnx(tmp_path / "put.onnx", like=one)
    theirs, mine = model(SEEN[:, :5], PATCHES), decoder(SEEN[:, :5], PATCHES)
    same(mine, theirs)
    same(decoder(SEEN[:, 1:4], PATCHES, mine[1]), model(SEEN[:, 1:4], PATCHES, theirs[1]))
    with pytest.raises(cachefree.DomainError):
        decoder(IDS[:, 5:], past=mine[1])


def test_a_place_without_what_belongs_there_is_an_error() -> None:
    _, one = _rewritten(Scatters)
    with pytest.raises(RuntimeError):
        one(SEEN[:, :5])


@pytest.mark.parametrize("kind", [Attends, Tells])
def test_what_changes_the_result_by_its_absence_is_not_left_out(kind: type[nn.Module]) -> None:
    _, one = _rewritten(kind)
    with pytest.raises(cachefree.DomainError, match="'patches' is missing"):
        one(IDS[:, :5])


@pytest.mark.parametrize("rows", [0, 1])
def test_nothing_is_put_where_there_is_nothing(rows: int) -> None:
    table, kind = Table(), (torch.float32, torch.device("cpu"))
    x, source = table.input("x", (4, 3), *kind), table.input("s", (rows, 3), *kind)
    mask = table.input("m", (4, 3), torch.bool, kind[1])
    line = table.input("n", (4,), torch.bool, kind[1])
    aten = torch.ops.aten
    for op, args in (
        (aten.masked_scatter.default, (x, mask, source)),
        (aten.index_put.default, (x, (line,), source)),
    ):
        term = table.make(op, args, (4, 3), *kind)
        (normal,) = Normaliser(table, Facts(()), is_exact=True, more=SCATTER_LAWS).normal([term])
        assert (normal is x) is (rows == 0)


def test_it_is_so_in_torch() -> None:
    x, empty = torch.randn(4, 3), torch.zeros(0, 3)
    nowhere = torch.zeros(4, dtype=torch.bool)
    assert torch.equal(x.masked_scatter(nowhere[:, None], empty), x)
    assert torch.equal(x.index_put((nowhere,), empty), x)
    somewhere = torch.tensor([True, False, False, False])
    with pytest.raises(RuntimeError):
        x.masked_scatter(somewhere[:, None], empty)
    with pytest.raises(RuntimeError):
        x.clone().index_put((torch.tensor([True, True, False, False]),), empty)
