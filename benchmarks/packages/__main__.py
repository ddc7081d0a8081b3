"""Tries decoders of other people's packages, a process each, and writes what came of them.

python -m benchmarks.packages [--only bark,speechbrain] [--limit 300] [--table]

The packages are installed beside the project, none of them with its requirements; what they import
and do not need for a decoder is stood in for (`entry.stand_in_for`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.measuring import ONE_THREAD
from benchmarks.packages.entries import ENTRIES
from benchmarks.packages.entry import Entry

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "packages.json"
TOLERANCE = 1e-4

_HEAD = """# Decoders of other packages

Printed by `python -m benchmarks.packages` ({versions}): classes of packages from the registry as
tiny random models, rewritten as they are and compared with their own calls, call by call, with
nothing past and later, in batches of 1 and 2; in torch and, after export, on ONNX Runtime. Nothing
in `cachefree/` knows any of them. Told are the calls that were compared and the largest difference
as a part of the largest value; above {tolerance:g} the outcome is WRONG.

| package | version | class | cache | outcome | later calls | torch equal | ORT equal | s | why |
|---|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="parts of names, separated by commas")
    parser.add_argument("--limit", type=int, default=300, help="seconds for each")
    parser.add_argument("--table", action="store_true", help="write the table again, try nothing")
    options = parser.parse_args()
    kept = {key_of(row): row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    only = [part for part in options.only.split(",") if part]
    for entry in () if options.table else ENTRIES:
        if only and not any(part in entry.key for part in only):
            continue
        row = kept[entry.key] = tried(entry, options.limit)
        print(f"{entry.key}: {outcome(row)}", flush=True)
        RESULTS.write_text(json.dumps(list(kept.values()), indent=1) + "\n")
    rows = [kept[entry.key] for entry in ENTRIES if entry.key in kept]
    RESULTS.with_suffix(".md").write_text(page(rows))


def key_of(row: dict[str, Any]) -> str:
    return f"{row['package']}:{row['name']}"


def tried(entry: Entry, limit: int) -> dict[str, Any]:
    """The row of one entry, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.packages.one", entry.key]
    row: dict[str, Any] = {
        "package": entry.package,
        "name": entry.name,
        "pattern": entry.pattern,
    }
    try:
        finished = subprocess.run(
            command, env=os.environ | ONE_THREAD, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {**row, "error": f"over {limit} s"}
    found = [line[4:] for line in finished.stdout.splitlines() if line.startswith("ROW ")]
    return json.loads(found[-1]) if found else {**row, "error": f"ended: {finished.returncode}"}


def outcome(row: dict[str, Any]) -> str:
    """One of a few words, and the verdict."""
    if "verdict" not in row:
        return "refused" if "refused" in row else "not tried"
    parts = [row[name] for name in ("torch", "ort") if "largest" in row.get(name, {})]
    if any(part["largest"] > TOLERANCE for part in parts):
        return "WRONG"
    return row["verdict"]


def page(rows: list[dict[str, Any]]) -> str:
    """The whole page."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnx"))
    lines = [
        " | ".join(
            (
                "",
                row["package"],
                row.get("version", ""),
                row["name"],
                row["pattern"],
                outcome(row),
                "; ".join(part for part in row.get("domain", []) if part.startswith("later"))
                .removeprefix("later calls: "),
                compared(row.get("torch")),
                compared(row.get("ort")),
                f"{row['seconds']:.0f}" if "seconds" in row else "",
                shorter(row.get("refused") or row.get("error") or ""),
                "",
            )
        ).strip()
        for row in rows
    ]  # fmt: skip
    return _HEAD.format(versions=versions, tolerance=TOLERANCE) + "\n".join(lines) + "\n"


def compared(part: dict[str, Any] | None) -> str:
    """How many calls were compared, and the largest difference."""
    if not part:
        return ""
    if "error" in part:
        return shorter(part["error"])
    outside = f", {part['outside']} told to be outside" if part["outside"] else ""
    return f"{part['calls']} calls, {part['largest']:.1g}{outside}"


def shorter(text: str) -> str:
    """One line without pipes or folders, of a length that fits into a table."""
    plain = " ".join(text.split()).replace("|", "/")
    plain = " ".join(part.split("site-packages/")[-1] for part in plain.split(" "))
    return plain if len(plain) <= 420 else plain[:420] + " …"


if __name__ == "__main__":
    main()
