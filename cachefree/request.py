"""What a user asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from cachefree.errors import CaptureError, Refusal
from cachefree.places import Carry

__all__ = ["Request"]

_CHECKS = ("prove", "test", "off")
_CROSS = ("reuse", "hoist")


@dataclass(frozen=True)
class Request:
    """The arguments of `cachefree.rewrite`, which says what they are."""

    model: nn.Module
    example_inputs: Any
    cache: str | Sequence[str] | None
    carry: Carry | None
    method: str | tuple[str, str]
    check: str
    cross_attention: str
    progress: bool | None

    def refuse_unknown(self) -> None:
        """Refuses choices that there are not.

        Raises:
            CaptureError: it says which there are.
        """
        for name, known in (("check", _CHECKS), ("cross_attention", _CROSS)):
            value = getattr(self, name)
            if value not in known:
                told = ", ".join(map(repr, known))
                raise CaptureError(Refusal(f"{name}={value!r} is none of {told}."))
