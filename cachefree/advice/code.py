"""The user's code as a tree: finding a statement, and writing a part of it anew."""

from __future__ import annotations

import ast
import inspect
import linecache
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cachefree.advice.change import Change
from cachefree.errors import SourceLine

__all__ = ["Code", "code_at", "code_of"]


@dataclass(frozen=True)
class Code:
    """A function of the user's.

    Attributes:
        file: Its file.
        lines: All lines of the file.
        tree: The function.
    """

    file: str
    lines: tuple[str, ...]
    tree: ast.FunctionDef

    @property
    def parameters(self) -> list[str]:
        """The names of its parameters."""
        arguments = self.tree.args
        return [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]

    def walk(self, kind: Any) -> Iterator[Any]:
        """The nodes of a kind, in the order of their lines."""
        found = [node for node in ast.walk(self.tree) if isinstance(node, kind)]
        yield from sorted(found, key=lambda node: (node.lineno, node.col_offset))

    def text(self, node: ast.AST) -> str:
        """The text of an expression, on one line."""
        return ast.unparse(node)

    def replaced(self, node: Any, text: str, why: str) -> Change | None:
        """The lines of an expression or statement with other text in its place."""
        first, last = node.lineno, node.end_lineno
        before = self.lines[first - 1 : last]
        head = before[0].encode()[: node.col_offset].decode()
        tail = before[-1].encode()[node.end_col_offset :].decode()
        after = tuple(line.rstrip() for line in (head + text + tail).split("\n"))
        return Change(why, self.file, first, before, after)

    def removed(self, node: ast.stmt, why: str, kept: tuple[ast.stmt, ...] = ()) -> Change:
        """A statement gone, but for statements inside it, which take its place."""
        first, last = node.lineno, node.end_lineno or node.lineno
        after: list[str] = []
        for statement in kept:
            indent = " " * node.col_offset
            text = ast.get_source_segment("\n".join(self.lines), statement) or ""
            own = statement.col_offset
            after += [
                indent + (line if place == 0 else line[own:] if line[:own].isspace() else line)
                for place, line in enumerate(text.split("\n"))
            ]
        return Change(why, self.file, first, self.lines[first - 1 : last], tuple(after))


def code_at(where: SourceLine | None) -> Code | None:
    """The function that a line is in."""
    if where is None:
        return None
    lines = tuple(line.rstrip("\n") for line in linecache.getlines(where.file))
    found = [
        node
        for node in _functions(lines)
        if node.lineno <= where.line <= (node.end_lineno or node.lineno)
    ]
    return Code(where.file, lines, max(found, key=lambda node: node.lineno)) if found else None


def code_of(function: Any) -> Code | None:
    """The tree of a function or method."""
    function = inspect.unwrap(getattr(function, "__func__", function))
    code = getattr(function, "__code__", None)
    return None if code is None else code_at(SourceLine(code.co_filename, code.co_firstlineno))


def _functions(lines: tuple[str, ...]) -> list[ast.FunctionDef]:
    try:
        tree = ast.parse("\n".join(lines))
    except SyntaxError:
        return []
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
