"""One torch.fx graph for a decoder's first and later calls: the cache is always a tensor."""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

from cachefree.errors import (
    CacheFreeError,
    CacheNotFoundError,
    CaptureError,
    CertificateError,
    DomainError,
    EquivalenceError,
    StageError,
    UnsupportedBranchError,
)

if TYPE_CHECKING:
    from cachefree.checker import check_certificate
    from cachefree.explain import explain
    from cachefree.explanation import Explanation
    from cachefree.onnx import Beam, Greedy, Weights, load_onnx, to_onnx
    from cachefree.report import Report, Verdict
    from cachefree.rewrite import rewrite
    from cachefree.rewritten import Rewritten
    from cachefree.scale import pipeline, tensor_parallel
    from cachefree.verification import verify

__version__ = "0.1.0"
__all__ = [
    "Beam",
    "CacheFreeError",
    "CacheNotFoundError",
    "CaptureError",
    "CertificateError",
    "DomainError",
    "EquivalenceError",
    "Explanation",
    "Greedy",
    "Report",
    "Rewritten",
    "StageError",
    "UnsupportedBranchError",
    "Verdict",
    "Weights",
    "check_certificate",
    "explain",
    "load_onnx",
    "pipeline",
    "rewrite",
    "tensor_parallel",
    "to_onnx",
    "verify",
]

_HOMES = {
    "Explanation": "cachefree.explanation",
    "Report": "cachefree.report",
    "Beam": "cachefree.onnx",
    "Greedy": "cachefree.onnx",
    "Rewritten": "cachefree.rewritten",
    "Verdict": "cachefree.report",
    "Weights": "cachefree.onnx",
    "check_certificate": "cachefree.checker",
    "explain": "cachefree.explain",
    "load_onnx": "cachefree.onnx",
    "pipeline": "cachefree.scale",
    "rewrite": "cachefree.rewrite",
    "tensor_parallel": "cachefree.scale",
    "to_onnx": "cachefree.onnx",
    "verify": "cachefree.verification",
}


class _FrontDoor(types.ModuleType):
    """Keeps ``cachefree.rewrite`` the function: the import of its file binds the module there."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _FrontDoor


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cachefree' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
