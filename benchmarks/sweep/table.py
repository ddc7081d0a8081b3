"""The sweep's rows as a table in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.sweep.one import CHUNKS, PASTS, TOLERANCE

Row = Mapping[str, Any]
_KINDS = {
    "causal": "Decoder-only",
    "seq2seq": "Encoder–decoder, text",
    "speech": "Encoder–decoder, speech",
}
_POINTS = (*map(str, PASTS), "chunks")

_HEAD = (
    "Printed by `make sweep` (`benchmarks/sweep/`): a tiny random model of each architecture in "
    "transformers' own mappings ({versions}), rewritten with one argument, "
    "`cachefree.rewrite(model)`, and compared with the model's own calls: logits and cache, with "
    f"{', '.join(map(str, PASTS))} tokens past and in chunks of {', '.join(map(str, CHUNKS))}; in "
    "torch and, after export to ONNX, on ONNX Runtime. Equal means a largest difference of at most "
    f"{TOLERANCE:g} of the largest value. Counted are architectures whose own cache is consistent: "
    "their calls in chunks equal their one call over all tokens. An encoder's text is padded. "
    "Each row was made at the commit that it names; those that name none, up to cdfe812. "
    "Layers: how many, where all are of one kind; else there is one of each kind; rows that do not "
    "say have two. By one token: later calls were made with one token each, since the model's own "
    "calls with several do not go on from its cache. Architectures that have no row have not been "
    "swept yet; ONNX was not tried where the outcome says so."
)


def is_consistent(row: Row) -> bool:
    """Whether the model's own calls in chunks equal its one call over all tokens."""
    return "eager_gap" in row and row["eager_gap"] <= TOLERANCE


def is_equal(row: Row, prefix: str) -> bool:
    """Whether every comparison was made, and none is over the tolerance."""
    return all(row.get(f"{prefix}{point}", float("inf")) <= TOLERANCE for point in _POINTS)


def outcome(row: Row) -> str:
    """One of a few words for what became of an architecture."""
    if "eager_gap" not in row:
        return "not built here" if row["stage"] in ("import", "model") else "not run in eager mode"
    if not is_consistent(row):
        return "no consistent cache in eager mode"
    if "verdict" not in row:
        return "refused" if "refused" in row else "failed"
    if is_equal(row, "torch_") and is_equal(row, "ort_"):
        return "equal"
    is_wrong = any(
        row[f"{prefix}{point}"] > TOLERANCE
        for prefix in ("torch_", "ort_")
        for point in _POINTS
        if f"{prefix}{point}" in row
    )
    if is_wrong:
        return "WRONG"
    is_untried = row["stage"] == "export" and "error" not in row
    return "equal in torch, ONNX not tried" if is_untried else "failed"


def markdown(rows: Sequence[Row], versions: str) -> str:
    """The whole page."""
    lines = ["# transformers", "", _HEAD.format(versions=versions), "", *summary(rows)]
    for kind, title in _KINDS.items():
        own = [row for row in rows if row["kind"] == kind]
        if own:
            lines += ["", f"## {title}", "", *table(own)]
    return "\n".join(lines) + "\n"


def summary(rows: Sequence[Row]) -> list[str]:
    """Counts, and the refusals by reason."""
    consistent = [row for row in rows if is_consistent(row)]
    rewritten = [row for row in consistent if "verdict" in row]
    proved = [row for row in rewritten if row["verdict"].startswith("PROVED")]
    counts = [
        ("architectures", len(rows)),
        ("whose own cache is consistent", len(consistent)),
        ("rewritten", len(rewritten)),
        ("proved", len(proved)),
        ("equal in torch", sum(is_equal(row, "torch_") for row in rewritten)),
        ("equal on ONNX Runtime", sum(is_equal(row, "ort_") for row in rewritten)),
        ("of these, ONNX not tried", sum(outcome(row).endswith("not tried") for row in rewritten)),
        ("wrong", sum(outcome(row) == "WRONG" for row in consistent)),
        ("refused", sum(outcome(row) == "refused" for row in consistent)),
        ("failed", sum(outcome(row) == "failed" for row in consistent)),
    ]
    lines = ["| | count |", "|---|---|", *(f"| {name} | {count} |" for name, count in counts)]
    reasons = Counter(row["reason"] for row in consistent if "reason" in row)
    if reasons:
        lines += ["", "| refused because | count |", "|---|---|"]
        lines += [f"| {_cell(reason)} | {count} |" for reason, count in reasons.most_common()]
    return lines


def table(rows: Iterable[Row]) -> list[str]:
    """A row each."""
    columns = (
        *("architecture", "outcome", "layers", "verdict", "domain", "inputs", "torch", "ORT", "s"),
        *("commit", "why"),
    )
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        why = row.get("reason") or row.get("error") or ""
        if "reason" in row and row.get("where"):
            why += f" ({row['where']})"
        if not is_consistent(row) and "eager_gap" in row:
            why = f"chunks differ from one call by {row['eager_gap']:.1e}"
        cells = (
            row["architecture"],
            outcome(row) + (", by one token" if row.get("by_one_token") else ""),
            row.get("layers", ""),
            row.get("verdict", ""),
            row.get("domain", ""),
            ", ".join(row.get("inputs", ())),
            _gaps(row, "torch_"),
            _gaps(row, "ort_"),
            row.get("seconds", ""),
            row.get("commit", ""),
            why,
        )
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return lines


def _gaps(row: Row, prefix: str) -> str:
    """Which comparisons are equal, in words short enough for a table."""
    if f"{prefix}{_POINTS[0]}" not in row:
        return ""
    missed = [point for point in _POINTS if row.get(f"{prefix}{point}", 9.0) > TOLERANCE]
    return f"differs at {', '.join(missed)}" if missed else ", ".join(_POINTS)


def _cell(value: object) -> str:
    return " ".join(str(value).replace("|", "\\|").split())[:220]
