"""What this machine can do, measured in the process that measures something else."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

__all__ = ["limits", "preload", "resident_bytes", "seconds"]


def seconds(call: Callable[[], Any]) -> float:
    """The CPU time of a call."""
    begin = time.process_time()
    call()
    return max(time.process_time() - begin, 1e-9)


def limits(width: int, tokens: int, megabytes: int = 256) -> dict[str, float]:
    """The rate of reading in bytes a second, and of products in operations a second.

    Args:
        width: The products are of that width, of so many tokens, with a matrix four times as wide.
        tokens: How many rows.
        megabytes: How much is read; more than the caches of the machine hold.
    """
    import torch

    large = torch.ones(megabytes << 18)
    reading = [seconds(lambda: large.sum()) for _ in range(5)]
    one, other = torch.randn(tokens, width), torch.randn(4 * width, width)
    products = [seconds(lambda: torch.nn.functional.linear(one, other)) for _ in range(40)]
    return {
        "read": large.numel() * 4 / min(reading),
        "multiply": 2 * tokens * width * 4 * width / min(products),
    }


def resident_bytes() -> int:
    """The memory that this process has now."""
    import os

    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def preload() -> None:
    """Imports all that any way needs, so that what is measured behind it is the model."""
    import gc

    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401

    import cachefree.onnx.session  # noqa: F401

    gc.collect()
