"""Where a sequence of operators is cut: few values cross, and each part has its share of weights.

Both an ONNX graph that goes to several files and a torch.fx graph that goes to several processes
are cut so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["crossings", "cut_places"]

_WINDOW = 0.5  # of a part's share of the weights: how far a cut may be from the even one


def crossings(count: int, lives: Iterable[tuple[int, int, int]]) -> list[int]:
    """What a cut before each operator would have to hand over.

    Args:
        count: How many operators.
        lives: Of each value: the operator that makes it, the last one that reads it, and what it
            costs to hand it over.

    Returns:
        One number for each place from before the first operator to behind the last one.
    """
    changes = [0] * (count + 2)
    for made, last, cost in lives:
        if last > made:
            changes[made + 1] += cost
            changes[last + 1] -= cost
    found, cost = [], 0
    for change in changes[: count + 1]:
        cost += change
        found.append(cost)
    return found


def cut_places(weight: Sequence[int], crossing: Sequence[int], count: int) -> list[int]:
    """The operators before which to cut.

    Args:
        weight: The bytes of weights that the operators before each place read.
        crossing: What a cut at each place hands over, see `crossings`.
        count: How many parts; at most the number of operators.

    Returns:
        ``count - 1`` places, ascending, each between 1 and the number of operators less one.
    """
    operators = len(weight) - 1
    total = weight[-1]
    cuts: list[int] = []
    for number in range(1, count):
        even = total * number / count
        nearest = min(range(1, operators), key=lambda place: abs(weight[place] - even))
        after = cuts[-1] + 1 if cuts else 1
        near = [
            place
            for place in range(after, operators - (count - number - 1))
            if abs(weight[place] - even) <= _WINDOW * total / count or place == nearest
        ]
        cuts.append(
            min(near or [after], key=lambda place: (crossing[place], abs(weight[place] - even)))
        )
    return cuts
