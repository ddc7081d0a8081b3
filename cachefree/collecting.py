"""Python's garbage collection during work that makes many objects of which few are garbage."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["collected_seldom"]

_OBJECTS = 100_000


@contextlib.contextmanager
def collected_seldom() -> Iterator[None]:
    """Lets that many objects be made before cycles are looked for, as a graph's objects stay.

    What Python was told before holds again afterwards.
    """
    before = gc.get_threshold()
    if before[0]:  # 0 is never
        gc.set_threshold(max(before[0], _OBJECTS), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
