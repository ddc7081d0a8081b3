"""What a capture takes for granted is enforced: flags, modes, dtypes, devices, the environment."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

import cachefree
from cachefree.baked import Modes

from .assertions import same
from .models import kept
from .models.case import seeded
from .small import IDS, Small, rewritten_small, small

SCALE = 1.0


class Configuration:
    def __init__(self) -> None:
        self.scale = 1.0


class Flagged(Small):
    """Scaled by a number of every kind that code may read."""

    times = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.is_doubled = 1.0, False
        self.config = Configuration()

    def forward(self, ids, past=None):
        logits, present = super().forward(ids, past)
        logits = logits * self.scale * self.config.scale * SCALE * self.times
        return (logits * 2 if self.is_doubled else logits), present


@pytest.fixture(scope="module")
def flagged() -> tuple[Flagged, cachefree.Rewritten]:
    model = small(Flagged)
    return model, rewritten_small(model)


CHANGES: dict[str, Callable[[Flagged, pytest.MonkeyPatch], None]] = {
    "a number": lambda model, patch: patch.setattr(model, "scale", 3.0),
    "a truth": lambda model, patch: patch.setattr(model, "is_doubled", True),
    "a configuration": lambda model, patch: patch.setattr(model.config, "scale", 5.0),
    "a class attribute": lambda model, patch: patch.setattr(Flagged, "times", 7.0),
    "a global": lambda model, patch: patch.setitem(globals(), "SCALE", 9.0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_flag_that_changes_is_seen(
    flagged: tuple[Flagged, cachefree.Rewritten], change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rewritten = flagged
    change(model, monkeypatch)
    logits, past = model(IDS[:, :3])
    same(rewritten(IDS[:, :3])[0], logits)
    same(rewritten(IDS[:, 3:], past)[0], model(IDS[:, 3:], past)[0])


def test_what_calls_write_is_no_flag() -> None:
    model = seeded(kept.KeepingDecoder)()
    rewritten = cachefree.rewrite(model, (IDS[:2, :3],))
    report = rewritten.report
    model(IDS)
    assert model.offset == 5
    rewritten(IDS)
    assert rewritten.report is report, "captured again, though nothing had changed"


def test_a_branch_on_the_dtype_is_taken_anew() -> None:
    class Halved(Small):
        def forward(self, ids, past=None):
            logits, present = super().forward(ids, past)
            return (logits * 2 if logits.dtype == torch.float16 else logits), present

    model = small(Halved)
    rewritten = rewritten_small(model)
    same(rewritten(IDS)[0], model(IDS)[0])
    model.half()
    same(rewritten(IDS)[0], model(IDS)[0])
    assert rewritten(IDS)[0].dtype == torch.float16


def test_examples_are_given_again_in_the_dtype_that_the_model_has_now() -> None:
    class Features(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.keys = torch.nn.Linear(6, 6)

        def forward(self, x, past=None):
            keys = self.keys(x) if past is None else torch.cat([past, self.keys(x)], 1)
            return torch.softmax(x @ keys.mT, -1) @ keys, keys

    model = seeded(Features)()
    rewritten, features = cachefree.rewrite(model, (torch.rand(2, 3, 6),)), torch.rand(3, 5, 6)
    model.to(torch.bfloat16)
    y, past = model(features[:, :3].bfloat16())
    same(rewritten(features[:, :3].bfloat16()), (y, past))
    assert y.dtype == torch.bfloat16
    same(rewritten(features[:, 3:].bfloat16(), past), model(features[:, 3:].bfloat16(), past))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second kind of device")
def test_a_branch_on_the_device_is_taken_anew() -> None:
    class Placed(Small):
        def forward(self, ids, past=None):
            logits, present = super().forward(ids, past)
            return (logits.double() if ids.device.type == "cuda" else logits), present

    model = small(Placed)
    rewritten = rewritten_small(model)
    assert rewritten(IDS)[0].dtype == torch.float32
    model.to("cuda")
    assert rewritten(IDS.to("cuda"))[0].dtype == model(IDS.to("cuda"))[0].dtype == torch.float64


@contextlib.contextmanager
def default_dtype() -> Any:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def no_fast_path() -> Any:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


MODES: dict[str, tuple[Callable[[], Any], str]] = {
    "default dtype": (default_dtype, "default dtype is torch.float64, and was torch.float32"),
    "default device": (lambda: torch.device("meta"), "default device is meta, and was cpu"),
    "autocast": (
        lambda: torch.autocast("cpu", torch.bfloat16),
        r"on for cpu \(torch.bfloat16\), and was off",
    ),
    "fast path": (no_fast_path, "fast path of torch.backends.mha was on"),
}


@pytest.fixture(scope="module")
def plain() -> cachefree.Rewritten:
    return rewritten_small(small())


@pytest.mark.parametrize(("mode", "words"), MODES.values(), ids=MODES)
def test_another_mode_is_refused(plain: cachefree.Rewritten, mode: Any, words: str) -> None:
    expected = plain(IDS)[0]
    with mode(), pytest.raises(cachefree.DomainError, match=words):
        plain(IDS)
    same(plain(IDS)[0], expected)


def test_a_model_can_be_rewritten_in_another_mode() -> None:
    model = small()
    with torch.autocast("cpu", torch.bfloat16):
        rewritten = rewritten_small(model)
        same(rewritten(IDS)[0], model(IDS)[0])
        assert rewritten(IDS)[0].dtype == torch.bfloat16
    with pytest.raises(cachefree.DomainError, match="autocast is off, and was on for cpu"):
        rewritten(IDS)


def test_the_environment_matters_where_it_is_read(
    plain: cachefree.Rewritten, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Switched(Small):
        def forward(self, ids, past=None):
            logits, present = super().forward(ids, past)
            return (logits * 2 if os.environ.get("SMALL_SWITCH") else logits), present

    rewritten = rewritten_small(small(Switched))
    monkeypatch.setenv("SMALL_SWITCH", "1")
    with pytest.raises(cachefree.DomainError, match="the environment's SMALL_SWITCH was another"):
        rewritten(IDS)
    plain(IDS)
    monkeypatch.delenv("SMALL_SWITCH")
    rewritten(IDS)


GETENV, NAME = os.getenv, "SWITCH"
ASKED = {
    "by a part of its name": lambda: os.environ.get("SMALL_" + NAME),
    "by another name of the function": lambda: GETENV("SMALL_SWITCH"),
    "as bytes": lambda: os.environb.get(b"SMALL_SWITCH"),
    "beside another text": lambda: ("text", os.environ.get(f"SMALL_{NAME}"))[1],
    "by whether it is there": lambda: "SMALL_SWITCH" in os.environ,
}


@pytest.mark.parametrize("how", ASKED)
def test_the_environment_is_asked_for_in_many_ways(how: str, monkeypatch) -> None:
    question = ASKED[how]

    class Switched(Small):
        def forward(self, ids, past=None):
            logits, present = super().forward(ids, past)
            return (logits * 2 if question() else logits), present

    monkeypatch.setenv("OTHER_SWITCH", "1")
    modes = Modes.now(small(Switched))
    assert modes.difference() is None
    monkeypatch.setenv("SMALL_SWITCH", "1")
    assert "SMALL_SWITCH" in (modes.difference() or "")


def test_a_mask_that_the_graph_was_captured_without_is_refused() -> None:
    class Masked(Small):
        def forward(self, ids, past=None, attention_mask=None):
            logits, present = super().forward(ids, past)
            if attention_mask is not None:
                logits = logits * attention_mask[:, -ids.shape[1] :, None]
            return logits, present

    rewritten = rewritten_small(small(Masked))
    with pytest.raises(cachefree.DomainError, match="'attention_mask' was given"):
        rewritten(IDS, attention_mask=torch.ones(3, 5))
    rewritten(IDS, attention_mask=None)


@pytest.mark.parametrize("ids", [IDS.int(), IDS.float(), IDS.to("meta")], ids=str)
def test_inputs_of_another_kind_are_refused(plain: cachefree.Rewritten, ids: torch.Tensor) -> None:
    with pytest.raises((cachefree.DomainError, RuntimeError)):
        plain(ids)
