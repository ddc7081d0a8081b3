"""A model that fails in the middle of anything: nothing is left on it, on torch or the process."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
import os
import queue
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import cachefree
from cachefree.certificate import Certificate

from .assertions import Unchanged
from .small import IDS, Small, rewritten_small, small


class FailsAt(Small):
    """Raises at the n-th call, after it has written to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[int] = []
        self.register_buffer("state", torch.zeros(3))
        self.countdown = [10**9]  # a container, so that the count itself is put back
        self.error: type[BaseException] = RuntimeError

    def attend(self, q, k):
        call = next(CALLS.count)
        if call == self.countdown[0]:
            self.log.append(call)
            self.fresh = q
            self.state.add_(1)
            torch.rand(3)
            raise self.error("on purpose")
        return super().attend(q, k)


CALLS: Any = logging.getLogger("calls")  # what a logger holds is no state of a model's
CALLS.count = itertools.count(1)


def failing(at: int, error: type[BaseException] = RuntimeError) -> nn.Module:
    model = small(FailsAt)
    model.countdown[0] = at
    model.error = error
    CALLS.count = itertools.count(1)
    return model


def number_of_calls() -> int:
    cachefree.rewrite(failing(10**9), (IDS[:2, :3],))
    return next(CALLS.count) - 1


def test_a_failure_at_any_call_leaves_nothing_behind() -> None:
    total = number_of_calls()
    assert total > 8
    outcomes: list[bool] = []
    for at in range(1, total + 1):
        model = failing(at)
        unchanged = Unchanged(model)
        try:
            cachefree.rewrite(model, (IDS[:2, :3],))
            outcomes.append(True)  # a probe of one size failed, and another one did
        except (cachefree.CacheFreeError, RuntimeError):
            outcomes.append(False)
        unchanged.check()
    assert not outcomes[0], "the first call runs the example inputs"
    assert outcomes.count(False) >= 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, SystemExit])
