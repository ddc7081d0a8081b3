"""One decode step: the rewritten module and its ONNX file against the model's own decode path.

Limit: 1.03 times the model's own. Batch 1, one new token, one thread. Processes differ by more than
that in where their memory lies, so each measures the model's own step and the other one in turns;
the ratio is that of its medians, and the median of 7 processes, every round in a new order, counts.
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
WAYS = ("rewritten", "onnxruntime")


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
    found = {}
    for past in PASTS:
        own, other = decode_seconds(model, decoder, past, steps)
        found |= {f"own_{past}": own, f"step_{past}": other, f"ratio_{past}": other / own}
    return found


def decode_seconds(model: Any, decoder: Any, past_length: int, steps: int) -> tuple[float, float]:
    """Give the median CPU time of the model's step and of the other's, taken in turns.

    The first fifth of the steps is left out.
    """
    import torch

    token = torch.zeros(1, 1, dtype=torch.long)
    times: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        past = model(torch.zeros(1, past_length, dtype=torch.long))[1]
        for _ in range(steps):
            for run, taken in zip((model, decoder), times, strict=True):
                start = time.process_time()
                run(token, past)
                taken.append(time.process_time() - start)
    own, other = (median(taken[steps // 5 :]) for taken in times)
    return own, other


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
    rows, results = [], []
    for name in MODELS:
        for past in PASTS:
            for way in WAYS:
                of = found[way, name, folder]
                own, step = 1000 * of[f"own_{past}"], 1000 * of[f"step_{past}"]
                ratio = of[f"ratio_{past}"]
                rows.append([name, past, way, f"{own:.2f}", f"{step:.2f}", f"{ratio:.3f}"])
                results.append(
                    {
                        "model": name,
                        "past": past,
                        "way": way,
                        "own_ms": own,
                        "ms": step,
                        "ratio": ratio,
                    }
                )
    show(
        f"One decode step, CPU time, median of {options.repeats} processes (limit {LIMIT})",
        ["model", "past", "way", "own (ms)", "step (ms)", "ratio"],
        rows,
    )
    keep("decode_step", results)
    sys.exit(any(result["ratio"] > LIMIT for result in results))


if __name__ == "__main__":
    main()
