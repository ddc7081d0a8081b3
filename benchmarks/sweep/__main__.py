"""Sweeps over transformers' architectures, a process each; keeps what was found, and goes on there.

python -m benchmarks.sweep [--only llama,bart] [--kind causal] [--again]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.measuring import ONE_THREAD
from benchmarks.sweep.configs import architectures
from benchmarks.sweep.table import markdown, outcome

ROOT = Path(__file__).parents[2]
KINDS = ("causal", "seq2seq", "speech")


def run_one(kind: str, name: str, limit: int) -> dict[str, Any]:
    """The row of one architecture; what is known of it where it ran into a limit."""
    command = [sys.executable, "-m", "benchmarks.sweep.one", kind, name]
    environment = os.environ | ONE_THREAD | {"HF_HUB_OFFLINE": "1"}
    try:
        finished = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=limit
        )
        printed, ending = finished.stdout, f"ended with {finished.returncode}"
    except subprocess.TimeoutExpired as error:
        printed = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        ending = f"over {limit} s"
    found = [line[4:] for line in printed.splitlines() if line.startswith("ROW ")]
    row: dict[str, Any] = (
        json.loads(found[-1]) if found else {"architecture": name, "kind": kind, "stage": "import"}
    )
    row["commit"] = commit()
    if row["stage"] != "done" and "refused" not in row and "error" not in row:
        row["error"] = f"{row['stage']}: {ending}"
    return row


def commit() -> str:
    """The commit that a row is made at; a plus says that files differ from it."""
    told = subprocess.run(
        ["git", "describe", "--always", "--abbrev=7", "--exclude=*", "--dirty=+"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return told.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="architectures, separated by commas")
    parser.add_argument("--kind", choices=KINDS, help="one kind only")
    parser.add_argument("--limit", type=int, default=240, help="seconds for each")
    parser.add_argument("--again", action="store_true", help="forget what was found before")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "transformers.json")
    options = parser.parse_args()
    kept = {} if options.again or not options.results.exists() else load(options.results)
    only = [name for name in options.only.split(",") if name]
    chosen = [
        (kind, name)
        for kind in KINDS
        if options.kind in (None, kind)
        for name in architectures(kind)
        if (name in only if only else (kind, name) not in kept)
    ]
    for count, (kind, name) in enumerate(chosen, start=1):
        started = time.perf_counter()
        row = kept[kind, name] = run_one(kind, name, options.limit)
        save(options.results, kept)
        took = time.perf_counter() - started
        why = row.get("reason") or row.get("error") or ""
        told = f"{outcome(row)} {row.get('verdict', '')} {why}"
        print(f"{count}/{len(chosen)} {kind} {name} {took:.0f} s: {told[:200]}", flush=True)
    every = [(kind, name) for kind in KINDS for name in architectures(kind)]
    rows = [kept[key] for key in every if key in kept]
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch"))
    options.results.with_suffix(".md").write_text(markdown(rows, versions))


def load(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["kind"], row["architecture"]): row for row in json.loads(path.read_text())}


def save(path: Path, kept: dict[tuple[str, str], dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(kept.values()), indent=1) + "\n")


if __name__ == "__main__":
    main()
