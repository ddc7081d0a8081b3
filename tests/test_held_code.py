"""What a model's objects remember, however hidden: told, and refused."""

from __future__ import annotations

import array
import dataclasses
import functools
import itertools
import types
import weakref

import numpy
import pytest
import torch
from torch import nn

import cachefree
from cachefree.reach import reached_by

from .small import IDS, Small, rewritten_small, small


class Counts(Small):
    """From its fourth call on, the model doubles what it gives: then the count stands still."""

    def count(self):
        raise NotImplementedError

    def forward(self, ids, past=None):
        count = self.count()
        logits, present = super().forward(ids, past)
        return (logits * 2 if count > 3 else logits), present


class InATuple(Counts):
    def __init__(self):
        super().__init__()
        self.held = ({"count": 0},)

    def count(self):
        self.held[0]["count"] = min(self.held[0]["count"] + 1, 4)
        return self.held[0]["count"]


class Slotted:
    __slots__ = ("count",)


class SlottedAndMore(Slotted):
    pass


class InAnObject(Counts):
    build = types.SimpleNamespace

    def __init__(self):
        super().__init__()
        self.held = self.build()
        self.held.count = 0

    def count(self):
        self.held.count = min(self.held.count + 1, 4)
        return self.held.count


class InSlots(InAnObject):
    build = Slotted


class BesideSlots(InAnObject):
    build = SlottedAndMore


class InAForeignModule(Counts):
    def __init__(self):
        super().__init__()
        self.held = [nn.Identity()]
        self.held[0].count = 0

    def count(self):
        self.held[0].count = min(self.held[0].count + 1, 4)
        return self.held[0].count


class Stepper:
    def __init__(self):
        self.count = 0

    def __call__(self):
        self.count = min(self.count + 1, 4)
        return self.count

    def step(self):
        return self()


class InACallable(Counts):
    def __init__(self):
        super().__init__()
        self.count = Stepper()


class InAMethodOfAnother(Counts):
    def __init__(self):
        super().__init__()
        self.count = Stepper().step


class InAClosure(Counts):
    def __init__(self):
        super().__init__()
        number = 0

        def count():
            nonlocal number
            number = min(number + 1, 4)
            return number

        self.count = count


class OfAFunction(Counts):
    def __init__(self):
        super().__init__()

        def count():
            count.number = min(count.number + 1, 4)
            return count.number

        count.number = 0
        self.count = count


def _counted(held):
    held["count"] = min(held["count"] + 1, 4)
    return held["count"]


class InAPartial(Counts):
    def __init__(self):
        super().__init__()
        self.count = functools.partial(_counted, {"count": 0})


class InAnArray(Counts):
    def build(self):
        return array.array("l", [0])

    def __init__(self):
        super().__init__()
        self.held = self.build()

    def count(self):
        self.held[0] = min(int(self.held[0]) + 1, 4)
        return int(self.held[0])


class InBytes(InAnArray):
    def build(self):
        return bytearray(1)


class InNumpy(InAnArray):
    def build(self):
        return numpy.zeros(1, int)


class InAnIterator(Counts):
    def __init__(self):
        super().__init__()
        self.held = itertools.count(1)

    def count(self):
        return next(self.held)


class OfWeakKeys(Counts):
    def __init__(self):
        super().__init__()
        self.held = weakref.WeakKeyDictionary()

    def count(self):
        self.held[self] = min(self.held.get(self, 0) + 1, 4)
        return self.held[self]


class MadeByTheFirstCall(Counts):
    held = None

    def count(self):
        if self.held is None:
            self.held = [nn.Identity()]
            self.held[0].number = 0
        self.held[0].number = min(self.held[0].number + 1, 4)
        return self.held[0].number


@pytest.mark.parametrize(
    "build",
    [
        InATuple,
        InAnObject,
        InSlots,
        BesideSlots,
        InAForeignModule,
        InACallable,
        InAMethodOfAnother,
        InAClosure,
        OfAFunction,
        InAPartial,
        InAnArray,
        InBytes,
        InNumpy,
        InAnIterator,
        OfWeakKeys,
        MadeByTheFirstCall,
    ],
)
def test_a_count_is_seen_wherever_it_stands(build: type) -> None:
    with pytest.raises(cachefree.CaptureError, match=r"keeps state (on|outside of) itself"):
        rewritten_small(small(build))


