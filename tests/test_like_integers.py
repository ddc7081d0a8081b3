"""Code that asks what a size is: heard where it can be, refused where not, and else left alone."""

from __future__ import annotations

import collections
import enum
import logging
import types
from typing import Any

import pytest
import torch

import cachefree
from cachefree.remembered import memory_of

from .small import IDS, Small, rewritten_small, small

LOG = logging.getLogger(__name__)
NOTHING = object()
SEVEN = 7


class Kind(enum.IntEnum):
    CAUSAL = 1


class Careful(Small):
    """Asks for classes and objects as careful people do."""

    kind = Kind.CAUSAL

    def attend(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        rows = k.shape[1]
        if not isinstance(rows, int) or isinstance(rows, bool):
            raise TypeError(f"{rows:d} is no length")
        pages, rest = divmod(rows, 4)
        LOG.debug(f"{pages:3d} pages, {rest} rows of {rows.real}")  # noqa: G004
        if self.kind is Kind.CAUSAL and q is not NOTHING and type(q) is torch.Tensor:
            return super().attend(q, k) * (pages + rest + 1)
        return q


def test_careful_code_is_taken() -> None:
    model = small(Careful)
    rewritten = rewritten_small(model)
    past: Any = None
    mine: Any = None
    with torch.no_grad():
        for length in (5, 1, 3, 4):
            theirs, past = model(IDS[:, :length], past)
            ours, mine = rewritten(IDS[:, :length], mine)
            torch.testing.assert_close(ours, theirs)


class Identical(Small):
    def attend(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return super().attend(q, k) * (2 if k.shape[1] is SEVEN else 1)


def test_identity_of_numbers_is_refused_in_words() -> None:
    with pytest.raises(cachefree.CaptureError) as caught:
        rewritten_small(small(Identical))
    assert "asks whether two numbers are one object" in str(caught.value)
    assert "test_like_integers.py" in str(caught.value)
    assert "Compare numbers with ==" in str(caught.value)


def test_nothing_of_it_is_left_behind() -> None:
    before = dict(vars(torch.SymInt)), dict(globals())
    rewritten_small(small(Careful))
    assert dict(vars(torch.SymInt)) == before[0]
    assert "isinstance" not in globals()
    assert globals() == before[1]


class Slots:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


def _counted(counter: Any) -> None:
    counter["calls"] += 1


def _named(space: Any) -> None:
    space.calls = 1


def _slotted(slots: Any) -> None:
    slots.count += 1


def _nested(nested: Any) -> None:
    nested[0]["calls"].append(1)


def _written(tensor: Any) -> None:
    tensor.add_(1)


def _in_array(array: Any) -> None:
    array[0] += 1


@pytest.mark.parametrize(
    ("value", "change"),
    [
        (collections.Counter(), _counted),
        (types.SimpleNamespace(), _named),
        (Slots(), _slotted),
        (({"calls": []},), _nested),
        (torch.zeros(1), _written),
        (bytearray(1), _in_array),
        (torch.zeros(2).numpy(), _in_array),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_change_is_seen_however_deep(value: Any, change: Any) -> None:
    before = memory_of([value])
    assert memory_of([value]) == before
    change(value)
    assert memory_of([value]) != before


def test_what_refers_to_itself_is_walked_once() -> None:
    circle: list[Any] = [1]
    circle.append(circle)
    assert memory_of([circle]) == memory_of([circle])
