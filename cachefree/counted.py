"""Arguments in Python that count what the cache holds, beside a cache that is an argument."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cachefree.faithful import TorchCall
from cachefree.places import Place

__all__ = ["Count", "counts_of", "is_a_count", "numbers_in"]

_COUNTS = re.compile(
    r"pos|start|offset|past|seen|^n_(cached|prev)|"
    r"(cur|cached?|prefix|prev(ious)?|kv|total|seq|context)_?(len|ind|idx|size)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Count:
    """An argument that is 0 on a first call and counts what is past on later ones.

    Attributes:
        place: Where the call takes it.
        is_required: Whether a call may not leave it out.
    """

    place: Place
    is_required: bool

    @property
    def name(self) -> str:
        """Of the argument."""
        return self.place.parameter


def counts_of(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Count, ...]:
    """The arguments that are the number 0 on a first call and have the name of a count."""
    found = []
    for position, (name, parameter) in enumerate(signature.parameters.items()):
        is_given = position < len(args)
        value = args[position] if is_given else kwargs.get(name, parameter.default)
        if type(value) is int and value == 0 and _COUNTS.search(name):
            place = Place(name, position if is_given else None)
            found.append(Count(place, parameter.default is parameter.empty))
    return tuple(found)


def is_a_count(
    with_count: Counter[int] | None,
    without: Counter[int] | None,
    lengths: tuple[int, int],
    *,
    is_required: bool,
) -> bool:
    """Whether an argument is the past's length, as far as a later call tells.

    One that is added to a length that the code reads off the cache by itself is a shift of
    positions, which a caller leaves at 0. So is one that the call does not read.

    Args:
        with_count: The numbers in a later call's computation where the argument is the length.
        without: Those where it is 0; None where the call does not run then.
        lengths: The past's length and the number of new tokens.
        is_required: Whether a call may not leave the argument out.
    """
    if with_count is None or without is None:
        return with_count is not None
    past, tokens = lengths
    new = with_count - without
    return is_required if not new else not new.keys() & {2 * past, 2 * past + tokens}


def numbers_in(calls: Iterable[TorchCall]) -> Counter[int]:
    """The integers among the arguments of calls, those of slices too; no sizes of tensors."""
    return Counter(number for call in calls for number in _integers(call.args))


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, tuple) and value[:1] != ("tensor",):
        for part in value:
            yield from _integers(part)
    elif type(value) is int:
        yield value
