"""Peak memory of rewriting a 16-layer, 8192-wide Llama-shaped module on `meta`. Limit: 0.7 GB.

The process is measured as a whole: Python, torch and the rewrite.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

from benchmarks.measuring import in_a_process, keep, show

LIMIT_GB = 0.7


def peak_gb() -> float:
    """Give the most memory that this process ever held.

    Where Linux tells it, the value is this process's own; `ru_maxrss` counts what was there before
    `exec` too.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def measure(step: str) -> dict[str, float]:
    import torch

    import cachefree
    from benchmarks.models import Llama, LlamaConfig

    sizes = LlamaConfig(128_256, layers=16, heads=64, key_heads=8, width=8192, hidden=28_672)
    with torch.device("meta"):
        model = Llama(sizes).eval()
    start = time.process_time()
    if step == "rewrite":
        cachefree.rewrite(model, check="prove")
    parameters = sum(weight.numel() for weight in model.parameters())
    return {
        "peak_gb": peak_gb(),
        "cpu_s": time.process_time() - start,
        "billion_parameters": parameters / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", nargs="?", choices=["import", "rewrite"], help="only this, here")
    options = parser.parse_args()
    if options.step:
        print(json.dumps(measure(options.step)))
        return
    results = {step: in_a_process("benchmarks.meta_memory", step) for step in ("import", "rewrite")}
    rewrite = results["rewrite"]
    show(
        f"Peak memory, {rewrite['billion_parameters']:.1f} billion parameters on meta",
        ["before (GB)", "rewritten (GB)", "limit (GB)", "CPU time (s)"],
        [
            [
                f"{results['import']['peak_gb']:.2f}",
                f"{rewrite['peak_gb']:.2f}",
                LIMIT_GB,
                f"{rewrite['cpu_s']:.1f}",
            ]
        ],
    )
    keep("meta_memory", results)
    sys.exit(rewrite["peak_gb"] > LIMIT_GB)


if __name__ == "__main__":
    main()
