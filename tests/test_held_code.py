"""What a model's objects remember, however hidden: told, and refused."""

from __future__ import annotations

import array
import functools
import itertools
import types
import weakref

import numpy
import pytest
import torch
from torch import nn

import cachefree

from .small import Small, rewritten_small, small


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


def test_a_hook_that_only_records_is_no_state() -> None:
    model = small(Small)
    seen: list[torch.Tensor] = []
    model.register_forward_hook(lambda _, __, result: seen.append(result[0]))
    assert rewritten_small(model).report.verdict.is_proof
    assert seen == []
