"""What `import cachefree` adds to `import torch`: medians over fresh processes. Limit: 50 ms.

Each process imports torch and then cachefree, each timed alone, so that torch's own scatter, larger
than the limit, stays out of the difference.
"""

import argparse
import json
import sys
import time
from statistics import median

from benchmarks.measuring import in_a_process, keep, show

LIMIT_MS = 50


def measure() -> dict[str, float]:
    milliseconds = {}
    for module in ("torch", "cachefree"):
        start = time.process_time()
        __import__(module)
        milliseconds[module] = 1000 * (time.process_time() - start)
    return milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=["measure"], help="only one process, this one")
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    if options.what:
        print(json.dumps(measure()))
        return
    found = [in_a_process("benchmarks.import_time", "measure") for _ in range(options.repeats)]
    torch_ms, added_ms = (median(one[module] for one in found) for module in ("torch", "cachefree"))
    show(
        f"Import, CPU time, median of {options.repeats} processes",
        ["torch (ms)", "cachefree adds (ms)", "limit (ms)"],
        [[f"{torch_ms:.0f}", f"{added_ms:.1f}", LIMIT_MS]],
    )
    keep("import_time", {"torch_ms": torch_ms, "added_ms": added_ms})
    sys.exit(added_ms > LIMIT_MS)


if __name__ == "__main__":
    main()
