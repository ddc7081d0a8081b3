"""What went wrong in a traced call, told with the user's own line."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import threading
import traceback
from collections.abc import Iterator

from cachefree.errors import CacheFreeError, CaptureError, Refusal, SourceLine
from cachefree.held_code import is_installed
from cachefree.scripted import of_a_script, scripted_at
from cachefree.sizes import is_users

__all__ = [
    "depends_on_values",
    "explained",
    "foreseen",
    "line_of",
    "silenced",
    "told",
    "unforeseen",
]

_CHATTERING = (
    "torch._subclasses.fake_tensor",
    "torch.fx.experimental.symbolic_shapes",
    "torch.fx.experimental.recording",
)


_SIZE_FUNCTIONS = sys.modules["torch.utils._sympy.functions"].__file__


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Drops what torch logs in this thread about operators that do not run on fake tensors."""
    silence = _Silence(threading.get_ident())
    loggers = [logging.getLogger(name) for name in _CHATTERING]
    for logger in loggers:
        logger.addFilter(silence)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(silence)


class _Silence(logging.Filter):
    """Drops the records of one thread: an attempt that fails is no news to the user."""

    def __init__(self, thread: int) -> None:
        super().__init__()
        self.thread = thread

    def filter(self, record: logging.LogRecord) -> bool:
        return record.thread != self.thread


def depends_on_values(error: Exception) -> bool:
    """Whether a call on fake tensors failed because it asks for the values of a tensor."""
    return type(error).__name__ in (
        "GuardOnDataDependentSymNode",
        "DataDependentOutputException",
        "DynamicOutputShapeException",
        "UserError",
        "PendingUnbackedSymbolNotFound",
    )


def line_of(error: Exception) -> SourceLine | None:
    """The user's line that was running."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if is_users(frame.filename):
            return SourceLine(frame.filename, frame.lineno or 0, frame.name)
    return None


def told(error: Exception) -> str:
    """An error in one line, with the user's line."""
    message = str(error).strip().split("\n")[0][:160]
    what = f"{type(error).__name__}: {message}"
    if depends_on_values(error):
        what = "its code depends on the values of a tensor"
    where = line_of(error)
    return what if where is None else f"{what}\n           at {where}: {where.text}"


def unforeseen(
    error: Exception,
    what: str = "The model could not be rewritten",
    kind: type[CacheFreeError] = CaptureError,
) -> CacheFreeError:
    """The error of something that no refusal foresaw."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, AssertionError) and frames and frames[-1].filename == _SIZE_FUNCTIONS:
        return kind(
            Refusal(
                "The model's code computes a number of sizes that torch has no rule for.",
                why=f"AssertionError: {error} in {frames[-1].line}: a remainder or a quotient of "
                "fractions, or one of a negative number.",
                remedy="Compute it with whole numbers ((n % 3) * 0.1), or with tensors.",
                where=line_of(error),
            )
        )
    return kind(
        Refusal(
            f"{what}, for a reason that cachefree does not know.",
            why=f"{type(error).__name__}: {str(error).strip() or 'no message'}",
            remedy="Look at the line above, where there is one; the full trace is below this "
            "error's cause. Please report it: a refusal should have said what is in the way.",
            where=line_of(error),
        )
    )


@contextlib.contextmanager
def foreseen(what: str) -> Iterator[None]:
    """Tells what no refusal foresaw as an error of cachefree.

    Raises:
        CacheFreeError: something was raised that is no word of cachefree or of the file system,
            and not by the user's own code.
    """
    try:
        yield
    except (CacheFreeError, MemoryError, OSError):
        raise
    except Exception as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if is_users(raised_in) and not is_installed(raised_in):  # progress= may end the work so
            raise
        raise unforeseen(error, what, CacheFreeError) from error


def explained(error: Exception, what: str) -> CaptureError:
    """The error of a traced call, told with the user's own line."""
    where = line_of(error)
    name = type(error).__name__
    if depends_on_values(error):
        return CaptureError(
            Refusal(
                "The model's Python code depends on the values of a tensor.",
                why="One graph has no Python: a branch, a size or a number that is read from a "
                "tensor cannot be in it.",
                remedy="Compute it with tensor operators (torch.where, masks), or pass it as an "
                "argument.",
                where=where,
            )
        )
    message = str(error).strip().split("\n")[0]
    function = scripted_at(where)
    if function is not None:
        met = "It does not run on tensors without values."
        return CaptureError(of_a_script(function, met, where))
    if message.startswith(".numpy() is not supported"):
        return CaptureError(
            Refusal(
                "The model's Python code leaves torch: it makes an array of a tensor.",
                why="A graph has torch's operators only; what NumPy computes is not seen.",
                remedy="Compute it with torch.",
                where=where,
            )
        )
    given = re.search(r"must be (?:a )?Tensor, (?:but got|not) ([\w.]+)", message)
    if given:
        return CaptureError(
            Refusal(
                what,
                why=f"{name}: {message}",
                remedy=f"A tensor is needed here, and this is {given[1]}: give "
                "example_inputs=(torch.tensor(...), ...).",
                where=where,
            )
        )
    return CaptureError(
        Refusal(
            what,
            why=f"{name}: {message}",
            remedy="Check that the model runs with these inputs, and that it uses torch operators "
            "only.",
            where=where,
        )
    )
