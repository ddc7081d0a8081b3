"""Slices of symbolic dimensions, with bounds that are right at every size."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv

from cachefree.faithful import CallLog
from cachefree.grown_rows import GrownRows, of_any_round
from cachefree.loops import heard_loops
from cachefree.recurrent import captured_as
from cachefree.sizes import TORCH, SizeEnvironment, expression, is_users
from cachefree.token_places import is_token
from cachefree.token_rows import rows, sequence

__all__ = ["ExactSlices"]

_OF_LOOPS = ("token_ranges", "symbolic_python")  # enumerate(x) begins to go through x there


class ExactSlices(CallLog):
    """Gives every slice of a symbolic dimension bounds that are right at every size.

    ``x[:, -4:]`` of a dimension of size ``n`` begins at ``max(n - 4, 0)``. Traced as it is, torch
    decides for the example sizes whether ``n`` reaches 4, and the size of the result is right on
    one side only.

    Where a path is captured as for one token, ``ids[:, -1:]`` of an argument is the argument: a cut
    to the new token cuts nothing there. Of all tokens, it begins where the past ends.

    Args:
        arguments: The tensors that the model is called with.
    """

    def __init__(
        self, environment: SizeEnvironment, arguments: Iterable[torch.Tensor] = ()
    ) -> None:
        super().__init__()
        self.environment = environment
        self.arguments = {id(tensor) for tensor in arguments}
        self.grown = GrownRows(self._put_whole)

    def called(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        frame: FrameType,
    ) -> Any:
        """What a call returns, its slices with exact bounds."""
        if func is torch.Tensor.is_contiguous and is_users(frame.f_code.co_filename):
            self.environment.is_asked_by_users = True
            try:
                return func(*args, **kwargs)
            finally:
                self.environment.is_asked_by_users = False
        if func is torch.Tensor.__getitem__ and isinstance(args[0], torch.Tensor):
            is_argument = id(args[0]) in self.arguments
            args = _at_token(*args)
            args = self._selected(*args)
            if isinstance(args[1], tuple) and not args[1]:
                return args[0]
            args = (args[0], _exact_index(args[0], args[1], is_argument=is_argument))
        elif func is torch.Tensor.__setitem__ and isinstance(args[0], torch.Tensor):
            args = (*_at_token(*args[:2]), *args[2:])
            args = (args[0], _exact_index(args[0], args[1]), *args[2:])
        elif func is torch.tensor and args and isinstance(args[0], torch.SymInt):
            options = dict(kwargs)
            options.pop("requires_grad", None)
            options.setdefault("dtype", torch.int64)
            size: Any = args[0]
            return torch.full((), size, **options)
        elif func is torch.arange and len(args) == 3 and args[2] == -1 and _are_sizes(args[:2]):
            return _descending(args[0], args[1], args[2], kwargs)
        if _is_called_by_users(frame):
            dim = self.grown.begins(heard_loops(), func, args, kwargs)
            if dim is not None:
                return self._joined(func, args, kwargs, dim)
        together = rows(func, args, kwargs)
        if together is not None:
            return together
        apart = sequence(func, args, kwargs) if _is_called_by_users(frame) else None
        if apart is not None:
            self.calls[-1].rows = expression(apart.count)
            apart.seen = functools.partial(self._put_part, len(self.calls) - 1)
            return iter(apart) if func is torch.Tensor.__iter__ else apart
        return (captured_as(func, args) or func)(*args, **kwargs)

    def operands(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, with all rows where a loop over tokens has joined them one by one."""
        return self.replaced(args), self.replaced(kwargs)

    def replaced(self, value: Any) -> Any:
        """A value with all rows where a loop over tokens has joined them one by one."""
        return self.grown.replaced(heard_loops(), value)

    def _put_whole(self, whole: torch.Tensor, joined: torch.Tensor) -> None:
        self.flow.put(whole, self.flow.of(joined, len(self.calls)))

    def _joined(self, func: Any, args: tuple[Any, ...], kwargs: Any, dim: int) -> torch.Tensor:
        """One more row of a loop, joined to those of the rounds before."""
        loops = heard_loops()
        assert loops is not None
        assert loops.active is not None
        place = loops.active.symbols[loops.round]
        self.calls[-1] = of_any_round(self.calls[-1], dim, place)
        with loops.aside():
            result: torch.Tensor = func(*args, **kwargs)
        self.grown.ends(loops, result)
        return result

    def _put_part(self, call: int, part: torch.Tensor, place: int) -> None:
        self.flow.put(part, ("call", call, place))

    def _selected(self, tensor: torch.Tensor, index: Any) -> tuple[torch.Tensor, Any]:
        """``x[n]`` for a size ``n`` as a selection of that row, and what is left of the index.

        Python would turn the size into a number. That the row is there is asked in the user's name.
        """
        parts = list(index) if isinstance(index, tuple) else [index]
        if any(isinstance(part, (bool, torch.Tensor, list)) for part in parts):
            return tensor, index
        dims = _dimensions(tensor, parts)
        sizes = [n for n, part in enumerate(parts) if isinstance(part, torch.SymInt)]
        if not sizes or not all(self._is_inside(parts[n], tensor.shape[dims[n]]) for n in sizes):
            return tensor, index
        for place in reversed(sizes):
            tensor = torch.select(tensor, dims[place], parts.pop(place))
        return tensor, tuple(parts)

    def _is_inside(self, index: Any, size: Any) -> bool:
        self.environment.is_asked_by_users = True
        try:
            return bool(index >= 0) and bool(index < size)
        finally:
            self.environment.is_asked_by_users = False


