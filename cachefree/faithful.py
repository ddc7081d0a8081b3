"""Whether a captured path is the path that the model takes where its sizes are numbers.

A symbolic size is no ``int``: ``isinstance(n, int)``, ``type(n)``, ``str(n)`` or an ``except`` may
send the code another way while it is captured, without a question being asked. So the model is run
once more with the example sizes as plain numbers, and the calls of torch functions are compared one
by one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import sympy
import torch
from torch.overrides import TorchFunctionMode

from cachefree.dataflow import Dataflow, Source, is_own, resolved
from cachefree.errors import CaptureError, Refusal, SourceLine
from cachefree.explaining import depends_on_values
from cachefree.sizes import TORCH, is_users, user_line
from cachefree.spelling import is_message

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
_VALUES = {"numpy", "__array__", "__dlpack__", "tolist", "item", "storage", "untyped_storage"}
_TEXTS = {"__repr__", "__format__", "__str__"}
_LAYOUT = {"is_contiguous", "stride", "storage_offset", "data_ptr"}
_HISTORY = {"_version", "grad_fn", "is_leaf", "requires_grad", "retains_grad"}
_MADE = {"is_conj", "is_inference", "is_neg"}
_OVERRIDES = TORCH + "overrides.py"
_OverRows = type(iter(()))  # what iterating over a tensor gives
_LAYERS = tuple(
    TORCH + part
    for part in ("nn" + os.sep, "functional.py", "_tensor.py", "distributions" + os.sep)
)


@dataclass
class TorchCall:
    """A call of a torch function.

    Attributes:
        name: Of the function.
        args: Its arguments, with symbols kept.
        sources: Where the tensors among its arguments come from.
        where: The user's line.
        same: Which of the tensors that it returned are operands of its own: index → source.
        rows: How many tensors it returns, as an expression of sizes, where it takes one apart.
    """

    name: str
    args: tuple[Any, ...]
    sources: tuple[Any, ...]
    where: SourceLine | None
    same: dict[int, Source] = field(default_factory=dict)
    rows: Any = None


def _asks_history(func: Any, name: str) -> bool:
    """Whether a function tells what made a tensor: ``x.requires_grad``, ``x.is_inference()``."""
    if name == "__get__":
        return getattr(func.__self__, "__name__", "") in _HISTORY
    return name in _MADE


class CallLog(TorchFunctionMode):
    """Writes down the calls of torch functions.

    Attributes:
        calls: The calls.
        flow: Where the tensors come from.
        result: What the model returned.
        asks_layout: Whether the user's code asked how a tensor lies in memory.
        asks_history: Whether it asked if gradients are followed through one, or what made it.
        asks_values: Where code asked for the values of a tensor, which has none here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[TorchCall] = []
        self.flow = Dataflow()
        self.result: TorchCall | None = None
        self.asks_layout = False
        self.asks_history = False
        self.asks_values: list[SourceLine | None] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        frame = sys._getframe(1)
        if frame.f_code.co_filename == _OVERRIDES and frame.f_back is not None:
            frame = frame.f_back  # a function of torch that is written in Python
        args, kwargs = self.operands(args, kwargs)
        call = self._noted(func, args, kwargs, frame)
        try:
            result = self.called(func, args, kwargs, frame)
        except Exception as error:
            if depends_on_values(error) or getattr(func, "__name__", "") in _VALUES:
                self.asks_values.append(user_line(frame))
            raise
        if isinstance(result, _OverRows):
            result = tuple(result)
            self._keep(call, func, args, kwargs, result)
            return iter(result)
        self._keep(call, func, args, kwargs, result)
        return result

    def operands(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a call is given in place of its arguments."""
        return args, kwargs

    def called(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        frame: FrameType,
    ) -> Any:
        """What a call returns."""
        return func(*args, **kwargs)

    def given(self, inputs: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Says what the model is called with: path and tensor."""
        for path, tensor in inputs:
            self.flow.put(tensor, ("input", path))

    def returned(self, leaves: Iterable[Any]) -> None:
        """Writes down what the model returns, as one call more."""
        tensors = tuple([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
        sources = self.flow.of(tensors, len(self.calls))
        self.result = TorchCall("return", _described(tensors, sources), sources, None)

    def refuse_values(self) -> None:
        """Refuses code that asked for values, and caught the exception that said no.

        Raises:
            CaptureError: it did.
        """
        if self.asks_values:
            raise CaptureError(*map(_asked_for_values, dict.fromkeys(self.asks_values)))

    @property
    def whole(self) -> list[TorchCall]:
        """The calls, and what the model returns."""
        return self.calls if self.result is None else [*self.calls, self.result]

    def _noted(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        frame: FrameType,
    ) -> TorchCall | None:
        """Writes one call down, if it is one of the model's code that computes something."""
        name = getattr(func, "__name__", str(func))
        if name in _LAYOUT and is_users(frame.f_code.co_filename):
            self.asks_layout = True
        if _asks_history(func, name) and is_users(frame.f_code.co_filename):
            self.asks_history = True
        if name in _TEXTS and (reader := _user_frame(frame)) and not is_message(reader):
            self.asks_values.append(user_line(frame))
        if name in _NOT_COMPUTED or name.startswith("sym_") or not _is_model_code(frame):
            return None
        number = len(self.calls)
        operands = (*args, *((key, kwargs[key]) for key in sorted(kwargs)))
        with torch._C.DisableTorchFunction():
            sources = tuple([self.flow.of(operand, number) for operand in operands])
            described = _described(operands, sources)
        call = TorchCall(name, described, sources, user_line(frame))
        self.calls.append(call)
        return call

    def _keep(
        self,
        call: TorchCall | None,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Any,
    ) -> None:
        """Writes down what came of it."""
        operands = (*args, *kwargs.values())
        if call is not None:
            call.same = self.flow.made(result, len(self.calls) - 1, operands)
        else:
            name = getattr(getattr(func, "__self__", func), "__name__", str(func))
            self.flow.derived(result, name, len(self.calls), operands)


def _user_frame(frame: FrameType | None) -> FrameType | None:
    """The frame that called into torch, if it is the user's."""
    while frame is not None and frame.f_code.co_filename.startswith(TORCH):
        frame = frame.f_back
    return frame if frame is not None and is_users(frame.f_code.co_filename) else None


def _asked_for_values(where: SourceLine | None) -> Refusal:
    return Refusal(
        "The model's Python code depends on the values of a tensor.",
        why="It asks for them and goes on without them: an exception is caught, or they are made "
        "text. The captured path is the one without values, and not the one that runs.",
        remedy="Compute it with tensor operators (torch.where, masks), or pass it as an argument.",
        where=where,
    )


def _is_model_code(frame: Any) -> bool:
    """Whether a call comes from the model, or from torch's own layers.

    Calls of what runs them on fake tensors do not count.
    """
    file = frame.f_code.co_filename
    return not file.startswith(TORCH) or file.startswith(_LAYERS)


def _described(value: Any, source: Any = None) -> Any:
    if isinstance(value, torch.Tensor):
        # which of the model's own it is tells one layer from another of the same sizes
        own = source if source is not None and is_own(source) else None
        return ("tensor", tuple(map(_described, value.shape)), value.dtype, own)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.expr
    if isinstance(value, (tuple, list)):
        return tuple(map(_described, value, source or (None,) * len(value)))
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
    with_sources: bool = True,
) -> None:
    """Compares the calls of a captured path with those of a run with plain numbers.

    Args:
        symbolic: The calls while the path was captured.
        plain: The calls with plain numbers.
        sizes: The number that each symbol stands for.
        with_sizes: Whether the sizes are comparable too.
        with_numbers: Whether numbers that are no sizes are comparable too.
        with_sources: Whether to compare, too, where the tensors come from.

    Raises:
        CaptureError: they differ.
    """
    same: dict[Source, Source] = {}
    for number, (one, other) in enumerate(zip(symbolic, plain, strict=False)):
        if (
            one.name != other.name
            or (with_sizes and not _same(one.args, other.args, sizes))
            or (with_numbers and not _same_numbers(one.args, other.args))
        ):
            raise _another_path(
                other.where or one.where, f"{other.name} with numbers, {one.name} with symbols"
            )
        if with_sources and resolved(one.sources, same) != resolved(other.sources, same):
            where = other.where or one.where
            if _is_heard_in_parts(one.sources) or _is_heard_in_parts(other.sources):
                raise CaptureError(_not_python(where))
            raise _another_path(where, f"{one.name} is given what another call returned")
        for call in (one, other):
            for k, source in call.same.items():
                if ("call", number, k) != (source := resolved(source, same)):
                    same["call", number, k] = source
    if len(symbolic) != len(plain):
        longer = max((symbolic, plain), key=len)
        extra = longer[min(len(symbolic), len(plain))]
        raise _another_path(extra.where, f"{extra.name} is called in one of them only")


def _is_heard_in_parts(sources: Any) -> bool:
    """Whether operators were heard where no Python called a function of torch."""
    if not isinstance(sources, tuple):
        return False
    if sources[:1] == ("of",) and "." in sources[1]:
        return True
    return any(map(_is_heard_in_parts, sources))


def _not_python(where: SourceLine | None) -> Refusal:
    return Refusal(
        "The model calls code that is not Python: a scripted function, or an extension.",
        why="Only its operators are heard, others while it is captured than when it runs, so that "
        "the two cannot be compared.",
        remedy="Call the Python function that was scripted.",
        where=where,
    )


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
