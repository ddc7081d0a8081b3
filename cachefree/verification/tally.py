"""What was counted, and what differed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from cachefree.verification.tolerance import Comparison

__all__ = ["Difference", "Tally"]


@dataclass(frozen=True)
class Difference:
    """Where an implementation is not the original.

    Attributes:
        backend: Which.
        place: In words: the output and the call.
        why: What differs.
        shapes: The shapes of the call's inputs.
    """

    backend: str
    place: str
    why: str
    shapes: str = ""


@dataclass
class Tally:
    """What was run so far.

    Attributes:
        generations: Plans that ran.
        calls: Calls of the original.
        invariant: Generations whose chunks gave what one long call gives, in the original.
        chunked: Generations for which this was asked.
        differences: Backend → the largest absolute difference.
        exact: Backend → outputs with the original's bits.
        outputs: Backend → outputs compared.
    """

    generations: int = 0
    calls: int = 0
    invariant: int = 0
    chunked: int = 0
    differences: dict[str, float] = field(default_factory=dict)
    exact: Counter[str] = field(default_factory=Counter)
    outputs: Counter[str] = field(default_factory=Counter)

    def add(self, backend: str, comparison: Comparison) -> None:
        """Counts one output."""
        self.outputs[backend] += 1
        self.exact[backend] += comparison.has_same_bits
        self.differences[backend] = max(self.differences.get(backend, 0.0), comparison.difference)
