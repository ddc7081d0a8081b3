"""What is looked up about a model once a rewrite, for its code stays the same until the end."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TypeVar

import torch

__all__ = ["forget", "once"]

Found = TypeVar("Found")

_found: list[weakref.WeakKeyDictionary[torch.nn.Module, object]] = []


def once(look: Callable[[torch.nn.Module], Found]) -> Callable[[torch.nn.Module], Found]:
    """A function of a model whose answer is kept until `forget`."""
    found: weakref.WeakKeyDictionary[torch.nn.Module, Found] = weakref.WeakKeyDictionary()
    _found.append(found)  # type: ignore[arg-type]

    @functools.wraps(look)
    def looked_up(model: torch.nn.Module) -> Found:
        if model not in found:
            found[model] = look(model)
        return found[model]

    return looked_up


def forget() -> None:
    """Looks again at everything: globals and attributes may hold other objects by now."""
    for found in _found:
        found.clear()
