"""State that a model's code keeps outside of the model, and what it hides from a capture."""

from __future__ import annotations

import functools
import random
import sys
from collections import OrderedDict
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import cachefree

from .small import IDS, Small, rewritten_small, small

COUNT = 0
SEEN: list[int] = []
MEMORY: dict[str, torch.Tensor] = {}
RECORDED: list[torch.Tensor] = []
GENERATOR = numpy.random.default_rng(3)
ONE = 1


class CountsInAGlobal(Small):
    def forward(self, ids, past=None):
        global COUNT
        COUNT += 1
        logits, present = super().forward(ids, past)
        return (logits * 2 if COUNT > 90 else logits), present


class CountsInAList(Small):
    def forward(self, ids, past=None):
        SEEN.append(1)
        logits, present = super().forward(ids, past)
        return (logits * 2 if len(SEEN) > 90 else logits), present


class RemembersInADefault(Small):
    def forward(self, ids, past=None, store={}):  # noqa: B006 - what is tested
        store["calls"] = store.get("calls", 0) + 1
        logits, present = super().forward(ids, past)
        return (logits * 2 if store["calls"] > 90 else logits), present


class CountsOnItsClass(Small):
    calls = 0

    def forward(self, ids, past=None):
        type(self).calls += 1
        logits, present = super().forward(ids, past)
        return (logits * 2 if self.calls > 90 else logits), present


class RemembersATensor(Small):
    def forward(self, ids, past=None):
        if "scale" not in MEMORY:
            MEMORY["scale"] = torch.full((12,), 2.0)
        logits, present = super().forward(ids, past)
        return logits * MEMORY["scale"], present


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (CountsInAGlobal, "the global COUNT"),
        (CountsInAList, "the global SEEN"),
        (RemembersInADefault, "the default 'store'"),
        (CountsOnItsClass, "CountsOnItsClass.calls"),
        (RemembersATensor, "the global MEMORY"),
    ],
)
def test_state_outside_of_the_model_is_refused_and_put_back(build: type, name: str) -> None:
    with pytest.raises(cachefree.CaptureError, match="keeps state outside of itself") as caught:
        rewritten_small(small(build))
    assert name in str(caught.value)
    assert (COUNT, SEEN, MEMORY, CountsOnItsClass.calls) == (0, [], {}, 0)


class CountsInAnotherFile(Small):
    def forward(self, ids, past=None):
        from tests import small as other

        other.CALLS.append(1)
        logits, present = super().forward(ids, past)
        return (logits * 2 if len(other.CALLS) > 90 else logits), present


def test_what_a_call_imports_is_followed() -> None:
    with pytest.raises(cachefree.CaptureError, match="keeps state outside of itself") as caught:
        rewritten_small(small(CountsInAnotherFile))
    assert "tests.small.CALLS" in str(caught.value)