def _is_called_by_users(frame: FrameType | None) -> bool:
    """Whether the user's code calls a function, where torch has written it in Python too."""
    while frame is not None and frame.f_code.co_filename in _IN_BETWEEN:
        frame = frame.f_back
    return frame is not None and is_users(frame.f_code.co_filename)


_IN_BETWEEN = frozenset(
    (
        TORCH + "functional.py",
        TORCH + "_tensor.py",
        *(os.path.join(os.path.dirname(__file__), f"{name}.py") for name in _OF_LOOPS),
    )
)


def _dimensions(tensor: torch.Tensor, parts: list[Any]) -> list[int]:
    """The dimension of the tensor that each part of an index is about."""
    consumed = sum(part is not None and part is not Ellipsis for part in parts)
    dims, dim = [], 0
    for part in parts:
        dims.append(dim)
        if part is Ellipsis:
            dim += tensor.dim() - consumed
        elif part is not None:
            dim += 1
    return dims


def _are_sizes(values: Any) -> bool:
    return all(isinstance(value, (int, torch.SymInt)) for value in values)


def _descending(start: Any, end: Any, step: Any, options: Mapping[str, Any]) -> torch.Tensor:
    """``arange(start, end, -1)`` as ``start - arange(start - end)``.

    The length of that is no rounded quotient.
    """
    dtype = options.get("dtype") or (
        torch.get_default_dtype() if isinstance(step, float) else torch.int64
    )
    count = torch.arange(start - end, **{**options, "dtype": dtype})
    descending: torch.Tensor = start - count
    return descending


