"""Preallocated buffers: written at a position, read up to it, so that a write is a join.

``buffer[:b, p:p+n] = k`` followed by ``buffer[:b, :p+n]`` is ``cat([live, k], 1)`` where ``live``
is what was written before, ``buffer[:b, :p]``. While a model runs under `Buffers`, a buffer is its
live part; what lies behind it is never read, or the model is refused. That ``p + n`` fits into the
buffer is asked as a question of the user's own line, and so becomes a condition of the domain.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.overrides import TorchFunctionMode

from cachefree.errors import CaptureError, Refusal
from cachefree.sizes import expression, user_line

__all__ = ["DESCRIBES", "Buffers", "Live", "gives_itself", "is_write"]

Box = tuple[tuple[Any, Any], ...]


@dataclass
class Live:
    """A preallocated buffer and what was written into it.

    Attributes:
        name: Where the model holds it, in words.
        buffer: The buffer; its values are never read.
        content: The written part, from index 0 on every axis; None before the first write.
        read: What was read of it: in the model it sees what is written over it, and the buffer
            sees what is written to it.
    """

    name: str
    buffer: torch.Tensor
    content: torch.Tensor | None = None
    read: list[torch.Tensor] = field(default_factory=list, repr=False)


@dataclass
class _View:
    """A part of a buffer that was not read yet."""

    live: Live
    box: Box
    tensor: torch.Tensor = field(repr=False)


def is_write(name: str) -> bool:
    """Whether a torch function of this name writes to its first argument."""
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name == "__setitem__" or (name.startswith("__i") and name in _IN_PLACE)


_IN_PLACE = frozenset(
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "and", "or", "xor")
)
DESCRIBES = frozenset(
    (
        "__get__",
        "size",
        "dim",
        "__len__",
        "numel",
        "stride",
        "is_contiguous",
        "is_floating_point",
        "is_complex",
        "element_size",
        "ndimension",
        "storage_offset",
        "get_device",
        "type",
        "data_ptr",
        "__repr__",
        "__format__",
        "is_pinned",
        "__hash__",
        "_version",
        "is_inference",
    )
)


def gives_itself(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> bool:
    """Whether a conversion converts nothing: torch then gives back the tensor that it is given.

    Of a tensor that stands for it while a path is captured, it gives another.
    """
    if result is args[0]:
        return True
    if name not in _PASSES_ON or name == "detach" or kwargs.get("copy"):
        return False
    if any(value is True for value in args[2:]) or not isinstance(result, torch.Tensor):
        return False
    given = args[0]
    return (
        result.dtype == given.dtype
        and result.device == given.device
        and (name != "contiguous" or given.is_contiguous())
    )


_PASSES_ON = frozenset(
    (
        "to",
        "type_as",
        "detach",
        "contiguous",
        "cuda",
        "cpu",
        "float",
        "half",
        "bfloat16",
        "double",
        "requires_grad_",
    )
)


class Buffers(TorchFunctionMode):
    """Runs a model with its preallocated buffers as joins.

    Args:
        lives: The buffers.
    """

    def __init__(self, lives: Mapping[str, Live]) -> None:
        super().__init__()
        self.lives = {id(live.buffer): live for live in lives.values()}
        self.views: dict[int, _View] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        view = self._view(args[0]) if args else None
        name = getattr(func, "__name__", str(func))
        if view is not None:
            if name in DESCRIBES:
                return func(*args, **kwargs)
            if name in ("__getitem__", "narrow"):
                box = _part(view, _index(name, args, kwargs))
                return self._read(_View(view.live, box, func(*args, **kwargs)))
            if name == "__setitem__":
                self._write(_View(view.live, _part(view, args[1]), view.tensor), args[2])
                return None
            if name == "copy_":
                self._write(view, args[1])
                return args[0]
            if name in _PASSES_ON:
                result = func(*args, **kwargs)
                if gives_itself(name, args, kwargs, result):
                    return args[0]
        if is_write(name):
            self._refuse_write_to_what_was_read(args[0])
        for part in _tensors((*args, *kwargs.values())):
            if self._view(part) is not None:
                raise self._refusal(
                    part, f"is used by {name} beyond what was written to it, or before it was"
                )
        return func(*args, **kwargs)

    def _view(self, value: Any) -> _View | None:
        if not isinstance(value, torch.Tensor):
            return None
        live = self.lives.get(id(value))
        if live is not None:
            return _View(live, tuple((0, size) for size in value.shape), value)
        return self.views.get(id(value))

    def _read(self, view: _View) -> torch.Tensor:
        """The live part where the view is exactly that or inside it; else the view, unread."""
        content = view.live.content
        if content is not None and all(
            _equal(stop, size) for (_, stop), size in zip(view.box, content.shape, strict=True)
        ):
            result = content
            view.live.read.append(content)
            for axis, (start, stop) in enumerate(view.box):
                if not _equal(start, 0):
                    result = result.narrow(axis, start, stop - start)
            return result
        self.views[id(view.tensor)] = view
        return view.tensor

    def _write(self, view: _View, value: Any) -> None:
        live, box = view.live, view.box
        shape = [stop if _equal(start, 0) else stop - start for start, stop in box]
        if not isinstance(value, torch.Tensor):
            value = torch.full([], value)
        part = value.to(device=live.buffer.device, dtype=live.buffer.dtype).expand(shape)
        for (_, stop), size in zip(box, live.buffer.shape, strict=True):
            if not _equal(stop, size) and not stop <= size:
                raise self._refusal(live.buffer, f"has {size} rows, and {stop} are written")
        if all(_equal(start, 0) for start, _ in box):
            if live.content is not None and not all(
                _equal(stop, size) for (_, stop), size in zip(box, live.content.shape, strict=True)
            ):
                raise self._refusal(live.buffer, "is written from its beginning again")
            if live.read:
                raise self._refusal(live.buffer, "is written over after it was read")
            live.content = part.clone()  # what is done to the value afterwards is not done here
            return
        axes = [axis for axis, (start, _) in enumerate(box) if not _equal(start, 0)]
        content = live.content
        if (
            content is None
            or len(axes) != 1
            or not _equal(box[axes[0]][0], content.shape[axes[0]])
            or not all(
                _equal(stop, content.shape[axis])
                for axis, (_, stop) in enumerate(box)
                if axis != axes[0]
            )
        ):
            raise self._refusal(live.buffer, "is not written where its last rows end")
        live.content = torch.cat([content, part], axes[0])

    def _refuse_write_to_what_was_read(self, value: Any) -> None:
        for live in self.lives.values():
            for part in live.read:
                if isinstance(value, torch.Tensor) and torch._C._is_alias_of(  # type: ignore[attr-defined]
                    value, part
                ):
                    raise self._refusal(live.buffer, "is changed in place where it was read")

    def _refusal(self, value: Any, what: str) -> CaptureError:
        view = self._view(value)
        name = view.live.name if view is not None else "a buffer"
        return CaptureError(
            Refusal(
                f"The preallocated buffer {name!r} {what}.",
                why="A buffer is lifted as the rows written so far; what lies behind them is not "
                "in the cache.",
                remedy="Write at the end of the rows written so far, and read up to there; or pass "
                "the cache in and return it.",
                where=user_line(sys._getframe(1)),
            )
        )


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _equal(one: Any, other: Any) -> bool:
    """Whether two sizes are the same expression; nothing is asked of a symbol."""
    if isinstance(one, int) and isinstance(other, int):
        return one == other
    return bool(
        sympy.expand(sympy.sympify(expression(one)) - sympy.sympify(expression(other))) == 0
    )


def _index(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if name == "__getitem__":
        return args[1]
    dim, start, length = (
        *args[1:],
        *(kwargs[key] for key in ("dim", "start", "length") if key in kwargs),
    )
    dim %= args[0].dim()
    return (*[slice(None)] * dim, slice(start, start + length))


def _part(view: _View, index: Any) -> Box:
    """The box of an index into a view.

    Raises:
        IndexError: the index is no tuple of slices with a step of 1.
    """
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [part for part in parts if part is Ellipsis]:
        place = next(i for i, part in enumerate(parts) if part is Ellipsis)
        missing = len(view.box) - (len(parts) - 1)
        parts[place : place + 1] = [slice(None)] * missing
    parts += [slice(None)] * (len(view.box) - len(parts))
    box = []
    for part, (start, stop) in zip(parts, view.box, strict=True):
        if not isinstance(part, slice) or part.step not in (None, 1):
            raise _unsupported(view)
        first = 0 if part.start is None else part.start
        last = None if part.stop is None else part.stop
        if _is_negative(first) or _is_negative(last):
            raise _unsupported(view)
        box.append((_plus(start, first), stop if last is None else _plus(start, last)))
    return tuple(box)


def _is_negative(bound: Any) -> bool:
    return isinstance(bound, int) and bound < 0


def _plus(one: Any, other: Any) -> Any:
    return other if _equal(one, 0) else one + other


def _unsupported(view: _View) -> CaptureError:
    return CaptureError(
        Refusal(
            f"The preallocated buffer {view.live.name!r} is indexed by more than slices.",
            why="Only consecutive rows from the beginning on are a join.",
            remedy="Write buffer[:batch, start : start + n]; or pass the cache in and return it.",
            where=user_line(sys._getframe(1)),
        )
    )
