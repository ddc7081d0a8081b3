"""Serving: a decode step and a prefill of each kind of ONNX cache, against eager torch.

What counts is the ratio to the limit measured in the same run: for a decode step, the time to read
the weights and the cache once, at the rate at which this machine sums a large array; for a prefill,
the time of its matrix products alone. One thread, CPU time; a process a measurement, every round in
a new order, the median of the rounds. `--full` is the model of 124 million weights, and more
lengths.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measuring import keep, show, shuffled_medians

WAYS = ("eager", "concat", "attention", "shared")
SHORT: dict[str, Any] = {
    "layers": 4, "width": 512, "heads": 8, "vocabulary": 8192, "pasts": (64, 512), "rounds": 3,
}  # fmt: skip
FULL: dict[str, Any] = {
    "layers": 12, "width": 768, "heads": 12, "vocabulary": 50257, "pasts": (64, 512, 2048),
    "rounds": 7,
}  # fmt: skip
PREFILL = 64


def build(sizes: dict[str, Any]) -> Any:
    from benchmarks import models

    names = ("layers", "width", "heads", "vocabulary")
    return models.gpt(**{name: sizes[name] for name in names})


def export(sizes: dict[str, Any], folder: Path) -> None:
    import cachefree

    rewritten = cachefree.rewrite(build(sizes), check="off")
    for kind in WAYS[1:]:
        path = cachefree.to_onnx(rewritten, folder / f"{kind}.onnx", kv=kind)  # type: ignore[arg-type]
        found = cachefree.load_onnx(path)
        if found.kv.reasons:
            raise SystemExit(f"kv={kind} is joined: {found.kv}")


def limits(sizes: dict[str, Any]) -> dict[str, float]:
    """The rate of reading in bytes a second, and of products in operations a second."""
    import torch

    large = torch.ones(64 << 20)
    reading = [_time(lambda: large.sum()) for _ in range(5)]
    width = sizes["width"]
    one, other = torch.randn(PREFILL, width), torch.randn(4 * width, width)
    products = [_time(lambda: torch.nn.functional.linear(one, other)) for _ in range(40)]
    return {
        "read": large.numel() * 4 / min(reading),
        "multiply": 2 * PREFILL * width * 4 * width / min(products),
    }


def _time(call: Any) -> float:
    begin = time.process_time()
    call()
    return max(time.process_time() - begin, 1e-9)


def measure(way: str, past: int, sizes: dict[str, Any], folder: Path) -> dict[str, float]:
    import torch

    import cachefree

    torch.set_num_threads(1)
    ids = torch.randint(sizes["vocabulary"], (1, past + 40), generator=torch.Generator())
    if way == "eager":
        model = build(sizes)
        call = lambda new, cache: model(new, cache)  # noqa: E731
        follow = lambda outputs: outputs[1]  # noqa: E731
    else:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        decoder = cachefree.load_onnx(folder / f"{way}.onnx", session_options=options)
        call = lambda new, cache: decoder(input_ids=new, **(cache or {}))  # noqa: E731
        follow = decoder.next_cache
    steps = []
    with torch.inference_mode(way == "eager"):
        prefill = median(_time(lambda: call(ids[:, :PREFILL], None)) for _ in range(3))
        outputs = call(ids[:, :past], None)
        for place in range(past, past + 40):
            begin = time.process_time()
            outputs = call(ids[:, place : place + 1], follow(outputs))
            steps.append(time.process_time() - begin)
    return {"decode": median(steps[8:]), "prefill": prefill, **limits(sizes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", nargs="*")
    parser.add_argument("--full", action="store_true")
    arguments = parser.parse_args()
    if arguments.case:
        way, past, name, folder = arguments.case
        sizes = FULL if name == "full" else SHORT
        print(json.dumps(measure(way, int(past), sizes, Path(folder))))
        return
    name = "full" if arguments.full else "short"
    sizes = FULL if arguments.full else SHORT
    with tempfile.TemporaryDirectory() as directory:
        export(sizes, Path(directory))
        cases = [(way, past, name, directory) for past in sizes["pasts"] for way in WAYS]
        found = shuffled_medians("benchmarks.serving", cases, sizes["rounds"])
    weights = sum(p.numel() for p in {id(p): p for p in build(sizes).parameters()}.values())
    rows, results = [], {}
    rate = median(values["read"] for values in found.values())
    for (way, past, *_), values in found.items():
        cache = 2 * sizes["layers"] * int(str(past)) * sizes["width"]
        limit = (weights + cache) * 4 / rate
        eager = found[("eager", past, name, directory)]
        products = 2 * PREFILL * weights / values["multiply"]
        result = {
            "decode_over_bandwidth": values["decode"] / limit,
            "decode_over_eager": values["decode"] / eager["decode"],
            "prefill_over_products": values["prefill"] / products,
            "prefill_over_eager": values["prefill"] / eager["prefill"],
        }
        results[f"{way}, past {past}"] = result
        rows.append((way, past, *(f"{value:.2f}" for value in result.values())))
    columns = ("way", "past", "decode/limit", "decode/eager", "prefill/limit", "prefill/eager")
    show(f"serving, {name}: ratios of one run", columns, rows)
    keep("serving", {"size": name, "ratios": results, "note": "one run; compare within it only"})


if __name__ == "__main__":
    sys.exit(main())
