"""The rows of earlier versions of transformers as a page in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.sweep.one import CHUNKS, PASTS
from benchmarks.sweep.table import is_consistent, is_equal, outcome, table

_HEAD = (
    "# transformers, earlier versions\n\n"
    "Printed by `make legacy` (`benchmarks/sweep/legacy.py`): tiny random models of earlier "
    "versions of transformers, each version in an environment of its own, beside the torch that "
    "the project uses. Each is rewritten with one argument and compared with the model's own "
    f"calls, with {', '.join(map(str, PASTS))} tokens past and in chunks of "
    f"{', '.join(map(str, CHUNKS))}; in torch and, after export, on ONNX Runtime. Greedy: "
    "tokens of a greedy loop over the rewritten module that are the model's own. The columns "
    "are those of [the current version's table](transformers.md). Models that have no row have not "
    "been swept yet, and ONNX was not tried where the outcome says so."
)


def page(rows: Mapping[tuple[str, str, str], Mapping[str, Any]]) -> str:
    """The whole page: counts, then a table for each version."""
    versions = sorted({version for version, _, _ in rows})
    lines = [_HEAD, "", "| transformers | " + " | ".join(_COUNTS) + " |"]
    lines += ["|" + "---|" * (1 + len(_COUNTS))]
    for version in versions:
        own = [row for key, row in rows.items() if key[0] == version]
        counts = [str(sum(bool(test(row)) for row in own)) for test in _COUNTS.values()]
        lines.append(f"| {version} | {' | '.join(counts)} |")
    for version in versions:
        own = [row for key, row in rows.items() if key[0] == version]
        lines += ["", f"## {version}", "", *table(own)]
    return "\n".join(lines) + "\n"


_COUNTS = {
    "tried": lambda row: True,
    "consistent in eager mode": is_consistent,
    "proved": lambda row: row.get("verdict", "").startswith("PROVED"),
    "equal in torch": lambda row: is_equal(row, "torch_"),
    "greedy tokens equal": lambda row: row.get("greedy"),
    "equal on ONNX Runtime": lambda row: is_equal(row, "ort_"),
    "wrong": lambda row: outcome(row) == "WRONG",
}
