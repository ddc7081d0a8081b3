"""Lines of the user's code as they stand in their file, and how they look in HTML."""

from __future__ import annotations

import html
import keyword
import linecache
import os
import re
import sys
from dataclasses import dataclass

__all__ = ["Excerpt", "excerpt", "highlighted", "short"]

_AROUND = 3
_MOST_LINES = 24
_SOFT = ("match", "case", "type", "_")
_TOKEN = re.compile(
    r"(?P<comment>\#.*)"
    r"|(?P<string>[rbfuRBFU]{0,2}(?:\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'))"
    r"|(?P<number>\b\d[\w.]*)"
    r"|(?P<name>\b[^\W\d]\w*)"
)


@dataclass(frozen=True)
class Excerpt:
    """Lines of a file.

    Attributes:
        file: The file.
        start: The number of the first line.
        lines: The lines, without the indentation that all of them have.
        marked: The numbers of the lines that are meant.
    """

    file: str
    start: int
    lines: tuple[str, ...]
    marked: tuple[int, ...]


def excerpt(file: str, first: int, last: int | None = None) -> Excerpt | None:
    """The lines around those that are meant; None where the file cannot be read.

    They are read when this is called, so that they are the lines that ran, whatever an editor does
    to the file afterwards.
    """
    everything = linecache.getlines(file)
    last = min(first + _MOST_LINES, first if last is None else last)
    if not 0 < first <= len(everything):
        return None
    start, end = max(1, first - _AROUND), min(len(everything), last + _AROUND)
    lines = [line.rstrip().expandtabs(4) for line in everything[start - 1 : end]]
    while len(lines) > last - start + 1 and not lines[-1]:
        lines.pop()
    common = min((len(line) - len(line.lstrip()) for line in lines if line), default=0)
    return Excerpt(
        file, start, tuple(line[common:] for line in lines), tuple(range(first, last + 1))
    )


def highlighted(line: str) -> str:
    """A line of Python as HTML."""
    parts, at = [], 0
    for token in _TOKEN.finditer(line):
        kind, text = token.lastgroup or "", token[0]
        if kind == "name":
            is_word = keyword.iskeyword(text) and text not in _SOFT
            kind = "keyword" if is_word else ""
        parts.append(html.escape(line[at : token.start()]))
        escaped = html.escape(text)
        parts.append(f'<span class="cf-{kind}">{escaped}</span>' if kind else escaped)
        at = token.end()
    return "".join((*parts, html.escape(line[at:])))


def short(file: str) -> str:
    """A path as short as it can be: relative below the working directory; a cell by its number."""
    if "ipykernel" in sys.modules:
        from IPython import get_ipython

        shell = get_ipython()
        named = None if shell is None else shell.compile.format_code_name(file)
        if named is not None:
            return " ".join(named)
    return file.removeprefix(os.getcwd() + os.sep)
