"""Which ways the conditional jumps of code went: all that ran, whatever runs in between."""

from __future__ import annotations

import itertools
import sys

import pytest

from cachefree.jumps import Jumps, unwatched, watched_jumps


def sign(n):
    if n < 0:
        return -1
    return 1


def signs_of(numbers):
    return [sign(n) for n in numbers]


def ways_of(ways: Jumps, function) -> list[set[bool]]:
    """In the order of the code."""
    found = {offset: taken for (code, offset), taken in ways.items() if code is function.__code__}
    return [found[offset] for offset in sorted(found)]


@pytest.mark.parametrize(
    ("numbers", "ways"), [([], []), ([3], [{True}]), ([-3], [{False}]), ([3, -3], [{True, False}])]
)
def test_the_ways_that_were_gone(numbers, ways) -> None:
    seen: Jumps = {}
    with watched_jumps(seen):
        signs_of(numbers)
    assert ways_of(seen, sign) == ways


def test_a_jump_on_an_object_whose_truth_is_computed_elsewhere() -> None:
    class Asked:
        def __bool__(self):
            with unwatched():
                return sign(1) > 0

    def choose(asked):
        return 1 if asked else 2

    seen: Jumps = {}
    with watched_jumps(seen):
        assert choose(Asked()) == 1
    assert ways_of(seen, choose) == [{False}]
    assert ways_of(seen, sign) == []


def test_a_generator_is_followed_from_round_to_round() -> None:
    def parities():
        for n in itertools.count():
            yield "odd" if n % 2 else "even"

    seen: Jumps = {}
    with watched_jumps(seen):
        assert list(itertools.islice(parities(), 3)) == ["even", "odd", "even"]
    assert {True, False} in ways_of(seen, parities)


def test_what_was_traced_before_is_traced_again() -> None:
    before = sys.gettrace()
    with watched_jumps({}), unwatched():
        assert sys.gettrace() is None
    assert sys.gettrace() is before


def test_code_without_jumps_is_not_followed() -> None:
    def plain(n):
        return n + 1

    seen: Jumps = {}
    with watched_jumps(seen):
        assert plain(1) == 2
    assert ways_of(seen, plain) == []
