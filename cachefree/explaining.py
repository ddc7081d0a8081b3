"""What went wrong in a traced call, told with the user's own line."""

from __future__ import annotations

import contextlib
import logging
import threading
import traceback
from collections.abc import Iterator

from cachefree.errors import CaptureError, Refusal, SourceLine
from cachefree.sizes import is_users

__all__ = ["depends_on_values", "explained", "silenced"]

_CHATTERING = (
    "torch._subclasses.fake_tensor",
    "torch.fx.experimental.symbolic_shapes",
    "torch.fx.experimental.recording",
)


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


def explained(error: Exception, what: str) -> CaptureError:
    """The error of a traced call, told with the user's own line."""
    where = None
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        line = SourceLine(frame.filename, frame.lineno or 0, frame.name)
        if is_users(frame.filename):
            where = line
            break
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
    return CaptureError(
        Refusal(
            what,
            why=f"{name}: {message}",
            remedy="Check that the model runs with these inputs, and that it uses torch operators "
            "only.",
            where=where,
        )
    )
