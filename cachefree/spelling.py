"""Sizes that are turned into text: a question like any other, and one that freezes the size."""

from __future__ import annotations

import ast
import contextlib
import functools
import linecache
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch

from cachefree.sizes import SizeEnvironment, is_users

__all__ = ["is_message", "sizes_in_text"]

_MESSAGES = {"print", "warn", "debug", "info", "warning", "error", "log", "warning_once", "write"}
_WAYS = ("__repr__", "__str__")
_FORMAT = "__format__"


@contextlib.contextmanager
def sizes_in_text(environment: SizeEnvironment) -> Iterator[None]:
    """Writes down where the user's code turns a size into text, but for a message to people.

    ``str(n)``, f-strings and ``str(x.shape)`` ask nothing of a symbolic size, and what they give is
    not what a number gives.
    """
    thread = threading.get_ident()
    before: dict[str, Any] = {way: vars(torch.SymInt).get(way) for way in (*_WAYS, _FORMAT)}
    original: Callable[[torch.SymInt], str] = torch.SymInt.__repr__

    def text(size: torch.SymInt) -> str:
        frame = sys._getframe(1)
        if (
            threading.get_ident() == thread
            and is_users(frame.f_code.co_filename)
            and not is_message(frame)
        ):
            return str(int(size))
        return original(size)

    def formatted(size: torch.SymInt, spec: str) -> str:
        frame = sys._getframe(1)
        is_told = not is_users(frame.f_code.co_filename) or is_message(frame)
        return original(size) if is_told else format(int(size), spec)

    setattr(torch.SymInt, _FORMAT, formatted)
    for way in _WAYS:
        setattr(torch.SymInt, way, text)
    try:
        yield
    finally:
        for way, function in before.items():
            if function is None:
                delattr(torch.SymInt, way)
            else:
                setattr(torch.SymInt, way, function)


def is_message(frame: FrameType) -> bool:
    """Whether the statement that runs only tells something: print, log, warn, assert, raise."""
    return frame.f_lineno in _messages(frame.f_code.co_filename)


@functools.lru_cache(maxsize=256)
def _messages(file: str) -> frozenset[int]:
    """The lines of a file's statements that only tell something."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return frozenset()
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Raise, ast.Assert)) or (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Call)
            and _name(node.value.func) in _MESSAGES
        ):
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return frozenset(lines)


def _name(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""
