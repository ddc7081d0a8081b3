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
    module: str, cases: Sequence[tuple[object, ...]], repeats: int, measure: str
) -> dict[tuple[object, ...], float]:
    """Measure each case `repeats` times, a process each, every round in a new order."""
    order = random.Random(0)
    values: dict[tuple[object, ...], list[float]] = {case: [] for case in cases}
    for round_number in range(repeats):
        for case in order.sample(list(cases), len(cases)):
            values[case].append(in_a_process(module, *case)[measure])
            print(f"  round {round_number + 1} of {repeats}: {case}", file=sys.stderr)
    return {case: median(found) for case, found in values.items()}


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