def test_a_count_in_a_hook() -> None:
    model, number = small(Small), 0

    def doubled(_, __, result):
        nonlocal number
        number = min(number + 1, 4)
        logits, present = result
        return (2 * logits if number > 3 else logits), present

    model.register_forward_hook(doubled)
    with pytest.raises(cachefree.CaptureError, match="the variable 'number'"):
        rewritten_small(model)


class SetsBeforeItReads(Small):
    """A number that each call sets anew for its own methods."""

    rows, scale = 0, None

    def forward(self, ids, past=None):
        self.rows = 0 if past is None else past[0].shape[1]
        self.scale = 2.0 if past is None else 2
        return super().forward(ids, past)

    def attend(self, q, k):
        n = q.shape[1]
        place = torch.arange(self.rows, self.rows + n)[:, None]
        hidden = torch.arange(k.shape[1]) > place
        return (q @ k.mT / self.scale).masked_fill(hidden, -torch.inf).softmax(-1)


def test_what_each_call_sets_before_it_reads_it_is_no_state() -> None:
    model = small(SetsBeforeItReads)
    rewritten = rewritten_small(model)
    assert rewritten.report.verdict.is_proof
    past = seen = None
    for ids in (IDS[:, :1], IDS[:, 1:4], IDS[:, 4:]):
        (expected, past), (logits, seen) = model(ids, past), rewritten(ids, seen)
        torch.testing.assert_close(logits, expected)
    assert not rewritten._origin.has_changed()


class ReadsItFirst(SetsBeforeItReads):
    def forward(self, ids, past=None):
        self.first = self.rows if past is None else 0
        logits, present = super().forward(ids, past)
        return logits + self.first, present


def test_what_a_call_reads_before_it_sets_it_is_state() -> None:
    with pytest.raises(cachefree.CaptureError, match="keeps state on itself"):
        rewritten_small(small(ReadsItFirst))


class AsksWhatItIs(SetsBeforeItReads):
    """What an earlier call left is not computed with, but looked at."""

    def forward(self, ids, past=None):
        is_after = self.asks()
        logits, present = super().forward(ids, past)
        return (2 * logits if is_after else logits), present


class AsksForAnInt(AsksWhatItIs):
    rows = None

    def asks(self):
        return isinstance(self.rows, int)


class AsksASet(AsksWhatItIs):
    def asks(self):
        return self.rows in {3, 5}


class AsksForTheAttribute(AsksWhatItIs):
    def asks(self):
        return "scale" in vars(self)


@pytest.mark.parametrize("build", [AsksForAnInt, AsksASet, AsksForTheAttribute])
def test_what_a_call_looks_at_before_it_sets_it_is_state(build: type) -> None:
    model = small(build)
    with pytest.raises(cachefree.CaptureError, match="keeps state on itself"):
        rewritten_small(model)
    model(IDS)
    if build is not AsksForTheAttribute:  # which is there for good now
        with pytest.raises(cachefree.CaptureError, match="keeps state on itself"):
            rewritten_small(model)


def test_a_model_that_was_called_before() -> None:
    model = small(SetsBeforeItReads)
    model(IDS)
    assert rewritten_small(model).report.verdict.is_proof


@dataclasses.dataclass
class Settings:
    scale: float = 2.0


class ReadsSettings(Small):
    def __init__(self):
        super().__init__()
        self.settings = Settings()

    def forward(self, ids, past=None):
        logits, present = super().forward(ids, past)
        return logits * self.settings.scale, present


def test_what_dataclass_keeps_to_write_an_object_is_no_memory_of_the_model():
    assert not [name for name, value in reached_by(ReadsSettings()).others if type(value) is set]
    model = small(ReadsSettings)
    rewritten = rewritten_small(model)
    model.settings.scale = 3.0
    torch.testing.assert_close(rewritten(IDS), model(IDS))
