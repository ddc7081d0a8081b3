"""Runs a command: its answer goes to stdout, what is wrong to stderr, and how it went is a code."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from cachefree.cli.parser import (
    DIFFERENT,
    INTERRUPTED,
    MISSING,
    WRONG,
    WrongWordsError,
    make_parser,
)
from cachefree.errors import (
    CacheFreeError,
    CacheNotFoundError,
    CaptureError,
    UnsupportedBranchError,
)

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line.

    Args:
        arguments: Its words; None: those that the program was called with.

    Returns:
        The exit code: 0 done, 1 refused, different or failed, 2 wrong arguments, a model that
        cannot be loaded or a path that cannot be written, 3 a part that is not installed, 130
        interrupted.
    """
    from cachefree import __version__

    try:
        options = make_parser(__version__).parse_args(arguments)
    except SystemExit as leaving:  # --help, --version
        return int(leaving.code or 0)
    except WrongWordsError as error:
        return _not_understood(error, sys.argv[1:] if arguments is None else arguments)
    wants_json = bool(getattr(options, "json", False))
    try:
        with _ending_is_an_interrupt():
            return _run(options, wants_json=wants_json)
    except KeyboardInterrupt:
        print("cachefree: interrupted; nothing half-written is left", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _not_understood(error: WrongWordsError, words: Sequence[str]) -> int:
    if "--json" in words:
        told = {"what": str(error), "why": "", "remedy": error.usage, "file": None, "line": None}
        print(json.dumps({"error": type(error).__name__, "refusals": [told]}, indent=2))
    else:
        print(f"{error.usage}{error}", file=sys.stderr)
    return WRONG


def _run(options: Any, *, wants_json: bool) -> int:
    from cachefree.cli.commands import COMMANDS

    # what the user's own code prints is no part of the plain values
    aside = contextlib.redirect_stdout(sys.stderr) if wants_json else contextlib.nullcontext()
    try:
        with aside:
            answer = COMMANDS[options.command](options)
    except CacheFreeError as error:
        return _failed(error, options, wants_json=wants_json)
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001 - told first, then shown as it was raised
        from cachefree.explaining import unforeseen

        what = f"`cachefree {options.command}` failed"
        code = _failed(unforeseen(error, what, CacheFreeError), options, wants_json=wants_json)
        print("", *traceback.format_exception(error), sep="\n", file=sys.stderr)
        return code
    if wants_json:
        print(json.dumps(answer.plain, indent=2))
    else:
        _show(answer.shown)
    return answer.code


def _failed(error: CacheFreeError, options: Any, *, wants_json: bool) -> int:
    """Tells what is wrong, and gives the exit code."""
    from cachefree.cli.commands import MissingPartError
    from cachefree.cli.sources import SourceError
    from cachefree.onnx.storage import UnwritableError

    if wants_json:
        print(json.dumps(_plain(error), indent=2))
    else:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        refused = (CacheNotFoundError, CaptureError, UnsupportedBranchError)
        if isinstance(error, refused) and options.command in ("rewrite", "export", "verify"):
            print("\n`cachefree explain` may know a change that helps.", file=sys.stderr)
    codes = ((SourceError, WRONG), (UnwritableError, WRONG), (MissingPartError, MISSING))
    return next((code for kind, code in codes if isinstance(error, kind)), DIFFERENT)


def _show(shown: Any) -> None:
    """Text as it is, a report in colour on a terminal where ``rich`` is installed."""
    if not isinstance(shown, str) and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            from rich.console import Console

            Console().print(shown)
            return
    text = str(shown)
    if text:
        print(text)


def _plain(error: CacheFreeError) -> dict[str, Any]:
    return {
        "error": type(error).__name__,
        "refusals": [
            {
                "what": refusal.what,
                "why": refusal.why,
                "remedy": refusal.remedy,
                "file": refusal.where.file if refusal.where else None,
                "line": refusal.where.line if refusal.where else None,
            }
            for refusal in error.refusals
        ],
    }


@contextlib.contextmanager
def _ending_is_an_interrupt() -> Iterator[None]:
    """A polite request to end is an interrupt: what was begun is cleared away."""

    def end(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
