"""The code that a model's objects hold, and what they hold that is not put back after a call.

A function in an attribute, a hook, the methods of an object of settings: they are called by the
model as its own methods are, and may count in their closures and globals. Objects with slots,
arrays and modules that are no submodules remember too; they are not put back, but compared.
"""

from __future__ import annotations

import dataclasses
import functools
import reprlib
import sys
import types
import weakref
from typing import Any

import torch

from cachefree.looked_up import once

__all__ = [
    "HeldCode",
    "file_of",
    "has_slots",
    "held_code",
    "is_installed",
    "is_of_dataclass",
    "wraps_dataclass",
]

_ATOMS = (bool, int, float, complex, str, bytes, type(None))
_UNCHANGING = (*_ATOMS, torch.Tensor, torch.dtype, torch.device)
_SEQUENCES = (list, tuple, set, frozenset)
_FOREIGN = frozenset(("torch", "cachefree", "threading", "_thread", "logging", "typing"))
_DEPTH = 8


@dataclasses.dataclass
class HeldCode:
    """What was found in the attributes of a model's modules.

    Attributes:
        functions: Functions, of methods too.
        classes: The classes of objects.
        opaque: Name and value of all that is not put back after a call.
    """

    functions: dict[types.FunctionType, None] = dataclasses.field(default_factory=dict)
    classes: dict[type, None] = dataclasses.field(default_factory=dict)
    opaque: list[tuple[str, Any]] = dataclasses.field(default_factory=list)


@once
def held_code(model: torch.nn.Module) -> HeldCode:
    """What the modules of a model hold in their attributes, hooks among them.

    Looked up once a rewrite: what a rewrite's calls change is put back.
    """
    walk = _Walk({id(module) for module in model.modules()})
    for module in model.modules():
        for name, value in vars(module).items():
            walk.at(f"{type(module).__name__}.{name}", value, _DEPTH)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if held := getattr(tensor, "__dict__", None):
            walk.found.opaque.append((name, held))
    return walk.found


class _Walk:
    def __init__(self, submodules: set[int]) -> None:
        self.found = HeldCode()
        self.seen = submodules

    def at(self, name: str, value: Any, depth: int) -> None:
        """Looks into a value."""
        if not depth or isinstance(value, _UNCHANGING) or id(value) in self.seen:
            return
        self.seen.add(id(value))
        if isinstance(value, weakref.ref):
            self.found.opaque.append((name, value))
        elif isinstance(value, types.FunctionType):
            self.found.functions[value] = None
        elif isinstance(value, type):
            self.found.classes[value] = None
        elif isinstance(value, types.MethodType):
            self.at(name, value.__func__, depth - 1)
            self._opaque(f"what {name} is a method of", value.__self__, depth)
        elif isinstance(value, functools.partial):
            self.at(name, value.func, depth - 1)
            self._opaque(name, (value.args, value.keywords), depth)
        elif isinstance(value, (*_SEQUENCES, dict)) or type(value).__name__ == "deque":
            self._parts(name, value, depth)
        elif isinstance(value, torch.nn.Module) or _home(value) not in _FOREIGN:
            self._object(name, value, depth)

    def _parts(self, name: str, value: Any, depth: int) -> None:
        for part in list(dict.values(value) if isinstance(value, dict) else value):
            self.at(name, part, depth - 1)

    def _object(self, name: str, value: Any, depth: int) -> None:
        kind = type(value)
        if not is_installed(file_of(kind)):
            self.found.classes[kind] = None
        held = getattr(value, "__dict__", None)
        if held is None or isinstance(value, torch.nn.Module) or has_slots(kind):
            self.found.opaque.append((name, value))
        if isinstance(held, dict):
            self._parts(name, held, depth)

    def _opaque(self, name: str, value: Any, depth: int) -> None:
        """Looks into what an object holds that no attribute leads to."""
        if id(value) not in self.seen and not isinstance(value, types.ModuleType):
            self.found.opaque.append((name, value))
            self.at(name, value, depth - 1)


def _home(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


def is_installed(file: str) -> bool:
    """Whether a file belongs to an installed package."""
    return "site-packages" in file or "dist-packages" in file


def file_of(kind: type) -> str:
    """The file that a class is from; an empty text where there is none."""
    return getattr(sys.modules.get(kind.__module__), "__file__", None) or ""


def has_slots(kind: type) -> bool:
    """Whether objects of a class hold something outside of their ``__dict__``."""
    return any(vars(base).get("__slots__") for base in kind.__mro__)


def wraps_dataclass(code: types.CodeType) -> bool:
    """Whether code wraps what ``dataclass`` wrote: its guard against a text that holds itself."""
    return code.co_filename in (dataclasses.__file__, reprlib.__file__)


def is_of_dataclass(code: types.CodeType) -> bool:
    """Whether ``dataclass`` wrote code, or wraps what it wrote."""
    return wraps_dataclass(code) or (
        code.co_filename == "<string>" and code.co_qualname.startswith("__create_fn__.")
    )
