"""The branches of the user's code that the one graph does not have any more.

Found by watching which way every conditional jump of the user's code goes in a first and in a later
call on fake tensors.
"""

from __future__ import annotations

import ast
import functools
import linecache
from collections.abc import Iterable, Iterator, Sequence
from types import CodeType

from cachefree.errors import SourceLine
from cachefree.jumps import Jumps
from cachefree.report import Branch, excerpt
from cachefree.rules import Closing

__all__ = ["removed_branches"]

JOIN = "neutral element of a join"
STATE = "neutral element of a state"


def removed_branches(
    first: Jumps,
    later: Jumps,
    closings: Sequence[Closing],
    neutral: str,
) -> tuple[Branch, ...]:
    """The conditions of the user's code that the first call and later calls decide differently.

    Args:
        first: The ways that conditional jumps go in a first call.
        later: The same of a later call.
        closings: The rules that were applied.
        neutral: The neutral element of the cache, in words.
    """
    found: dict[tuple[str, int, str], Branch] = {}
    for (code, offset), ways in first.items():
        others = later.get((code, offset))
        if others is None or others == ways:
            continue
        line, condition = _source_of(code, offset)
        where = SourceLine(code.co_filename, line, code.co_name)
        joined = JOIN if neutral.startswith("zero length") else STATE
        rule, element = _closed_by(where, closings) or (joined, neutral)
        found.setdefault(
            (code.co_filename, line, condition), _branch(where, condition, rule, element)
        )
    for branch in _closed_elsewhere(closings, found.values()):
        found.setdefault((branch.where.file, branch.where.line, branch.condition), branch)
    return tuple(sorted(found.values(), key=lambda branch: (branch.where.file, branch.where.line)))


def _closed_elsewhere(closings: Sequence[Closing], found: Iterable[Branch]) -> Iterator[Branch]:
    """What rules closed at lines that no jump belongs to: a flag, or a size that differs."""
    told = {branch.rule for branch in found}
    for closing in closings:
        if closing.rule.name in told:
            continue
        for divergence in closing.divergences:
            line = divergence.other.line or divergence.one.line
            if line is not None:
                yield _branch(line, line.text, closing.rule.name, closing.rule.neutral)


def _branch(where: SourceLine, condition: str, rule: str, neutral: str) -> Branch:
    return Branch(
        where, condition, rule, neutral, excerpt(where.file, *_extent(where.file, where.line))
    )


def _closed_by(where: SourceLine, closings: Sequence[Closing]) -> tuple[str, str] | None:
    """The rule that closed a divergence inside the statement of a branch."""
    first, last = _extent(where.file, where.line)
    for closing in closings:
        for divergence in closing.divergences:
            lines = (divergence.one.line, divergence.other.line)
            if any(
                line is not None and line.file == where.file and first <= line.line <= last
                for line in lines
            ):
                return closing.rule.name, closing.rule.neutral
    return None


@functools.lru_cache(maxsize=256)
def _parsed(file: str) -> ast.AST | None:
    try:
        return ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return None


def _extent(file: str, line: int) -> tuple[int, int]:
    """The first and the last line of the statement that branches on a line."""
    tree = _parsed(file)
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, (ast.If, ast.IfExp, ast.While)) and node.test.lineno <= line <= (
            node.test.end_lineno or 0
        ):
            return node.lineno, node.end_lineno or node.lineno
    return line, line


def _source_of(code: CodeType, offset: int) -> tuple[int, str]:
    """The line of a jump and the source text of its condition."""
    positions = list(code.co_positions())
    line, end_line, column, end_column = positions[offset // 2]
    if line is None:
        return code.co_firstlineno, ""
    text = linecache.getline(code.co_filename, line)
    if end_line == line and column is not None and end_column is not None:
        return line, text.encode()[column:end_column].decode()
    return line, _condition_at(code.co_filename, line) or text.strip()


def _condition_at(file: str, line: int) -> str | None:
    """The condition of the statement or expression that branches on a line."""
    tree = _parsed(file)
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, (ast.If, ast.IfExp, ast.While)) and node.test.lineno == line:
            return ast.unparse(node.test)
    return None
