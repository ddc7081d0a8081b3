"""The page of measurements is made of its file, and ratios are made of what was measured."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.serving.page import DOCS, KEPT, page
from benchmarks.serving.parts import Case, cases, ratios
from benchmarks.serving.plots import plot
from benchmarks.serving.sizes import SIZES, build, cache_bytes, weight_bytes

TINY = SIZES["tiny"]


def test_the_page_is_made_of_its_file() -> None:
    assert (DOCS / "performance.md").read_text() == page(json.loads(KEPT.read_text()))


def measured(part: str, model: str, **values: Any) -> dict[Case, dict[str, float]]:
    return {(part, "tiny", model, way, 16, "f"): found for way, found in values.items()}


def test_ratios_are_those_of_one_run() -> None:
    rates = {"read": 1e9, "multiply": 1e9}
    found = measured(
        "decode", "gpt", eager={"decode": 4e-3, **rates}, shared={"decode": 1e-3, **rates}
    )
    rows = ratios(found)
    assert [row["over_eager"] for row in rows] == [1.0, 0.25]
    read = weight_bytes(build("gpt", TINY)) + cache_bytes("gpt", TINY, 16)
    assert rows[1]["over_limit"] == 1e-3 / (read / 1e9)
    assert cache_bytes("llama", TINY, 16) * TINY.heads == cache_bytes("gpt", TINY, 16)


def test_a_page_and_a_plot_of_a_run(tmp_path: Any) -> None:
    found = measured(
        "encoder-decoder", "translator",
        eager={"decode": 4e-3, "resident": 2e8}, pair={"decode": 2e-3, "resident": 1e8},
    )  # fmt: skip
    rows = ratios(found)
    plot(rows, tmp_path / "run.svg")
    assert "pair" in (tmp_path / "run.svg").read_text()
    results = {"size": "short", "sizes": TINY.as_dict(), "rounds": 3, "rows": rows}
    kept = {"serving-none": {"measured_with": {"cores": 2}, "results": results}}
    text = page({"serving-encoder-decoder-none": kept["serving-none"]})
    assert "| pair | 16 | 2.00 | 100 | 0.50 |" in text
    assert "Nothing yet" not in text


def test_every_part_has_eager_torch_to_compare_with() -> None:
    for part in ("decode", "prefill", "memory", "encoder-decoder"):
        asked = cases(part, "tiny", "gpt", "folder")
        lengths = {case[4] for case in asked}
        assert {case[4] for case in asked if case[3] == "eager"} == lengths
