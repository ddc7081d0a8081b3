"""A run as bars, one group a length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["plot"]

_NAMES = {
    "over_limit": "CPU time over the limit of the machine (1 is the limit)",
    "over_eager": "CPU time over eager torch",
    "resident": "memory, MB",
    "decode": "CPU time, ms",
}


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes an SVG; the first of the measures that every row has."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "cachefree"
    measure = "resident" if rows[0]["part"] == "memory" else next(
        name for name in _NAMES if all(name in row for row in rows)
    )  # fmt: skip
    factor = {"resident": 1e-6, "decode": 1e3}.get(measure, 1.0)
    ways = list(dict.fromkeys(row["way"] for row in rows))
    lengths = sorted({row["length"] for row in rows})
    figure, axes = pyplot.subplots(figsize=(1.6 + 0.45 * len(ways) * len(lengths), 3.2))
    width = 0.8 / len(ways)
    for number, way in enumerate(ways):
        found = {row["length"]: row[measure] * factor for row in rows if row["way"] == way}
        places = [lengths.index(length) + number * width for length in found]
        bars = axes.bar(places, list(found.values()), width * 0.92, label=way)
        axes.bar_label(bars, fmt="%.2f" if factor == 1 else "%.0f", fontsize=6)
    middle = 0.4 - width / 2
    words = {"encoder-decoder": "encoder rows", "decode": "past tokens"}
    axes.set_xticks([place + middle for place in range(len(lengths))], [str(n) for n in lengths])
    axes.set_xlabel(words.get(rows[0]["part"], "tokens of the prompt"))
    axes.set_ylabel(_NAMES[measure], fontsize=7)
    if measure == "over_limit":
        axes.axhline(1.0, color="black", linewidth=0.8)
    axes.legend(fontsize=7, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
