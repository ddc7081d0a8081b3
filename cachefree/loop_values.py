"""What Python code could tell the rounds of a loop apart by: every value that is no tensor."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import os
import pickle
from collections.abc import Callable
from types import BuiltinFunctionType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

import sympy
import torch

from cachefree.reach import reached_by
from cachefree.sizes import expression, is_users
from cachefree.token_places import is_token

__all__ = ["shown", "values_of"]

_CAPTURE = os.path.join(os.path.dirname(__file__), "capture.py")
_DEPTH = 6


def values_of(
    model: torch.nn.Module, frame: FrameType | None, age: Callable[[torch.Tensor], Any]
) -> dict[str, Any]:
    """What Python code could tell rounds apart by: the values of locals, and numbers of modules."""
    found: dict[str, Any] = {}
    seen: dict[int, Any] = {}
    summary = functools.partial(_summary, age=age, seen=seen, depth=_DEPTH)
    while frame is not None and frame.f_code.co_filename != _CAPTURE:
        if is_users(frame.f_code.co_filename):
            for name, value in frame.f_locals.items():
                found[f"{name!r} ({frame.f_code.co_name})"] = summary(value)
        frame = frame.f_back
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in _OF_TORCH:
                found[f"{name}.{attribute}".lstrip(".")] = summary(value)
    for text, value in reached_by(model).others:
        found[text] = summary(value)
    return found


_OF_TORCH = frozenset(vars(torch.nn.Module()))
_OPAQUE = (type, ModuleType, BuiltinFunctionType, torch.nn.Module)


def _summary(
    value: Any, age: Callable[[torch.Tensor], Any], seen: dict[int, Any], depth: int
) -> Any:
    """A value without its tensors."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        expr = sympy.sympify(expression(value))
        of_token = any(is_token(s) for s in expr.free_symbols if isinstance(s, sympy.Symbol))
        return "a token's place" if of_token else ("a size", str(expr))
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return (type(value).__name__, repr(value))
    if isinstance(value, torch.Tensor):
        return age(value)
    if isinstance(value, _OPAQUE) or depth == 0 or isinstance(value, (torch.dtype, torch.device)):
        return ("object", id(value))
    if id(value) in seen:
        return seen[id(value)]
    seen[id(value)] = "itself"
    result = _within(value, functools.partial(_summary, age=age, seen=seen, depth=depth - 1))
    seen[id(value)] = result
    return result


def _within(value: Any, again: Callable[[Any], Any]) -> Any:
    """What is inside of a value."""
    if isinstance(value, MethodType):
        return ("method", id(value.__func__), again(value.__self__))
    if isinstance(value, FunctionType):
        found = (value.__defaults__, value.__kwdefaults__, vars(value), *_cells(value))
        return ("function", id(value.__code__), *map(again, found))
    if getattr(type(value), "is_filled_by_token", False):
        return "a list with an entry for each token"
    if isinstance(value, (list, tuple)) or type(value).__name__ == "deque":
        parts = list(map(again, value))
        kept = [part for part in parts if not _is_made(part)]
        return (type(value).__name__, len(kept) < len(parts), *kept)
    if isinstance(value, dict):
        return tuple((again(key), again(part)) for key, part in value.items())
    if isinstance(value, (set, frozenset)):
        return tuple(sorted(map(repr, map(again, value))))
    if getattr(type(value), "is_loop_over_tokens", False):
        return "a loop"
    if hasattr(value, "__next__"):
        return ("iterator", _where_iterator(value, again))
    attributes = {**_slots(value), **getattr(value, "__dict__", {})}
    if attributes:
        return (type(value).__name__, tuple((k, again(v)) for k, v in attributes.items()))
    return ("object", id(value), _digest(value))


def _digest(value: Any) -> str:
    """What an object holds that Python does not show, such as an array: as it would be saved."""
    try:
        return hashlib.sha256(pickle.dumps(value)).hexdigest()
    except Exception:  # noqa: BLE001 - it cannot be saved
        return ""


def _cells(function: FunctionType) -> list[Any]:
    """What a function reads of the one around it."""
    found = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # empty as yet
            found.append(cell.cell_contents)
    return found


def _slots(value: Any) -> dict[str, Any]:
    names = [name for kind in type(value).__mro__ for name in _names(vars(kind).get("__slots__"))]
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots or ())


def _is_made(summary: Any) -> bool:
    return isinstance(summary, tuple) and summary[:1] == ("made",)


def _where_iterator(value: Any, again: Callable[[Any], Any]) -> Any:
    """Where an iterator stands; something else each time where it does not say."""
    frame = getattr(value, "gi_frame", None)
    if frame is not None:  # its locals, and iterators that its own loops are at
        return (frame.f_lasti, *map(again, gc.get_referents(value)))
    try:
        return repr(value.__reduce__()[1:])
    except Exception:  # noqa: BLE001 - it does not say
        return object()


def shown(value: Any) -> str:
    """A summary for a message."""
    is_plain = isinstance(value, tuple) and len(value) == 2
    text = str(value[1]) if is_plain else str(value)
    return text if len(text) <= 60 else "something else"
