"""The page of measurements, made of what `python -m benchmarks.serving` and others left.

``python -m benchmarks.serving.page`` copies the results that are in ``benchmarks/results`` into
``docs/performance.json``, its plots beside it, and writes ``docs/performance.md`` from that file
alone. A run at the size ``tiny`` shows that all works, and is never put on the page.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring import RESULTS

__all__ = ["page"]

DOCS = Path(__file__).parent.parent.parent / "docs"
KEPT = DOCS / "performance.json"
_ORDER = ("decode", "prefill", "memory", "encoder-decoder")
_COMMANDS = """```sh
python -m benchmarks.serving --size full
python -m benchmarks.serving --size full --model transformers --part decode --part prefill \\
    --part memory
python -m benchmarks.serving.page
```"""
_HEAD = """# Performance

Made by `python -m benchmarks.serving.page` from `performance.json`; no number here was typed.

{commands}

One thread, CPU time, a process a measurement, every round in a new order, the median of the rounds.
Compare within one table only. The *limit* of a decode step is the time to read the weights and the
cache once, at the rate at which the same processes summed a large array; that of a prefill is the
time of its matrix products at the rate of one such product. Optimum and onnxruntime-genai are rows
where `CACHEFREE_OPTIMUM_PYTHON` and `CACHEFREE_GENAI_PYTHON` name interpreters that have them
([clients](clients.md)); they and transformers' exporter take transformers' models alone
(`--model transformers`).

Ways: `concat`, `attention` and `shared` are the kinds of `to_onnx(kv=…)`; `int8` and `int4` are
`concat` with weights in so many bits, in blocks of 32, by ONNX Runtime's tool; `pair` is what
`torch.onnx.export` makes of the two paths of an encoder–decoder; `hoisted` is
`rewrite(cross_attention="hoist")`.
"""
_NOTHING = """
## Nothing yet

`performance.json` holds no measurements. The commands above make them, on a machine that does
nothing else meanwhile.
"""


def collect() -> None:
    """Takes the results that were measured, but for those of tiny models, into the page's file."""
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for path in sorted(RESULTS.glob("serving-*.json")):
        found = json.loads(path.read_text())
        if found["results"]["size"] == "tiny":
            continue
        kept[path.stem] = found
        plot = path.with_suffix(".svg")
        if plot.exists():
            shutil.copyfile(plot, DOCS / plot.name)
    KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def page(kept: dict[str, Any]) -> str:
    """The page's text."""
    parts = [_HEAD.format(commands=_COMMANDS)]
    for name in sorted(kept, key=_place):
        parts += _section(name, kept[name])
    return "\n".join([*parts, *([] if kept else [_NOTHING.strip("\n"), ""])])


def _place(name: str) -> tuple[int, str]:
    part = name.removeprefix("serving-")
    return next(n for n, known in enumerate(_ORDER) if part.startswith(known)), name


def _section(name: str, kept: dict[str, Any]) -> Iterable[str]:
    results, machine = kept["results"], kept["measured_with"]
    rows: list[dict[str, Any]] = results["rows"]
    said = {key: value for key, value in results["sizes"].items() if key != "rounds"}
    yield f"## {rows[0]['part'].capitalize()}, {rows[0]['model']}\n"
    yield f"Medians of {results['rounds']} processes; {_words(said)}.\n"
    yield f"Measured with {_words(machine)}.\n"
    if (DOCS / f"{name}.svg").exists():
        yield f"![{rows[0]['part']} of {rows[0]['model']}, a bar for each way]({name}.svg)\n"
    names = [key for key in _UNITS if any(key in row for row in rows)]
    yield _table(
        ["way", "length", *(_UNITS[key][0] for key in names)],
        [
            [
                row["way"],
                str(row["length"]),
                *(_said(row.get(key), _UNITS[key][1]) for key in names),
            ]
            for row in rows
        ],
    )


_UNITS: dict[str, tuple[str, float]] = {
    "decode": ("a step, ms", 1e3),
    "prefill": ("prefill, ms", 1e3),
    "resident": ("memory, MB", 1e-6),
    "over_eager": ("over eager", 1.0),
    "over_limit": ("over the limit", 1.0),
}


def _said(value: float | None, factor: float) -> str:
    if value is None:
        return ""
    return f"{value * factor:.0f}" if factor == 1e-6 else f"{value * factor:.2f}"


def _words(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_plain(value)}" for key, value in values.items())


def _plain(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main() -> None:
    """Collects and writes."""
    collect()
    (DOCS / "performance.md").write_text(page(json.loads(KEPT.read_text())))


if __name__ == "__main__":
    main()