def test_what_is_no_error_of_the_model_passes_through(error: type[BaseException]) -> None:
    total = number_of_calls()
    for at in (1, total // 2, total):
        model = failing(at, error)
        unchanged = Unchanged(model)
        passed: Any = None
        try:
            cachefree.rewrite(model, (IDS[:2, :3],))
        except (cachefree.CacheFreeError, error) as caught:
            passed = caught
        unchanged.check()
        if error is not MemoryError:
            assert isinstance(passed, error), f"call {at}: {passed!r}"


def test_a_model_that_failed_can_be_rewritten_afterwards() -> None:
    model = failing(3)
    with contextlib.suppress(cachefree.CacheFreeError):
        cachefree.rewrite(model, (IDS[:2, :3],))
    model.countdown[0] = 10**9
    rewritten = cachefree.rewrite(model, (IDS[:2, :3],))
    with torch.no_grad():
        torch.testing.assert_close(rewritten(IDS)[0], model(IDS)[0])


STAGES = (
    ("paths", "find_subject", RuntimeError),
    ("paths", "read", KeyboardInterrupt),
    ("paths", "proved", KeyboardInterrupt),
    ("graphs", "emit", RuntimeError),
    ("rewrite", "Rewritten", MemoryError),
)


@pytest.mark.parametrize(("room", "stage", "error"), STAGES)
def test_a_failure_after_any_stage_leaves_nothing_behind(
    room: str, stage: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small()
    module = importlib.import_module(f"cachefree.{room}")
    run = getattr(module, stage)

    def fails(*args: Any, **kwargs: Any) -> None:
        run(*args, **kwargs)
        raise error("on purpose")

    monkeypatch.setattr(module, stage, fails)
    unchanged = Unchanged(model)
    with pytest.raises((error, cachefree.CaptureError), match="on purpose"):
        cachefree.rewrite(model, (IDS[:2, :3],))
    unchanged.check()


WRITING = ("export", "save")


def test_a_failure_while_a_file_is_written_leaves_the_files_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small()
    rewritten = rewritten_small(model)
    module = importlib.import_module("cachefree.onnx.writing")
    cachefree.to_onnx(rewritten, tmp_path / "decoder.onnx", certificate=True)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(before) == 3
    unchanged = Unchanged(model)
    homes = [(module, name) for name in WRITING] + [(Certificate, "save"), (os, "replace")]
    for home, name in homes:
        run = getattr(home, name)

        def fails(*args: Any, run: Any = run, name: str = name, **kwargs: Any) -> None:
            run(*args, **kwargs)
            raise OSError(f"{name}, on purpose")

        with monkeypatch.context() as patch:
            patch.setattr(home, name, fails)
            with pytest.raises((OSError, cachefree.CacheFreeError), match=f"{name}, on purpose"):
                cachefree.to_onnx(rewritten, tmp_path / "decoder.onnx", certificate=True)
        unchanged.check()
        if name != "replace":  # what fails after it has moved a file cannot be told from success
            assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before, name
        assert len(list(tmp_path.iterdir())) == 3, name


def test_a_failure_of_a_comparison_leaves_the_model_as_it_was() -> None:
    model = small(FailsAt)
    rewritten = rewritten_small(model)
    model.error = KeyboardInterrupt
    for at in (1, 3):
        CALLS.count = itertools.count(1)
        model.countdown[0] = at
        unchanged = Unchanged(model)
        with pytest.raises(KeyboardInterrupt, match="on purpose"):
            cachefree.verify(
                model, rewritten, backends=("eager",), dtypes=(), max_examples=3, seed=1
            )
        model.state.zero_()  # what the model's own code left, outside of any capture
        model.log.clear()
        model.__dict__.pop("fresh", None)
        unchanged.check()


def test_certificates_of_two_threads_at_once() -> None:
    rewritten = rewritten_small(small())
    with ThreadPoolExecutor(2) as threads:
        checks = list(threads.map(cachefree.check_certificate, [rewritten] * 4))
    assert {str(checked) for checked in checks} == {str(checks[0])}
    assert checks[0].is_complete


class WritesToABuffer(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(4))

    def forward(self, ids, past=None):
        self.calls.add_(1)
        return super().forward(ids, past)


class WritesToAParameter(Small):
    def forward(self, ids, past=None):
        with torch.no_grad():
            self.out.bias.add_(1)
            self.emb.weight[0] = 0
        return super().forward(ids, past)


class KeepsItsCache(Small):
    """Keys in a buffer of fixed size, written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(4, 64, 6))

    def attend(self, q, k):
        self.keys[: k.shape[0], : k.shape[1]] = k
        return super().attend(q, self.keys[: k.shape[0], : k.shape[1]])


@pytest.mark.parametrize("build", [WritesToABuffer, WritesToAParameter, KeepsItsCache])
def test_writes_to_the_models_own_tensors_are_refused_and_not_done(build: type[Small]) -> None:
    model = small(build)
    unchanged = Unchanged(model)
    with pytest.raises(cachefree.CacheFreeError, match=r"in place|depends on|state on itself"):
        cachefree.rewrite(model, (IDS[:2, :3],))
    unchanged.check()


def test_batch_normalisation_in_training_mode_leaves_its_statistics() -> None:
    class Normalised(Small):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(12)

        def forward(self, ids, past=None):
            logits, present = super().forward(ids, past)
            return self.norm(logits.transpose(1, 2)).transpose(1, 2), present

    model = small(Normalised).train()
    unchanged = Unchanged(model)
    with pytest.raises(cachefree.CacheFreeError):
        cachefree.rewrite(model, (IDS[:2, :3],))
    unchanged.check()
    assert cachefree.rewrite(model.eval(), (IDS[:2, :3],)).report.verdict.is_proof


def test_no_weight_is_computed_with() -> None:
    """Weights are looked at for their shape only: a scaled weight is not scaled for real."""

    class Scaled(Small):
        def forward(self, ids, past=None):
            READ.put(self.out.weight * 2)
            return super().forward(ids, past)

    READ: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
    cachefree.rewrite(small(Scaled), (IDS[:2, :3],))
    seen = [READ.get() for _ in range(READ.qsize())]
    assert seen
    assert all(isinstance(tensor, FakeTensor) for tensor in seen)
