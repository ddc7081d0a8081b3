"""Sweeps over transformers' architectures, a process each; keeps what was found, and goes on there.

python -m benchmarks.sweep [--only llama,bart] [--kind causal] [--again] [--without-onnx]

Each process is forked from one that has imported torch and transformers, which takes as long as
many a rewrite.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.measuring import ONE_THREAD
from benchmarks.sweep.configs import architectures
from benchmarks.sweep.one import run
from benchmarks.sweep.table import markdown, outcome

ROOT = Path(__file__).parents[2]
KINDS = ("causal", "seq2seq", "speech")
FORKING = multiprocessing.get_context("forkserver")


def run_one(kind: str, name: str, limit: int, layers: int, *, with_onnx: bool) -> dict[str, Any]:
    """The row of one architecture; what is known of it where it ran into a limit."""
    row: dict[str, Any] = {"architecture": name, "kind": kind, "stage": "import"}
    receiving, sending = FORKING.Pipe(duplex=False)
    process = FORKING.Process(target=run, args=(kind, name, layers, with_onnx, sending))
    process.start()
    sending.close()
    ends, ending = time.monotonic() + limit, f"over {limit} s"
    try:
        while receiving.poll(max(0.0, ends - time.monotonic())):
            row = receiving.recv()
    except EOFError:
        process.join()
        ending = f"ended with {process.exitcode}"
    if process.is_alive():
        process.kill()
        process.join()
    row["commit"] = commit()
    is_done = row["stage"] == "done" or (not with_onnx and row["stage"] == "export")
    if not is_done and "refused" not in row and "error" not in row:
        row["error"] = f"{row['stage']}: {ending}"
    return row


def is_due(row: dict[str, Any] | None, options: argparse.Namespace) -> bool:
    """Whether an architecture that nobody named is to be swept."""
    if row is None:
        return True
    lacks_onnx = row["stage"] == "export" and "error" not in row
    return (
        options.retry
        if "refused" in row or "error" in row
        else (lacks_onnx and not options.without_onnx)
    )


def commit() -> str:
    """The commit that a row is made at; a plus says that files differ from it."""
    described = _git("describe", "--always", "--abbrev=7", "--exclude=*")
    rows = ":!docs/transformers*"  # what a sweep itself writes
    is_changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", rows)
    return described + ("+" if is_changed else "")


def _git(*arguments: str) -> str:
    told = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return told.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="architectures, separated by commas")
    parser.add_argument("--kind", choices=KINDS, help="one kind only")
    parser.add_argument("--limit", type=int, default=240, help="seconds for each")
    parser.add_argument("--again", action="store_true", help="forget what was found before")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "transformers.json")
    parser.add_argument("--layers", type=int, default=2, help="layers, where all are of one kind")
    parser.add_argument("--without-onnx", action="store_true", help="rewrite and compare in torch")
    parser.add_argument(
        "--retry", action="store_true", help="also those that did not come to an end"
    )
    options = parser.parse_args()
    os.environ.update(ONE_THREAD, HF_HUB_OFFLINE="1")
    FORKING.set_forkserver_preload(["benchmarks.sweep.one", "transformers", "cachefree"])
    kept = {} if options.again or not options.results.exists() else load(options.results)
    only = [name for name in options.only.split(",") if name]
    chosen = [
        (kind, name)
        for kind in KINDS
        if options.kind in (None, kind)
        for name in architectures(kind)
        if (name in only if only else is_due(kept.get((kind, name)), options))
    ]
    for count, (kind, name) in enumerate(chosen, start=1):
        started = time.perf_counter()
        row = run_one(kind, name, options.limit, options.layers, with_onnx=not options.without_onnx)
        kept[kind, name] = row
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
