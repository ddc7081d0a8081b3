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
_NAMES = "the name of the argument that carries the cache, or a list of names; or leave it out"
_CALLABLE = "a function (outputs, inputs) → later inputs; or leave it out"
_METHODS = "the name of a method, or two where the first call has one of its own"


def _are_names(value: object) -> bool:
    return isinstance(value, str) or (
        isinstance(value, Sequence) and all(isinstance(name, str) for name in value)
    )


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
        """Refuses choices that there are not, and arguments of another kind.

        Raises:
            CaptureError: it says which there are.
        """
        for name, is_due, takes in (
            ("cache", self.cache is None or _are_names(self.cache), _NAMES),
            ("carry", self.carry is None or callable(self.carry), _CALLABLE),
            ("method", _are_names(self.method), _METHODS),
        ):
            if not is_due:
                told = f"{name}={getattr(self, name)!r} is not what {name}= takes."
                raise CaptureError(Refusal(told, remedy=f"Give {takes}."))
        for name, known in (("check", _CHECKS), ("cross_attention", _CROSS)):
            value = getattr(self, name)
            if value not in known:
                told = ", ".join(map(repr, known))
                raise CaptureError(Refusal(f"{name}={value!r} is none of {told}."))
