"""Every law, where it applies and where it must not, at every small size and at drawn ones."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cachefree.laws import COMMUTATIVE, EXACT_LAWS, LAWS, NO_ELEMENTS
from cachefree.laws.identity import _WIDER

from .equations import (
    BY_NAME,
    MORE_LAWS,
    Instance,
    drawn,
    fires_and_holds,
    hold,
    same_bits,
    situations,
    special,
    steps,
)
from .families import Tried
from .identity import IDENTITY
from .join import JOIN
from .ones import ONES
from .products import ATTENTION, LINEAR
from .sequence import MASKS, SEQUENCE
from .shape import SHAPE
from .states import STATES
from .tables import TABLES

TRIED: dict[str, Tried] = (
    IDENTITY | SHAPE | JOIN | SEQUENCE | MASKS | ATTENTION | LINEAR | STATES | TABLES | ONES
)

ELSEWHERE = {"no-token", "one-token"}  # their left sides are loops: tests/test_loops.py


def instances(part: str) -> list[object]:
    return [
        pytest.param(law, instance, id=f"{law}: {instance}")
        for law, tried in TRIED.items()
        for instance in getattr(tried, part)
    ]


def test_every_law_is_tried_and_has_a_near_miss() -> None:
    assert TRIED.keys() | ELSEWHERE == BY_NAME.keys()
    for law, tried in TRIED.items():
        assert tried.applies, law
        assert tried.near_misses, law


def test_laws_are_named_stated_and_of_a_known_kind() -> None:
    assert len(BY_NAME) == len(LAWS) + len(MORE_LAWS) + 1
    for law in (*LAWS, *MORE_LAWS, NO_ELEMENTS):
        assert law.kind in ("exact", "real")
        assert law.statement, law.name
        assert law.ops or law is NO_ELEMENTS
    assert all(law.kind == "exact" for law in EXACT_LAWS)


@pytest.mark.parametrize("op", COMMUTATIVE, ids=str)
def test_commutative_operators_commute(op: torch._ops.OpOverload) -> None:
    dtypes = [torch.bool, torch.int64, torch.float16, torch.float32]
    if "bitwise" in str(op):
        dtypes = dtypes[:2]
    for seed, (one, other) in enumerate(itertools.product(dtypes, dtypes)):
        generator = torch.Generator().manual_seed(seed)
        x, y = special((97,), one, generator), special((3, 1), other, generator)
        assert same_bits(op(x, y), op(y, x)), (one, other)


@pytest.mark.parametrize("narrow", _WIDER, ids=str)
def test_a_wider_dtype_on_the_way_changes_no_cast(narrow: torch.dtype) -> None:
    numbers = special((4096,), narrow, torch.Generator().manual_seed(1))
    if not narrow.is_floating_point and narrow != torch.bool:
        info = torch.iinfo(narrow)
        numbers = torch.randint(info.min, info.max + 1, (4096,)).to(narrow)
        numbers[:4] = torch.tensor([info.min, info.max, 0, 1], dtype=narrow)
    for wide in _WIDER[narrow]:
        for target in {*_WIDER, *_WIDER[narrow], torch.int64}:
            through = numbers.to(wide).to(target)
            assert same_bits(through, numbers.to(target)), (wide, target)


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
