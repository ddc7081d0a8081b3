"""One decode step: the rewritten module and its ONNX file against the model's own decode path.

Limit: 1.03 times the model's own. Batch 1, one new token, one thread; a process a measurement,
every round in a new order, the median of 7 processes of the median step.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measuring import in_a_process, keep, show, shuffled_medians

LIMIT = 1.03
MODELS, PASTS = ("gpt", "llama"), (64, 512)
WAYS = ("original", "rewritten", "onnxruntime")


def build(name: str) -> Any:
    from benchmarks import models

    return getattr(models, name)(layers=6, width=512, heads=8, vocabulary=8192)


def export(name: str, folder: Path) -> dict[str, float]:
    import cachefree

    cachefree.to_onnx(cachefree.rewrite(build(name)), folder / f"{name}.onnx")
    return {}


def measure(way: str, name: str, folder: Path, steps: int) -> dict[str, float]:
    import torch

    import cachefree

    torch.set_num_threads(1)
    model = build(name)
    decoder: Any = model
    if way == "rewritten":
        decoder = cachefree.rewrite(model)
    elif way == "onnxruntime":
        import onnxruntime

        session_options = onnxruntime.SessionOptions()
        session_options.intra_op_num_threads = 1
        decoder = cachefree.load_onnx(
            folder / f"{name}.onnx",
            providers=["CPUExecutionProvider"],
            session_options=session_options,
        )
    return {str(past): decode_seconds(model, decoder, past, steps) for past in PASTS}


def decode_seconds(model: Any, decoder: Any, past_length: int, steps: int) -> float:
    """Give the median CPU time of one step, the first fifth of the steps left out."""
    import torch

    token = torch.zeros(1, 1, dtype=torch.long)
    times = []
    with torch.inference_mode():
        past = model(torch.zeros(1, past_length, dtype=torch.long))[1]
        for _ in range(steps):
            start = time.process_time()
            decoder(token, past)
            times.append(time.process_time() - start)
    return median(times[steps // 5 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", nargs="?", choices=[*WAYS, "export"], help="only this, here")
    parser.add_argument("model", nargs="?", choices=MODELS)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    if options.way == "export":
        print(json.dumps(export(options.model, options.folder)))
        return
    if options.way:
        print(json.dumps(measure(options.way, options.model, options.folder, options.steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            in_a_process("benchmarks.decode_step", "export", name, folder)
        cases = [(way, name, folder) for name in MODELS for way in WAYS]
        found = shuffled_medians("benchmarks.decode_step", cases, options.repeats)
        ms_of = {
            (way, name, past): 1000 * found[way, name, folder][str(past)]
            for name in MODELS
            for past in PASTS
            for way in WAYS
        }
    rows, results = [], []
    for name in MODELS:
        for past in PASTS:
            own = ms_of["original", name, past]
            for way in WAYS:
                step = ms_of[way, name, past]
                rows.append([name, past, way, f"{step:.2f}", f"{step / own:.2f}"])
                results.append(
                    {"model": name, "past": past, "way": way, "ms": step, "ratio": step / own}
                )
    show(
        f"One decode step, CPU time, median of {options.repeats} processes (limit {LIMIT})",
        ["model", "past", "way", "ms", "ratio"],
        rows,
    )
    keep("decode_step", results)
    sys.exit(any(result["ratio"] > LIMIT for result in results))


if __name__ == "__main__":
    main()
