"""One entry: built, rewritten, compared call by call in torch and on ONNX Runtime.

python -m benchmarks.packages.one PACKAGE:NAME
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
import traceback
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cachefree
from benchmarks.packages.entries import ENTRIES
from benchmarks.packages.entry import Entry

BATCHES = (1, 2)


def main() -> None:
    entry = next(entry for entry in ENTRIES if entry.key == sys.argv[1])
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    row: dict[str, Any] = {
        "package": entry.package, "name": entry.name, "pattern": entry.pattern
    }  # fmt: skip
    try:
        row["version"] = version(entry.package)
        model = built(entry)
    except (ImportError, PackageNotFoundError) as error:
        row["error"] = f"not installed: {error}"
    except Exception as error:  # noqa: BLE001 - the package may raise anything
        row["error"] = f"not built: {type(error).__name__}: {error}"
        traceback.print_exc()
    else:
        with torch.no_grad():
            tried(entry, model, row)
    print("ROW " + json.dumps(row), flush=True)


def built(entry: Entry) -> nn.Module:
    """The model with matrices large enough that a wrong cache shows."""
    torch.manual_seed(0)
    model = entry.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.2)
    return model


def tried(entry: Entry, model: nn.Module, row: dict[str, Any]) -> None:
    example = None if entry.example is None else entry.example(entry.draw(2)[:, :5])
    started = time.perf_counter()
    try:
        rewritten = cachefree.rewrite(model, example, progress=False, **entry.options)
    except cachefree.CacheFreeError as error:
        first = error.refusals[0]
        row["refused"] = " · ".join(filter(None, (first.what, first.why, str(first.where or ""))))
        row["seconds"] = time.perf_counter() - started
        print(error)
        return
    row["seconds"] = time.perf_counter() - started
    row["verdict"] = rewritten.report.verdict.name
    row["domain"] = [
        str(part) for part in str(rewritten.report.domain).splitlines() if "not given" not in part
    ]
    print(rewritten.report)
    row["torch"] = compared(entry, model, rewritten)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = cachefree.to_onnx(rewritten, Path(folder) / "model.onnx")
            row["ort"] = compared(entry, model, cachefree.load_onnx(path, like=rewritten))
    except Exception as error:  # noqa: BLE001 - exporters raise anything
        row["ort"] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        traceback.print_exc()


def compared(entry: Entry, model: nn.Module, other: Any) -> dict[str, Any]:
    """How many calls were compared, how many were told to be outside, the largest difference."""
    found: dict[str, Any] = {"calls": 0, "outside": 0, "largest": 0.0}
    for batch in BATCHES:
        whole = entry.draw(batch)
        for lengths in entry.lengths:
            theirs, mine = entry.begin(model, whole), entry.begin(other, whole)
            start = 0
            for length in lengths:
                expected = theirs(start, start + length)
                try:
                    actual = mine(start, start + length)
                except cachefree.CacheFreeError as error:
                    found["outside"] += 1
                    found["told"] = str(error).splitlines()[0]
                    break
                found["calls"] += 1
                found["largest"] = max(found["largest"], difference(actual, expected))
                start += length
    return found


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference as a part of the largest value."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return float("inf")
    scale = max(1.0, other.abs().max().item())
    return float((one.double() - other.double()).abs().max()) / scale


if __name__ == "__main__":
    main()