def test_what_no_call_imports_is_not_run(tmp_path, monkeypatch) -> None:
    class Trained(Small):
        def train_it(self) -> None:
            import a_script_that_trains  # noqa: F401

        def counted(self) -> int:
            import a_module_that_counts

            a_module_that_counts.CALLS.append(1)
            return len(a_module_that_counts.CALLS)

        def forward(self, ids, past=None):
            logits, present = super().forward(ids, past)
            return (logits * 2 if self.counted() > 90 else logits), present

    for name in ("a_script_that_trains", "a_module_that_counts"):
        (tmp_path / f"{name}.py").write_text("CALLS = []\n", encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(cachefree.CaptureError, match=r"a_module_that_counts\.CALLS"):
        rewritten_small(small(Trained))
    assert sys.modules["a_module_that_counts"].CALLS == []
    assert "a_script_that_trains" not in sys.modules


@functools.lru_cache
def remembered(by: int) -> float:
    return by * FACTOR


@functools.lru_cache(None)
def remembered_rows(by: int) -> torch.Tensor:
    return torch.full((12,), by * FACTOR)


FACTOR = 2.0


@pytest.mark.parametrize("function", [remembered, remembered_rows])
def test_what_is_remembered_has_to_be_what_would_come_out_now(function, monkeypatch) -> None:
    class Remembers(Small):
        def forward(self, ids, past=None):
            logits, present = super().forward(ids, past)
            return logits * function(3), present

    function(3)
    assert rewritten_small(small(Remembers)).report.verdict.is_proof
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    with pytest.raises(cachefree.CaptureError, match="which it would not give any more"):
        rewritten_small(small(Remembers))


class Records(Small):
    def forward(self, ids, past=None):
        logits, present = super().forward(ids, past)
        RECORDED.append(logits)
        return logits, present


def test_what_is_only_recorded_is_no_state() -> None:
    assert rewritten_small(small(Records)).report.verdict.is_proof
    assert RECORDED == []


class LazyTable(OrderedDict):
    """Loads its entries when they are listed, as tables of classes by name do."""

    def __init__(self, *entries: Any) -> None:
        super().__init__(*entries)
        self.loaded: list[str] = []

    def load(self) -> list[Any]:
        self.loaded.append("loaded")
        return [(name, name.upper()) for name in self.keys()]

    def items(self) -> Any:
        return self.load()

    def values(self) -> Any:
        return [value for _, value in self.load()]


TABLE = LazyTable({"scale": 2.0})


class LooksUp(Small):
    def forward(self, ids, past=None):
        logits, present = super().forward(ids, past)
        return logits * TABLE["scale"], present


class HoldsATable(Small):
    def __init__(self) -> None:
        super().__init__()
        self.table = LazyTable({"scale": 2.0})

    def forward(self, ids, past=None):
        logits, present = super().forward(ids, past)
        return logits * self.table["scale"], present


@pytest.mark.parametrize("build", [LooksUp, HoldsATable])
def test_a_table_that_loads_its_entries_is_not_asked_to(build: type) -> None:
    model = small(build)
    assert rewritten_small(model).report.verdict.is_proof
    assert getattr(model, "table", TABLE).loaded == []


class DrawsFromNumpy(Small):
    def forward(self, ids, past=None):
        logits, present = super().forward(ids, past)
        return (logits * 2 if GENERATOR.random() > 2 else logits), present


class DrawsFromItsOwn(Small):
    def __init__(self) -> None:
        super().__init__()
        self.generator = random.Random(3)

    def forward(self, ids, past=None):
        logits, present = super().forward(ids, past)
        return (logits * 2 if self.generator.random() > 2 else logits), present


@pytest.mark.parametrize("build", [DrawsFromNumpy, DrawsFromItsOwn])
def test_generators_outside_of_torch_are_heard_and_put_back(build: type) -> None:
    model = small(build)
    before = (str(GENERATOR.bit_generator.state), getattr(model, "generator", random).getstate())
    with pytest.raises(cachefree.CaptureError, match="random numbers outside of torch"):
        rewritten_small(model)
    after = (str(GENERATOR.bit_generator.state), getattr(model, "generator", random).getstate())
    assert after == before


@functools.lru_cache
def waves(rows: int) -> torch.Tensor:
    return torch.arange(rows * 12).view(rows, 12).sin()


class Memoised(Small):
    def forward(self, ids, past=None):
        logits, present = super().forward(ids, past)
        start = present[0].shape[1] - ids.shape[1]
        return logits + waves(present[0].shape[1])[start:], present


def test_memoised_functions_remember_no_fake() -> None:
    waves.cache_clear()
    model = small(Memoised)
    rewritten = rewritten_small(model)
    assert waves.cache_info().currsize == 0
    logits, past = model(IDS[:, :3])
    torch.testing.assert_close(rewritten(IDS[:, :3])[0], logits)
    torch.testing.assert_close(rewritten(IDS[:, 3:], past)[0], model(IDS[:, 3:], past)[0])


def asking(question) -> type[nn.Module]:
    class Asks(Small):
        def forward(self, ids, past=None):
            logits, present = super().forward(ids, past)
            return (logits * 2 if question(ids, past) else logits), present

    return Asks


@pytest.mark.parametrize(
    "question",
    [
        lambda ids, past: f"{ids.shape[1]}" == "2",
        lambda ids, past: str(tuple(ids.shape)) == "(2, 2)",
        lambda ids, past: repr(ids.shape[0]).startswith("1"),
        lambda ids, past: ids.shape[1] is ONE,
        lambda ids, past: past is not None and past[0].mT.is_contiguous(),
        lambda ids, past: past is not None and past[0].storage_offset() > 0,
    ],
    ids=["f-string", "str", "repr", "is", "layout", "offset"],
)
def test_what_sizes_and_layouts_hide_is_refused_or_outside_the_domain(question) -> None:
    model = small(asking(question))
    try:
        rewritten = rewritten_small(model)
    except cachefree.CacheFreeError:
        return
    _, past = model(IDS[:, :1])
    for query in (1, 2, 3):
        ids = IDS[:, 1 : 1 + query]
        try:
            found = rewritten(ids, past)[0]
        except cachefree.CacheFreeError:
            continue
        torch.testing.assert_close(found, model(ids, past)[0])


@pytest.mark.parametrize(
    "question",
    [
        lambda past: past.requires_grad,
        lambda past: not past.is_leaf,
        lambda past: past.grad_fn is not None,
        lambda past: past.is_inference(),
        lambda past: past._version > 0,
        lambda past: past.is_neg(),
        lambda past: past.stride(0) == 0,
    ],
    ids=["gradients", "leaf", "function", "inference", "version", "negated", "stride"],
)
def test_what_made_an_input_may_choose_no_path(question) -> None:
    asks = asking(lambda ids, past: past is not None and question(past[0]))
    with pytest.raises(cachefree.CaptureError, match="takes another path"):
        rewritten_small(small(asks))


class TellsItsSizes(Small):
    def forward(self, ids, past=None):
        if ids.shape[1] > 60:
            raise ValueError(f"{ids.shape[1]} tokens are too many")
        assert ids.dim() == 2, f"{ids.shape}"
        return super().forward(ids, past)


def test_a_size_in_a_message_freezes_nothing() -> None:
    assert rewritten_small(small(TellsItsSizes)).report.verdict.is_proof


class ChecksTypes(Small):
    def forward(self, ids, past=None):
        logits, present = super().forward(ids, past)
        if type(ids) is not torch.Tensor or type(ids.shape[0]) is not int:
            logits = logits * 2
        return logits, present


def test_a_fake_tensor_passes_for_a_tensor() -> None:
    model = small(ChecksTypes)
    rewritten = rewritten_small(model)
    torch.testing.assert_close(rewritten(IDS)[0], model(IDS)[0])
