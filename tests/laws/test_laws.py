"""Every law, where it applies and where it must not, at every small size and at drawn ones."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cachefree.laws import COMMUTATIVE, EXACT_LAWS, LAWS, NO_ELEMENTS

from .equations import (
    BY_NAME,
    Instance,
    drawn,
    fires_and_holds,
    hold,
    situations,
    steps,
)
from .families import Tried
from .identity import IDENTITY
from .join import JOIN
from .products import ATTENTION, LINEAR
from .sequence import MASKS, SEQUENCE
from .shape import SHAPE

TRIED: dict[str, Tried] = IDENTITY | SHAPE | JOIN | SEQUENCE | MASKS | ATTENTION | LINEAR


def instances(part: str) -> list[object]:
    return [
        pytest.param(law, instance, id=f"{law}: {instance}")
        for law, tried in TRIED.items()
        for instance in getattr(tried, part)
    ]


def test_every_law_is_tried_and_has_a_near_miss() -> None:
    assert TRIED.keys() == BY_NAME.keys()
    for law, tried in TRIED.items():
        assert tried.applies, law
        assert tried.near_misses, law


def test_laws_are_named_stated_and_of_a_known_kind() -> None:
    assert len(BY_NAME) == len(LAWS) + 1
    for law in (*LAWS, NO_ELEMENTS):
        assert law.kind in ("exact", "real")
        assert law.statement, law.name
        assert law.ops or law is NO_ELEMENTS
    assert all(law.kind == "exact" for law in EXACT_LAWS)


def test_commutative_operators_commute() -> None:
    assert {op for op in BY_NAME["commute"].ops} == set(COMMUTATIVE)


@pytest.mark.parametrize(("law", "instance"), instances("applies"))
def test_law_applies_and_is_right_at_every_small_size(law: str, instance: Instance) -> None:
    fires_and_holds(law, instance)


@pytest.mark.parametrize(("law", "instance"), instances("near_misses"))
def test_law_leaves_a_near_miss_alone(law: str, instance: Instance) -> None:
    assert law not in {step.law.name for step in steps(instance)}
    for sizes in instance.sizes():
        hold(instance, drawn(instance, sizes), sizes)


@pytest.mark.parametrize("law", TRIED, ids=str)
def test_law_is_right_at_drawn_sizes_and_numbers(law: str) -> None:
    tried = TRIED[law].applies

    @settings(
        max_examples=25,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def at_drawn_sizes(data: st.DataObject) -> None:
        instance = data.draw(st.sampled_from(tried), label="instance")
        sizes, inputs = data.draw(situations(instance), label="situation")
        hold(instance, inputs, sizes)

    at_drawn_sizes()
