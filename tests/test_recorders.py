"""Containers that calls only write to are no state; one that is read by any other name is."""

from __future__ import annotations

import types

import pytest
import torch

import cachefree

from .models.asked import AskedByAnotherName
from .small import IDS, Small, rewritten_small, small


def test_a_hook_that_only_records_is_no_state() -> None:
    model = small(Small)
    seen: list[torch.Tensor] = []
    model.register_forward_hook(lambda _, __, result: seen.append(result[0]))
    assert rewritten_small(model).report.verdict.is_proof
    assert seen == []


def test_hooks_that_keep_the_last_activation_are_no_state() -> None:
    model = small(Small)
    activations: dict[str, torch.Tensor] = {}

    def recording(name):
        def hook(_, __, output):
            activations[name] = output.detach()

        return hook

    for name in ("emb", "out"):
        model.get_submodule(name).register_forward_hook(recording(name))
    assert rewritten_small(model).report.verdict.is_proof
    assert activations == {}


class Recorder:
    def __init__(self, module):
        self.seen = {}
        module.register_forward_hook(self.hook("emb"))

    def hook(self, name):
        def hook(_, __, output):
            self.seen[name] = output.detach()

        return hook


def test_what_a_recorder_was_given_is_no_change_of_the_model() -> None:
    model = small(Small)
    model.recorder = Recorder(model.emb)
    rewritten = rewritten_small(model)
    origin = rewritten._origin
    assert model.recorder.seen == {}
    torch.testing.assert_close(rewritten(IDS)[0], model(IDS)[0])
    rewritten(IDS)
    assert rewritten._origin is origin
    assert list(model.recorder.seen) == ["emb"]


class TwiceWhatItGives(Small):
    """Once a call has left something in a container, the model doubles what it gives."""

    def was_called(self):
        raise NotImplementedError

    def forward(self, ids, past=None):
        was_called = self.was_called()
        logits, present = super().forward(ids, past)
        return (logits * 2 if was_called else logits), present


WRITTEN: list[int] = []
READ = WRITTEN


class AnotherGlobal(TwiceWhatItGives):
    def was_called(self):
        WRITTEN.append(1)
        return len(READ) > 90


TABLE: dict[str, int] = {}
TABLES = (TABLE,)


class InAGlobalTuple(TwiceWhatItGives):
    def was_called(self):
        was_called = "last" in TABLES[0]
        TABLE["last"] = 1
        return was_called


class AHookWrites(TwiceWhatItGives):
    def __init__(self):
        super().__init__()
        store = self.keep({})

        def hook(*_):
            store["last"] = 1

        self.emb.register_forward_hook(hook)

    def keep(self, store):
        self.held = store
        return store

    def was_called(self):
        return "last" in self.held


class InAnObject(AHookWrites):
    def keep(self, store):
        self.held = types.SimpleNamespace(inner=store)
        return store

    def was_called(self):
        return "last" in self.held.inner


class AskedForByText(AHookWrites):
    def was_called(self):
        return bool(getattr(self, "he" + "ld"))


class InAList(AHookWrites):
    def keep(self, store):
        self.held = [store]
        return store

    def was_called(self):
        return len(self.held[0]) > 0


class AmongTheAttributes(AHookWrites):
    def was_called(self):
        return any("last" in value for value in self.__dict__.values() if isinstance(value, dict))


@pytest.mark.parametrize(
    "build",
    [
        AnotherGlobal,
        InAGlobalTuple,
        AHookWrites,
        InAnObject,
        AskedForByText,
        InAList,
        AmongTheAttributes,
    ],
)
def test_what_is_read_by_another_name_is_state(build: type) -> None:
    with pytest.raises(cachefree.CaptureError, match="keeps state"):
        rewritten_small(small(build))


def test_what_is_read_by_another_name_of_getattr_is_state() -> None:
    with pytest.raises(cachefree.CaptureError, match="keeps state"):
        rewritten_small(small(AskedByAnotherName))