def _at_token(tensor: torch.Tensor, index: Any) -> tuple[torch.Tensor, Any]:
    """``x[:, t, i]`` at a token's place as ``x.select(1, t)[:, i]``, which keeps the symbol."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(part, (bool, torch.Tensor, list)) for part in parts):
        return tensor, index
    consumed = sum(part is not None and part is not Ellipsis for part in parts)
    dim = 0
    for place, part in enumerate(parts):
        if isinstance(part, torch.SymInt) and _is_place(part):
            rest = (*parts[:place], *parts[place + 1 :])
            if all(part == slice(None) for part in rest):
                rest = ()
            return (
                _at_token(torch.select(tensor, dim, part), rest)
                if rest
                else (
                    torch.select(tensor, dim, part),
                    (),
                )
            )
        if part is not None:
            dim += tensor.dim() - consumed if part is Ellipsis else 1
    return tensor, index


def _is_place(size: torch.SymInt) -> bool:
    expr = sympy.sympify(expression(size))
    return any(is_token(symbol) for symbol in expr.free_symbols if isinstance(symbol, sympy.Symbol))


def _exact_index(tensor: torch.Tensor, index: Any, *, is_argument: bool = False) -> Any:
    parts = list(index) if isinstance(index, tuple) else [index]
    if not any(isinstance(part, slice) for part in parts):
        return index
    consumed = sum(
        1
        for part in parts
        if isinstance(part, (int, slice, torch.SymInt)) and not isinstance(part, bool)
    )
    if any(isinstance(part, (bool, torch.Tensor, list)) for part in parts):
        return index  # advanced indexing: dimensions do not follow one another simply
    dim = 0
    for place, part in enumerate(parts):
        if part is Ellipsis:
            dim += tensor.dim() - consumed
            continue
        if part is None:
            continue
        if isinstance(part, slice):
            size = tensor.shape[dim]
            is_whole = is_argument and _is_whole_as_asked(part, size)
            start = _start_of_new_tokens(part, size)
            if is_whole or start is not None:
                parts[place] = slice(start, None)
            else:
                parts[place] = _exact_slice(part, size)
        dim += 1
    return tuple(parts) if isinstance(index, tuple) else parts[0]


def _is_whole_as_asked(part: slice, size: Any) -> bool:
    """Whether ``-n:`` cuts nothing at the size by which Python's questions are answered."""
    if not isinstance(size, torch.SymInt) or part.step not in (None, 1) or part.stop is not None:
        return False
    if not isinstance(part.start, int) or part.start >= 0:
        return False
    environment = size.node.shape_env
    asked = environment.asked if isinstance(environment, SizeEnvironment) else {}
    value = sympy.sympify(expression(size))
    if not asked or not value.free_symbols <= asked.keys():
        return False
    return value.xreplace(asked) <= -part.start and bool(size <= -part.start)


def _start_of_new_tokens(part: slice, size: Any) -> Any:
    """Where ``-1:`` of all tokens begins, as for one new token; None where it is another cut.

    At that size it is where the past ends.
    """
    if not isinstance(size, torch.SymInt) or part.step not in (None, 1) or part.stop is not None:
        return None
    environment = size.node.shape_env
    if part.start != -1 or not isinstance(environment, SizeEnvironment):
        return None
    past = environment.totals.get(expression(size))
    if past is None or not size - environment.size_of(past) <= 1:
        return None
    return environment.size_of(past)


def _exact_slice(part: slice, size: Any) -> slice:
    if not isinstance(size, torch.SymInt) or part.step not in (None, 1):
        return part
    return slice(_exact_bound(part.start, size), _exact_bound(part.stop, size), part.step)


def _is_whole_blocks(bound: Any, size: Any) -> bool:
    """Whether a bound is ``size // block * block``, and so within the size."""
    factor, blocks = bound.as_coeff_Mul()
    if not isinstance(blocks, FloorDiv) or not factor.is_Integer or blocks.args[1] != factor:
        return False
    return factor > 0 and bool((size - blocks.args[0]).is_nonnegative)


def _exact_bound(bound: Any, size: Any) -> Any:
    """``bound`` clamped to ``[0, size]`` as slicing does; None where slicing leaves it out."""
    if bound is None or (isinstance(bound, int) and (bound == 0 or bound == sys.maxsize)):
        return bound
    value = sympy.sympify(expression(bound))
    if any(is_token(symbol) for symbol in value.free_symbols):
        return bound  # a token's place, or the one after it, is within the tokens
    if isinstance(bound, int):
        if bound >= 0:
            return torch.sym_min(bound, size)
        return torch.sym_max(size + bound, 0)
    if value.is_nonnegative:
        total = expression(size)
        is_inside = (total - value).is_nonnegative or _is_whole_blocks(value, total)
        return bound if is_inside else torch.sym_min(bound, size)
    if value.is_nonpositive:
        # -n: is the whole for n = 0, as in Python
        return bound
    if isinstance(bound, torch.SymInt) and bound.node.shape_env.asked:
        # Python's sign is that of the sizes asked for, the operator would take the examples'
        start = torch.sym_max(size + bound, 0) if bound < 0 else bound
        return torch.sym_min(start, size)
    return bound
