"""What is tried of a package: a tiny random model, and how it is called, first and later."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Say = Callable[[int, int], Any]
Begin = Callable[[Any, torch.Tensor], Say]
VOCABULARY, WIDTH, LONGEST = 32, 16, 24
ANY_LENGTH = ((5, 1, 3), (1, 1, 4), (7, 2, 1))
ONE_TOKEN = ((5, 1, 1, 1), (1, 1, 1), (9, 1, 1))


@dataclass(frozen=True)
class Entry:
    """One class of a package.

    Attributes:
        package: The name of the distribution.
        name: The class, and the method or option where it matters.
        pattern: What its cache is like.
        build: Makes a tiny one.
        begin: ``(model, inputs of a whole sequence) → say``; ``say(start, stop)`` calls the model
            with these positions and returns what is compared.
        example: The example inputs that `cachefree.rewrite` is given, made of two sequences of
            five positions; None: none.
        options: Further arguments of `cachefree.rewrite`.
        draw: ``(batch) → inputs``; token ids by default.
        lengths: The lengths of the calls.
    """

    package: str
    name: str
    pattern: str
    build: Callable[[], nn.Module]
    begin: Begin
    example: Callable[[torch.Tensor], Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    draw: Callable[[int], torch.Tensor] = lambda batch: torch.randint(
        1, VOCABULARY, (batch, LONGEST), generator=torch.Generator().manual_seed(batch)
    )
    lengths: tuple[tuple[int, ...], ...] = ANY_LENGTH

    @property
    def key(self) -> str:
        """A name of its own."""
        return f"{self.package}:{self.name}"


def frames(width: int = WIDTH) -> Callable[[int], torch.Tensor]:
    """Feature frames, shape (B, S, width)."""

    def draw(batch: int) -> torch.Tensor:
        return torch.randn(batch, LONGEST, width, generator=torch.Generator().manual_seed(batch))

    return draw


def passed(name: str, *, at: int = 1, **always: Any) -> Begin:
    """The cache is an argument, and an entry of the result."""

    def begin(model: Any, whole: torch.Tensor) -> Say:
        held: dict[str, Any] = {}

        def say(start: int, stop: int) -> Any:
            result = model(whole[:, start:stop], **always, **held)
            held[name] = result[at]
            return result[0]

        return say

    return begin


def stand_in(name: str, **attributes: Any) -> None:
    """A module of a name that cannot be installed here, for a package that only imports it."""
    module = types.ModuleType(name)
    module.__path__ = []  # type: ignore[attr-defined]
    vars(module).update(attributes)
    sys.modules.setdefault(name, module)
    parent, _, last = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], last, sys.modules[name])
