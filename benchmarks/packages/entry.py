"""What is tried of a package: a tiny random model, and how it is called, first and later."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
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


class _Nothing:
    """Stands for whatever is imported: a base, a decorator, an empty collection."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        is_decorator = cls.__bases__ == (_Nothing,) and len(args) == 1 and callable(args[0])
        return args[0] if is_decorator else super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes anything."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Takes anything."""

    def __class_getitem__(cls, item: Any) -> Any:
        return cls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else self

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Any:
        return iter(())


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            return "2.9.0"
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (_Nothing,), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules below some names, empty ones."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if not any(name == top or name.startswith(f"{top}.") for top in self.names):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing is in it."""


def stand_in_for(*names: str) -> None:
    """Lets packages import what they do not need here and what is not installed."""
    missing = tuple(name for name in names if name not in sys.modules and not _is_there(name))
    sys.meta_path.append(_Finder(missing))


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def without_init(name: str) -> None:
    """Makes a package importable in parts: its ``__init__`` is left out."""
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ImportError(f"No module named {name!r}")
    module = types.ModuleType(name)
    module.__path__ = list(spec.submodule_search_locations or ())
    sys.modules[name] = module
