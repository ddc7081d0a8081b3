"""Random numbers that are drawn outside of torch and thrown away.

``p = random.uniform(0, 1)`` before ``if self.training and p < rate`` draws at every call and is
used in training only. While a model is captured such a draw gives a `Draw` in place of a number.
Whoever does anything with it, or keeps it beyond the call, learns that the model draws random
numbers. The generator does not move on, so that any other draw is seen by its having done so.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import wraps
from types import CodeType
from typing import Any

from cachefree.errors import CaptureError, Refusal, SourceLine
from cachefree.held_code import is_installed
from cachefree.sizes import is_users

__all__ = ["Draw", "drawing_functions", "draws_randomly", "refused_where_used"]

_heard = threading.local()
_MOST = 1 << 53


@dataclass
class _Draws:
    """What became of the draws of one call."""

    held: int = 0
    where: SourceLine | None = None
    used: CaptureError | None = None


@contextlib.contextmanager
def refused_where_used(codes: Iterable[CodeType] = ()) -> Iterator[None]:
    """Lets draws of this thread's user code give a `Draw`.

    Args:
        codes: The code that the model reaches. Where any of the user's own names ``type``, which
            does not ask the number, draws give numbers.

    Raises:
        CaptureError: one was used, whatever the code made of the error that it met there; or it is
            still there at the end.
    """
    if any("type" in code.co_names and not is_installed(code.co_filename) for code in codes):
        yield
        return
    before = getattr(_heard, "draws", None)
    draws = _heard.draws = _Draws()
    try:
        yield
    except Exception:
        if draws.used is not None:
            raise draws.used from None
        raise
    finally:
        _heard.draws = before
    if draws.used is not None:
        raise draws.used
    if draws.held:
        raise draws_randomly(draws.where)


def draws_randomly(where: SourceLine | None = None) -> CaptureError:
    """The refusal of a model that draws random numbers from a generator that is not torch's."""
    return CaptureError(
        Refusal(
            "The model draws random numbers outside of torch.",
            why="Two calls of the model differ, so that no graph can equal them.",
            remedy="Call model.eval(), or pass the numbers as an argument.",
            where=where,
        )
    )


# What Python and the packages ask of a number's class; they ask the number itself for the rest.
_ASKED = (
    *("abs", "bool", "ceil", "complex", "divmod", "eq", "float", "floor", "floordiv", "format"),
    *("ge", "gt", "hash", "index", "int", "le", "lt", "mod", "mul", "ne", "neg", "pos", "pow"),
    *("add", "sub", "truediv", "radd", "rsub", "rmul", "rtruediv", "rfloordiv", "rmod", "rpow"),
    *("rdivmod", "repr", "round", "str", "trunc", "and", "or", "xor", "rand", "ror", "rxor"),
    *("lshift", "rshift", "rlshift", "rrshift", "invert", "matmul", "rmatmul", "getattribute"),
    *("setattr", "delattr", "copy", "deepcopy", "reduce", "reduce_ex", "sizeof", "dir"),
    *("array", "array_ufunc", "array_function", "torch_function"),
)


class Draw:
    """Stands for a number that was drawn: nothing can be done with it but to throw it away."""

    __slots__ = ("_draws",)

    def __init__(self, draws: _Draws) -> None:
        object.__setattr__(self, "_draws", draws)
        draws.held += 1

    def __del__(self) -> None:
        object.__getattribute__(self, "_draws").held -= 1


def _asked(name: str) -> Callable[..., Any]:
    plain = getattr(object, name, None)

    def use(draw: Any, *args: Any, **kwargs: Any) -> Any:
        draws = getattr(_heard, "draws", None)
        if draws is None and plain is not None:
            return plain(draw, *args, **kwargs)  # whoever puts back what a call has left behind
        error = draws_randomly(_line())
        if draws is not None:
            draws.used = draws.used or error
        raise error

    return use


for _name in _ASKED:
    setattr(Draw, f"__{_name}__", _asked(f"__{_name}__"))


def _line() -> SourceLine | None:
    frame = sys._getframe(2)
    while not is_users(frame.f_code.co_filename):
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return SourceLine(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)


def drawing_functions() -> list[tuple[Any, str, Any]]:
    """The functions that draw one number: their module, their name there, and what hears them."""
    return [
        (home, name, _drawing(getattr(home, name), lengths))
        for place, name, lengths in _FUNCTIONS
        if (home := sys.modules.get(place)) is not None and hasattr(home, name)
    ]


# With how many arguments, none or the ends of a range, each gives one number.
_FUNCTIONS = (
    ("random", "random", (0,)),
    ("random", "uniform", (2,)),
    ("numpy.random", "random", (0,)),
    ("numpy.random", "rand", (0,)),
    ("numpy.random", "uniform", (0, 2)),
)


def _drawing(original: Callable[..., Any], lengths: tuple[int, ...]) -> Callable[..., Any]:
    @wraps(original)
    def draw(*args: Any, **kwargs: Any) -> Any:
        draws, code = getattr(_heard, "draws", None), sys._getframe(1).f_code
        is_number = not kwargs and len(args) in lengths and all(map(_is_end, args))
        # what `type` is given is not asked for anything
        is_heard = "type" not in code.co_names and is_users(code.co_filename)
        if draws is None or not (is_number and is_heard):
            return original(*args, **kwargs)
        draws.where = _line()
        return Draw(draws)

    return draw


def _is_end(value: Any) -> bool:
    return type(value) in (int, float) and -_MOST < value < _MOST
