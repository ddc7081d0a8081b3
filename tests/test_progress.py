"""The bar over what takes long: on a terminal and where it is asked for, never in a pipe."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import cachefree
from cachefree import progress
from cachefree.progress import amount, stages

from .small import IDS, rewritten_small, small


def test_a_rewrite_names_its_stages_where_it_is_asked_to(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rewritten_small(small(), progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    bars = [bar for bar in shown.err.split("\r") if "/4" in bar]
    counts = [bar.rsplit(" ", 2)[1] for bar in bars]
    assert counts == sorted(counts)
    assert {"0/4", "3/4"} <= set(counts)


def test_nothing_is_shown_in_a_pipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rewritten = rewritten_small(small())
    cachefree.to_onnx(rewritten, tmp_path / "small.onnx")
    shown = capsys.readouterr()
    assert shown.out + shown.err == ""


@pytest.mark.parametrize("bar", [stages(3, None), amount(10, "weights")])
def test_a_terminal_shows_it_after_a_while(bar, monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress, "_DELAY_SECONDS", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with bar as say:
        say("first" if say.__name__ == "begin" else 10)
    shown = capsys.readouterr().err
    assert ("0/3" if say.__name__ == "begin" else "weights") in shown


def test_without_tqdm_nothing_is_shown(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with stages(2, True) as begin:
        begin("first")
    with amount(2, "weights", True) as done:
        done(2)
    assert capsys.readouterr().err == ""
    assert cachefree.rewrite(small(), (IDS,), progress=True).report.verdict.is_proof
