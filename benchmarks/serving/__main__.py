"""Serving, in parts: ``python -m benchmarks.serving --part decode --model gpt --size full``.

What counts is the ratio to what the same run measured: for a decode step the time to read weights
and cache once, at the rate at which this machine sums a large array; for a prefill the time of its
matrix products; for memory and encoder–decoder models the other ways. One thread, CPU time; a
process a measurement, every round in a new order, the median of the rounds. Writes
``benchmarks/results/serving-PART-MODEL.json`` and an SVG of the same name.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measuring import RESULTS, in_a_process, keep, show, shuffled_medians
from benchmarks.serving import pairs
from benchmarks.serving.parts import PARTS, cases, measure, ratios
from benchmarks.serving.plots import plot
from benchmarks.serving.sizes import SIZES
from benchmarks.serving.ways import GENAI, available, make

MODELS = ("gpt", "llama", "transformers")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("case", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=PARTS, action="append", help="only this; may be repeated")
    parser.add_argument("--model", choices=MODELS, action="append", help="only this")
    parser.add_argument("--size", choices=SIZES, default="short")
    parser.add_argument("--rounds", type=int, help="processes that measure each case")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(_one_case(options.case)))
        return
    parts = options.part or PARTS
    for model in options.model or MODELS[:2]:
        with tempfile.TemporaryDirectory() as folder:
            _make(model, options.size, folder, [part for part in parts if part != PARTS[-1]])
            for part in parts:
                if part != PARTS[-1]:
                    _run(part, model, options.size, folder, options.rounds)
    if PARTS[-1] in parts:
        with tempfile.TemporaryDirectory() as folder:
            in_a_process("benchmarks.serving", "make", options.size, "translator", "pair", folder)
            _run(PARTS[-1], "translator", options.size, folder, options.rounds)


def _one_case(case: list[str]) -> dict[str, Any]:
    if case[0] == "make":
        _, size, model, way, folder = case
        if model == "translator":
            pairs.make(SIZES[size], Path(folder))
        else:
            make(way, model, SIZES[size], Path(folder))
        return {}
    part, size, model, way, length, folder = case
    return dict(measure((part, size, model, way, int(length), folder)))


def _make(model: str, size: str, folder: str, parts: list[str]) -> None:
    """Each way in a process of its own, so that none leaves memory to another."""
    ways = [
        "cachefree",
        *(way for way in available(model) if way in ("transformers", "optimum", GENAI)),
    ]
    for way in ways if parts else ():
        in_a_process("benchmarks.serving", "make", size, model, way, folder)


def _run(part: str, model: str, size: str, folder: str, rounds: int | None) -> None:
    count = rounds or SIZES[size].rounds
    every: Any = cases(part, size, model, folder)
    rows = ratios(shuffled_medians("benchmarks.serving", every, count))  # type: ignore[arg-type]
    columns = ["way", "length", *(name for name in _COLUMNS if any(name in row for row in rows))]
    show(
        f"{part}, {model}, {size}, medians of {count} processes",
        columns,
        [[_said(name, row.get(name)) for name in columns] for row in rows],
    )
    name = f"serving-{part}-{model}"
    keep(name, {"size": size, "sizes": SIZES[size].as_dict(), "rounds": count, "rows": rows})
    plot(rows, RESULTS / f"{name}.svg")


_COLUMNS = ("decode", "prefill", "resident", "over_eager", "over_limit")


def _said(name: str, value: Any) -> str:
    if value is None:
        return "–"
    if name in ("decode", "prefill"):
        return f"{1000 * value:.2f} ms"
    if name == "resident":
        return f"{value / 1e6:.0f} MB"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
