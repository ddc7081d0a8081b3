"""Whether a captured path is the path that the model takes where its sizes are numbers.

A symbolic size is no ``int``: ``isinstance(n, int)``, ``type(n)``, ``str(n)`` or an ``except`` may
send the code another way while it is captured, without a question being asked. So the model is run
once more with the example sizes as plain numbers, and the calls of torch functions are compared one
by one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from cachefree.errors import CaptureError, Refusal, SourceLine
from cachefree.sizes import TORCH, is_users, user_line

__all__ = ["CallLog", "TorchCall", "refuse_another_path"]

_NOT_COMPUTED = {
    "__get__",
    "__set__",
    "size",
    "dim",
    "__len__",
    "numel",
    "stride",
    "is_contiguous",
    "is_floating_point",
    "is_complex",
    "data_ptr",
    "__index__",
    "__bool__",
    "__int__",
    "element_size",
    "ndimension",
    "storage_offset",
    "_set_grad_enabled",
}
_LAYOUT = {"is_contiguous", "stride", "storage_offset", "data_ptr"}
_LAYERS = tuple(
    TORCH + part
    for part in ("nn" + os.sep, "functional.py", "_tensor.py", "distributions" + os.sep)
)


@dataclass(frozen=True)
class TorchCall:
    """A call of a torch function: its name, and its arguments with symbols kept."""

    name: str
    args: tuple[Any, ...]
    where: SourceLine | None


class CallLog(TorchFunctionMode):
    """Writes down the calls of torch functions.

    Attributes:
        calls: The calls.
        asks_layout: Whether the user's code asked how a tensor lies in memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[TorchCall] = []
        self.asks_layout = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.note(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def note(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Writes one call down."""
        name = getattr(func, "__name__", str(func))
        if name in _LAYOUT and is_users(sys._getframe(2).f_code.co_filename):
            self.asks_layout = True
        if (
            name not in _NOT_COMPUTED
            and not name.startswith("sym_")
            and _is_model_code(sys._getframe(2))
        ):
            described = tuple(map(_described, args)) + tuple(
                (key, _described(kwargs[key])) for key in sorted(kwargs)
            )
            self.calls.append(TorchCall(name, described, user_line(sys._getframe(2))))


def _is_model_code(frame: Any) -> bool:
    """Whether a call comes from the model, or from torch's own layers.

    Calls of what runs them on fake tensors do not count.
    """
    file = frame.f_code.co_filename
    return not file.startswith(TORCH) or file.startswith(_LAYERS)


def _described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        # which of the model's own it is tells one layer from another of the same sizes
        own = None if isinstance(value, FakeTensor) else id(value)
        return ("tensor", tuple(map(_described, value.shape)), value.dtype, own)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.expr
    if isinstance(value, (tuple, list)):
        return tuple(map(_described, value))
    if isinstance(value, slice):
        return (_described(value.start), _described(value.stop), _described(value.step))
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return type(value).__name__


def refuse_another_path(
    symbolic: Sequence[TorchCall],
    plain: Sequence[TorchCall],
    sizes: Mapping[sympy.Symbol, int],
    *,
    with_sizes: bool,
    with_numbers: bool = False,
) -> None:
    """Compares the calls of a captured path with those of a run with plain numbers.

    Args:
        symbolic: The calls while the path was captured.
        plain: The calls with plain numbers.
        sizes: The number that each symbol stands for.
        with_sizes: Whether the sizes are comparable too.
        with_numbers: Whether numbers that are no sizes are comparable too.

    Raises:
        CaptureError: they differ.
    """
    for one, other in zip(symbolic, plain, strict=False):
        if (
            one.name != other.name
            or (with_sizes and not _same(one.args, other.args, sizes))
            or (with_numbers and not _same_numbers(one.args, other.args))
        ):
            raise _another_path(
                other.where or one.where, f"{other.name} with numbers, {one.name} with symbols"
            )
    if len(symbolic) != len(plain):
        longer = max((symbolic, plain), key=len)
        extra = longer[min(len(symbolic), len(plain))]
        raise _another_path(extra.where, f"{extra.name} is called in one of them only")


def _same(one: Any, other: Any, sizes: Mapping[sympy.Symbol, int]) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(
            _same(a, b, sizes) for a, b in zip(one, other, strict=True)
        )
    if isinstance(one, sympy.Basic):
        value = one.xreplace(sizes) if not isinstance(one, sympy.Symbol) else sizes.get(one, one)
        return bool(value == other)
    if isinstance(one, float) and isinstance(other, float):
        return repr(one) == repr(other)
    return bool(one == other)


def _same_numbers(one: Any, other: Any) -> bool:
    """Whether two arguments agree in what is neither a tensor nor a size."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        if one[:1] == other[:1] == ("tensor",):
            return bool(one[-1] == other[-1])
        if len(one) != len(other):
            return True
        return all(_same_numbers(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, float) and isinstance(other, float):
        return repr(one) == repr(other)
    is_plain = all(isinstance(value, (bool, str)) for value in (one, other))
    return one == other if is_plain else True


def _another_path(where: SourceLine | None, detail: str) -> CaptureError:
    return CaptureError(
        Refusal(
            "The model's code takes another path when its sizes are symbols than when they are "
            "numbers.",
            why=f"The calls of torch functions differ: {detail}. Code that asks whether a size is "
            "an int does this.",
            remedy="Do not ask for the type of a size (isinstance(n, int)); compute with it.",
            where=where,
        )
    )
