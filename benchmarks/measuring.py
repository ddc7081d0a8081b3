"""Running one measurement a process, in shuffled order, and showing and keeping the results."""

import json
import os
import platform
import random
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def in_a_process(module: str, *arguments: object) -> dict[str, Any]:
    """Run `python -m module arguments` with one thread; give the JSON of its last line."""
    finished = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        env=os.environ | ONE_THREAD,
        stdout=subprocess.PIPE,
        text=True,
    )
    if finished.returncode:
        raise SystemExit(f"{module} {' '.join(map(str, arguments))} failed")
    result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return result


def shuffled_medians(
    module: str, cases: Sequence[tuple[object, ...]], repeats: int
) -> dict[tuple[object, ...], dict[str, float]]:
    """Measure each case `repeats` times, a process each, every round in a new order.

    Gives the median of each value that a process reports.
    """
    order = random.Random(0)
    found: dict[tuple[object, ...], list[dict[str, float]]] = {case: [] for case in cases}
    rounds = [order.sample(list(cases), len(cases)) for _ in range(repeats)]
    for case in tqdm([case for cases_of_round in rounds for case in cases_of_round], unit="run"):
        found[case].append(in_a_process(module, *case))
    return {
        case: {name: median(values[name] for values in runs) for name in runs[0]}
        for case, runs in found.items()
    }


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table."""
    cells = [[str(cell) for cell in row] for row in [columns, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{title}")
    for row in cells:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def keep(name: str, results: object) -> None:
    """Write `results` and what they were measured with to `benchmarks/results/NAME.json`."""
    RESULTS.mkdir(exist_ok=True)
    machine = {
        "python": platform.python_version(),
        "torch": version("torch"),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }
    text = json.dumps({"measured_with": machine, "results": results}, indent=2)
    (RESULTS / f"{name}.json").write_text(text + "\n")
