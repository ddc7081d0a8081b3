"""What one process measures, and the ratios that are made of all processes of a run."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.serving import pairs
from benchmarks.serving.limits import limits, preload, resident_bytes, seconds
from benchmarks.serving.sizes import SIZES, Sizes, build, cache_bytes, weight_bytes
from benchmarks.serving.ways import GENAI, available, open_way

__all__ = ["PARTS", "cases", "measure", "ratios"]

Case = tuple[str, str, str, str, int, str]  # part, size, model, way, length, folder
PARTS = ("decode", "prefill", "memory", "encoder-decoder")


def cases(part: str, size: str, model: str, folder: str) -> list[Case]:
    """The cases of a part: each way at each length."""
    sizes = SIZES[size]
    if part == "encoder-decoder":
        return [
            (part, size, "translator", way, n, folder) for n in sizes.rows for way in pairs.WAYS
        ]
    lengths = sizes.pasts if part == "decode" else (sizes.prompt,)
    ways = available(model)
    if part == "memory":
        ways = [way for way in ways if way not in ("compile", GENAI)]
    return [(part, size, model, way, n, folder) for n in lengths for way in ways]


def measure(case: Case) -> dict[str, float]:
    """One case in this process, with the limits of the machine beside it."""
    part, size, model, way, length, folder = case
    torch.set_num_threads(1)
    sizes = SIZES[size]
    if part == "memory":
        return _memory(way, model, sizes, Path(folder))
    if part == "encoder-decoder":
        found = pairs.measure(way, sizes, int(length), Path(folder))
    elif way == GENAI:
        found = _by_genai(sizes, int(length), Path(folder))
    else:
        call = open_way(way, model, sizes, Path(folder)).call
        found = _steps(call, sizes, int(length)) if part == "decode" else _prefill(call, sizes)
    return {**found, **limits(sizes.width, sizes.prompt, 256 if size != "tiny" else 16)}


def _ids(sizes: Sizes, length: int) -> torch.Tensor:
    return torch.randint(
        3, sizes.vocabulary, (1, length), generator=torch.Generator().manual_seed(0)
    )


def _steps(call: Callable[[torch.Tensor, Any], Any], sizes: Sizes, past: int) -> dict[str, float]:
    ids = _ids(sizes, past + sizes.steps)
    cache, taken = call(ids[:, :past], None), []
    for place in range(past, past + sizes.steps):
        begin = time.process_time()
        cache = call(ids[:, place : place + 1], cache)
        taken.append(time.process_time() - begin)
    return {"decode": median(taken[sizes.steps // 5 :])}


def _prefill(call: Callable[[torch.Tensor, Any], Any], sizes: Sizes) -> dict[str, float]:
    ids = _ids(sizes, sizes.prompt)
    call(ids, None)
    return {"prefill": median(seconds(lambda: call(ids, None)) for _ in range(5))}


def _by_genai(sizes: Sizes, past: int, folder: Path) -> dict[str, float]:
    numbers = (past, sizes.prompt, sizes.steps, sizes.vocabulary)
    script = Path(__file__).with_name("genai_step.py")
    done = subprocess.run(
        [os.environ["CACHEFREE_GENAI_PYTHON"], script, folder / GENAI, *map(str, numbers)],
        check=True, capture_output=True, text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _memory(way: str, model: str, sizes: Sizes, folder: Path) -> dict[str, float]:
    preload()
    before = resident_bytes()
    running = open_way(way, model, sizes, folder)
    cache = running.call(_ids(sizes, sizes.prompt), None)
    running.call(_ids(sizes, 1), cache)
    gc.collect()
    return {"resident": resident_bytes() - before}


def ratios(found: Mapping[Case, Mapping[str, float]]) -> list[dict[str, Any]]:
    """A row for each case: its median, and what it is of the limit and of eager torch."""
    rows = []
    for case, values in found.items():
        part, size, model, way, length, folder = case
        sizes = SIZES[size]
        row: dict[str, Any] = {"part": part, "model": model, "way": way, "length": length}
        eager = found.get((part, size, model, "eager", length, folder), {})
        name = {"prefill": "prefill", "memory": "resident"}.get(part, "decode")
        row |= {name: values[name]}
        if name in eager:
            row["over_eager"] = values[name] / eager[name]
        if "resident" in values:
            row["resident"] = values["resident"]
        limit = _limit(part, model, sizes, length, _rates(found))
        if limit is not None:
            row["over_limit"] = values[name] / limit
        rows.append(row)
    return rows


def _rates(found: Mapping[Case, Mapping[str, float]]) -> dict[str, float]:
    names = ("read", "multiply")
    return {
        name: median(values[name] for values in found.values())
        for name in names
        if all(name in values for values in found.values())
    }


def _limit(
    part: str, model: str, sizes: Sizes, length: int, rates: Mapping[str, float]
) -> float | None:
    """The time to read weights and cache once, or that of a prompt's products."""
    if part in ("memory", "encoder-decoder"):
        return None
    weights = weight_bytes(build(model, sizes))
    if part == "decode":
        return (weights + cache_bytes(model, sizes, length)) / rates["read"]
    return 2 * length * weights / 4 / rates["multiply"]
