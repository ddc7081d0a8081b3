"""Instances of the laws of dimensions of size 1."""

from __future__ import annotations

from .equations import Instance
from .families import Family, Tried

ONES: Family = {
    "ones-of-elements": Tried(
        (
            Instance("in the middle", ("b 1 4",), lambda x: x.exp()),
            Instance("of both", ("b 1 4", "b 1 4"), lambda x, y: x * y),
            Instance("of one, in front", ("b 4", "1 4"), lambda x, y: x + y),
            Instance("one row for all", ("b 3 1", "1 3 1"), lambda x, y: x - y),
            Instance("down to a number", ("1", "1 1"), lambda x, y: x * y),
            Instance("a cast", ("b 1",), lambda x: x.half()),
        ),
        (
            Instance("nothing of size 1", ("b 4", "4"), lambda x, y: x * y),
            Instance(
                "a number of another dtype counts less", ("3", "1"), lambda x, y: x.half() * y
            ),
            Instance("a sum over all", ("b 1 4",), lambda x: x.cumsum(2)),
        ),
    ),
}
