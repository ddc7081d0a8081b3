"""A trial in each dtype: the model's own, and those that a user may cast it to."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cachefree.baked import floating_dtype
from cachefree.errors import CacheFreeError, Refusal
from cachefree.lifting.subject import called_alike
from cachefree.verification.runners import OwnCall, Runner, double_copy, onnx_runner
from cachefree.verification.trial import Trial, device_of

__all__ = ["BACKENDS", "DTYPES", "Trials"]

BACKENDS = ("eager", "onnxruntime")
DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.float32)


class Trials:
    """Makes the trial of a dtype when it is first asked for.

    In another dtype than the model's own it is one of copies, which are cast and rewritten again,
    as calls of ``rewritten`` do by themselves after ``model.to(dtype)``.

    Args:
        model: The original.
        rewritten: What ``cachefree.rewrite`` gave for it.
        backends: What is compared with the original.
        providers: ONNX Runtime's execution providers.
        directory: Where ONNX files are written.
        dtypes: Other dtypes; None for those of `DTYPES` that the model can be cast to.

    Attributes:
        own: The trial in the model's own dtype.
        others: The other dtypes.
        by_dtype: What was made so far; None where nothing could be.
    """

    def __init__(
        self,
        model: nn.Module,
        rewritten: Any,
        backends: Sequence[str],
        providers: Sequence[Any] | None,
        directory: Path,
        dtypes: Sequence[torch.dtype] | None = None,
    ) -> None:
        _refuse(model, rewritten, backends)
        self._pair = model, rewritten
        self._backends, self._providers, self._directory = backends, providers, directory
        self._left_out: dict[str, str] = {}
        self.others = self._castable(dtypes)
        self.own = self._made(model, rewritten, None)
        self.by_dtype: dict[torch.dtype, Trial | None] = {}

    def of(self, dtype: torch.dtype | None) -> Trial | None:
        """The trial in a dtype, or in the model's own; None where there can be none."""
        if dtype is None:
            return self.own
        if dtype not in self.by_dtype:
            try:
                self.by_dtype[dtype] = self._made(*self._cast(dtype), dtype)
            except Exception as error:  # noqa: BLE001
                # a model may hold anything, and whatever it holds may refuse a copy or the dtype
                self._left_out[_name(dtype)] = _first_line(error)
                self.by_dtype[dtype] = None
        return self.by_dtype[dtype]

    @property
    def left_out(self) -> dict[str, str]:
        """What could not be compared → why not."""
        failed = {
            _name(dtype): f"the model itself does not run: {trial.failure}"
            for dtype, trial in self.by_dtype.items()
            if trial is not None and trial.failure and not trial.tally.generations
        }
        return {**self._left_out, **failed}

    def _castable(self, dtypes: Sequence[torch.dtype] | None) -> tuple[torch.dtype, ...]:
        model, rewritten = self._pair
        origin, own = rewritten.__dict__.get("_origin"), floating_dtype(model)
        if origin is None or own is None or floating_dtype(origin.model) is not own:
            reason = "it has no parameters of one dtype, or was copied without the model"
            self._left_out.update({_name(dtype): reason for dtype in dtypes or ()})
            return ()
        return tuple(dtype for dtype in (DTYPES if dtypes is None else dtypes) if dtype is not own)

    def _cast(self, dtype: torch.dtype) -> tuple[nn.Module, Any]:
        model, rewritten = self._pair
        origin = rewritten.__dict__["_origin"]
        copied, source = copy.deepcopy((model, origin.model))
        for each in (copied, source):
            each.to(dtype)
        return copied, origin.rewritten(source)

    def _made(self, model: nn.Module, rewritten: Any, dtype: torch.dtype | None) -> Trial:
        own_call = OwnCall(rewritten)
        others = []
        if "eager" in self._backends:
            others.append(Runner("eager", rewritten, own_call))
        if "onnxruntime" in self._backends:
            directory = self._directory / _name(dtype)
            directory.mkdir()
            try:
                others.append(onnx_runner(rewritten, own_call, directory, self._providers))
            except CacheFreeError as error:
                if dtype is None:
                    without = Refusal("To verify without ONNX Runtime, pass backends=('eager',).")
                    raise type(error)(*error.refusals, without) from error
                if not others:
                    raise
                why = _first_line(error).replace(str(directory / "model.onnx"), "the file")
                self._left_out[f"{_name(dtype)} on onnxruntime"] = why
        exact = double_copy(model)
        double = None
        if exact is not None:
            double = Runner("float64", called_alike(exact, rewritten), own_call, torch.float64)
        original = Runner("original", called_alike(model, rewritten), own_call)
        return Trial(original, double, others, rewritten, device_of(model))


def _refuse(model: nn.Module, rewritten: Any, backends: Sequence[str]) -> None:
    unknown = [backend for backend in backends if backend not in BACKENDS]
    if unknown or not backends:
        raise CacheFreeError(
            Refusal(
                f"Unknown backends: {', '.join(unknown) or 'none given'}.",
                remedy=f"Known are {', '.join(BACKENDS)}.",
            )
        )
    if any(tensor.is_meta for tensor in model.parameters()):
        raise CacheFreeError(
            Refusal(
                "The model's weights are on the meta device: it computes nothing that could be"
                " compared.",
                remedy="Load the weights first, or trust the proof: rewritten.report.verdict.",
            )
        )
    other = rewritten.calling.another_mode("model", is_training=model.training)
    if other is not None:
        raise CacheFreeError(other)


def _name(dtype: torch.dtype | None) -> str:
    return "own" if dtype is None else str(dtype).removeprefix("torch.")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
