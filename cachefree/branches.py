"""The branches of the user's code that the one graph does not have any more.

Found by watching which way every conditional jump of the user's code goes in a first and in a later
call on fake tensors.
"""

from __future__ import annotations

import ast
import contextlib
import dis
import functools
import itertools
import linecache
import sys
from collections.abc import Iterable, Iterator, Sequence
from types import CodeType, FrameType
from typing import Any

import torch

from cachefree.capture import Call, run_on_fakes
from cachefree.errors import SourceLine
from cachefree.report import Branch
from cachefree.rules import Closing
from cachefree.sizes import is_users

__all__ = ["removed_branches"]

Jump = tuple[CodeType, int]
JOIN = "neutral element of a join"
STATE = "neutral element of a state"


def removed_branches(
    model: torch.nn.Module,
    calls: tuple[Call, Call],
    hints: dict[str, int],
    closings: Sequence[Closing],
    neutral: str,
) -> tuple[Branch, ...]:
    """The conditions of the user's code that the first call and later calls decide differently.

    Args:
        model: The model.
        calls: The first and a later call.
        hints: Example sizes.
        closings: The rules that were applied.
        neutral: The neutral element of the cache, in words.
    """
    first, later = (_jumps(model, call, hints) for call in calls)
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
            (code.co_filename, line, condition), Branch(where, condition, rule, element)
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
                yield Branch(line, line.text, closing.rule.name, closing.rule.neutral)


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


def _jumps(model: torch.nn.Module, call: Call, hints: dict[str, int]) -> dict[Jump, set[bool]]:
    """The ways that the conditional jumps of the user's code go in a call: taken or not."""
    ways: dict[Jump, set[bool]] = {}
    with _watching(ways):
        run_on_fakes(model, call, hints)
    return ways


@contextlib.contextmanager
def _watching(ways: dict[Jump, set[bool]]) -> Iterator[None]:
    pending: dict[FrameType, int] = {}

    def inside(frame: FrameType, event: str, _: Any) -> Any:
        if event != "opcode":
            return inside
        jumps = _conditional_jumps(frame.f_code)
        before = pending.pop(frame, None)
        if before is not None:
            ways.setdefault((frame.f_code, before), set()).add(frame.f_lasti != jumps[before])
        if frame.f_lasti in jumps:
            pending[frame] = frame.f_lasti
        return inside

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        if not is_users(frame.f_code.co_filename):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return inside

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


@functools.lru_cache(maxsize=4096)
def _conditional_jumps(code: CodeType) -> dict[int, int]:
    """Offset of each conditional jump → offset of the instruction after it."""
    instructions = list(dis.get_instructions(code))
    return {
        instruction.offset: after.offset
        for instruction, after in itertools.pairwise(instructions)
        if instruction.opname.startswith(("POP_JUMP", "JUMP_IF"))
    }


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
