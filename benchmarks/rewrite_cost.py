"""What a proved rewrite costs, against the two captures that it cannot avoid.

Limits: 1.3 times the captures at 4, 16 and 64 layers; 64 layers at most 4.4 times 16. CPU time of
one thread, a process a measurement, every round in a new order, ratios of medians.
"""

import argparse
import json
import sys
import time
from typing import Any

from benchmarks.measuring import keep, show, shuffled_medians

LIMIT, GROWTH_LIMIT = 1.3, 4.4


def capture_both(model: Any) -> None:
    """Capture both paths of `model` with `torch.export`, as one would by hand."""
    import torch
    from torch.export import Dim, export

    prefill_ids, later_ids = (
        torch.zeros(3, 5, dtype=torch.long),
        torch.zeros(3, 7, dtype=torch.long),
    )
    batch, query, past_length = Dim("batch"), Dim("query"), Dim("past")
    ids_dims = {0: batch, 1: query}
    export(model, (prefill_ids,), dynamic_shapes=(ids_dims,), strict=False)
    with torch.no_grad():
        past = model(prefill_ids)[1]
    pair_dims = ({0: batch, 2: past_length},) * 2
    later_dims = (ids_dims, [pair_dims] * len(past))
    export(model, (later_ids, past), dynamic_shapes=later_dims, strict=False)


def measure(what: str, layers: int) -> dict[str, float]:
    import cachefree
    from benchmarks.models import llama

    def run(model: Any) -> None:
        if what == "captures":
            capture_both(model)
        else:
            cachefree.rewrite(model, check="prove")

    run(llama(layers=1))  # what a process pays once, whatever it captures
    model = llama(layers=layers)
    start = time.process_time()
    run(model)
    return {"cpu_s": time.process_time() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=["captures", "rewrite"], help="only this, here")
    parser.add_argument("layers", nargs="?", type=int)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.what:
        print(json.dumps(measure(options.what, options.layers)))
        return
    cases = [(what, layers) for layers in options.depths for what in ("captures", "rewrite")]
    found = shuffled_medians("benchmarks.rewrite_cost", cases, options.repeats)
    rows, results = [], {}
    for layers in options.depths:
        captures, rewrite = (found[what, layers]["cpu_s"] for what in ("captures", "rewrite"))
        rows.append([layers, f"{captures:.2f}", f"{rewrite:.2f}", f"{rewrite / captures:.2f}"])
        results[layers] = {
            "captures_s": captures,
            "rewrite_s": rewrite,
            "ratio": rewrite / captures,
        }
    show(
        f"Rewrite against two captures, CPU time, median of {options.repeats} (limit {LIMIT})",
        ["layers", "captures (s)", "rewrite (s)", "ratio"],
        rows,
    )
    failed = any(result["ratio"] > LIMIT for result in results.values())
    if {16, 64} <= results.keys():
        growth = results[64]["rewrite_s"] / results[16]["rewrite_s"]
        print(f"\n  64 layers cost {growth:.2f} times 16 layers (limit {GROWTH_LIMIT})")
        failed |= growth > GROWTH_LIMIT
    keep("rewrite_cost", results)
    sys.exit(failed)


if __name__ == "__main__":
    main()
