"""Settings of torch that a model's code asks for: each answer is a constant of the captured path.

No tensor shows such a question, so it is found by the names in the code. Asked again before each
call is only what is named there.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["setting", "settings_named"]

_OF_TORCH = (
    "are_deterministic_algorithms_enabled",
    "get_deterministic_debug_mode",
    "get_float32_matmul_precision",
    "get_num_interop_threads",
    "get_num_threads",
    "initial_seed",
    "is_anomaly_check_nan_enabled",
    "is_anomaly_enabled",
    "is_autocast_cache_enabled",
    "is_deterministic_algorithms_warn_only_enabled",
    "is_inference_mode_enabled",
    "is_warn_always_enabled",
)
_OF_BACKENDS = (
    *(f"cuda.{kind}_sdp_enabled" for kind in ("flash", "math", "mem_efficient", "cudnn")),
    "cuda.matmul.allow_tf32",
    "cuda.matmul.allow_fp16_reduced_precision_reduction",
    "cuda.matmul.allow_bf16_reduced_precision_reduction",
    *(f"cudnn.{name}" for name in ("enabled", "benchmark", "deterministic", "allow_tf32")),
    "mkldnn.enabled",
    "mkldnn.deterministic",
    "opt_einsum.enabled",
    "opt_einsum.strategy",
    "fp32_precision",
)


def settings_named(names: Iterable[str]) -> list[str]:
    """The settings, by their paths in torch, that code with these names may ask for."""
    known = set(names)
    found = [name for name in _OF_TORCH if name in known and hasattr(torch, name)]
    for path in _OF_BACKENDS:
        *places, last = path.split(".")
        if last in known and ("backends" in known or known & {*places}):
            found.append(f"backends.{path}")
    return found


def setting(path: str) -> Any:
    """What a setting is now; None where this build of torch has no such one."""
    try:
        value = operator.attrgetter(path)(torch)
        return value() if callable(value) else value
    except (AttributeError, RuntimeError):  # RuntimeError: it was set in two ways at once
        return None
