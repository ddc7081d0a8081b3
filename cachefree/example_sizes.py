"""Example sizes of a capture: distinct, at least 2, and such that the model runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from cachefree.calls import Call
from cachefree.capture import Captured, capture
from cachefree.errors import CaptureError
from cachefree.fake_runs import run_on_fakes
from cachefree.loops import LEAST_ROUNDS, TooFewRoundsError

__all__ = ["capture_where_it_runs", "hints_for", "unlike"]

PAST = 7
_USUAL = {"batch": 5, "query": 3, "encoder": 9}
_MOST_TRIED = 40
_MOST_MORE = 1024  # tokens


def hints_for(names: Iterable[str]) -> dict[str, int]:
    """Example sizes: distinct, at least 2, and unlikely to be a constant of the model."""
    spare = iter((11, 13, 17, 19, 23, 29))
    return {name: _USUAL[name] if name in _USUAL else next(spare) for name in names}


def unlike(size: int, hints: Mapping[str, int]) -> int:
    """A size near the wanted one that equals no other example size: equal sizes would be tied.

    Nor is it a multiple of the new tokens, where that is to be had: a ``view`` would be read as one
    that splits them.
    """
    wanted = [size, *range(size - 1, 1, -1), *range(size + 1, size + len(hints) + 9)]
    free = [candidate for candidate in wanted if candidate not in hints.values()]
    tokens = hints.get("query", size + 1)
    best: int = next((candidate for candidate in free if candidate % tokens), free[0])
    return best


def capture_where_it_runs(
    model: nn.Module,
    call: Call,
    hints: Mapping[str, int],
    asked: Mapping[str, int] | None = None,
    *,
    settled: Iterable[str] = (),
) -> tuple[Captured, dict[str, int]]:
    """Captures a path at the example sizes, or at smaller ones where the model has a limit.

    Args:
        model: Any module.
        call: How to call it.
        hints: Example sizes.
        asked: Sizes by which the path's own questions are answered.
        settled: Names of sizes that are to stay.

    Returns:
        The captured path, and the example sizes.

    Raises:
        CaptureError: it cannot be traced.
    """
    hints = dict(hints)
    try:
        return capture(model, call, hints, asked, is_watched=True), hints
    except TooFewRoundsError as error:
        more = _with_more_rounds(hints, error.count)
        if more is None or asked:
            raise
        return capture(model, call, more, asked, is_watched=True), more
    except CaptureError:
        if _runs(model, call, {**hints, **(asked or {})}):
            raise
        for smaller in itertools.islice(_smaller(hints, frozenset(settled)), _MOST_TRIED):
            if _runs(model, call, {**smaller, **(asked or {})}):
                return capture(model, call, smaller, asked, is_watched=True), smaller
        raise


def _with_more_rounds(hints: Mapping[str, int], count: Any) -> dict[str, int] | None:
    """Example sizes with so many more tokens that a loop has enough rounds; None where none do.

    Args:
        hints: Example sizes.
        count: How often the loop runs, as an expression of sizes.
    """
    known = {str(symbol): symbol for symbol in count.free_symbols}
    name = next((name for name in ("query", *known) if name in known and name in hints), None)
    if name is None:
        return None
    others = {size for other, size in hints.items() if other != name}
    for size in range(hints[name] + 1, hints[name] + _MOST_MORE):
        sizes = {**hints, name: size}
        values = {symbol: sizes[at] for at, symbol in known.items() if at in sizes}
        if size not in others and count.subs(values) >= LEAST_ROUNDS:
            return sizes
    return None


def _runs(model: nn.Module, call: Call, sizes: Mapping[str, int]) -> bool:
    try:
        run_on_fakes(model, call, sizes)
    except Exception:  # noqa: BLE001 - a size that the model does not take is what is asked
        return False
    return True


def _smaller(hints: Mapping[str, int], settled: frozenset[str]) -> Iterator[dict[str, int]]:
    """Distinct sizes, none larger than the hints, the largest first."""
    names = [name for name in hints if name not in settled]
    choices = [range(hints[name], 1, -1) for name in names]
    largest_first = sorted(
        itertools.product(*choices) if len(names) < 4 else zip(*choices, strict=False),
        key=lambda sizes: -sum(sizes),
    )
    for sizes in largest_first:
        found = {**hints, **dict(zip(names, sizes, strict=True))}
        if len(set(found.values())) == len(found) and found != hints:
            yield found
