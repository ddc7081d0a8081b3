"""Whether code asks if two numbers are one object, ``n is ONE``, or what class a number has.

Python keeps small numbers once, so that this is so at one size and not at another, and nothing is
asked of a symbolic size that could be heard. Lines that might ask it are found in the source; where
there are any, the path is run once more with plain numbers, and what is compared is looked at.
"""

from __future__ import annotations

import ast
import contextlib
import dis
import functools
import itertools
import linecache
import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

import torch

from cachefree.errors import CaptureError, Refusal, SourceLine
from cachefree.reach import reached_by
from cachefree.sizes import is_users

__all__ = ["asks_for_sameness", "refuse_sameness"]

_Place = tuple[int | None, ...]


def asks_for_sameness(model: torch.nn.Module) -> bool:
    """Whether the model's code may compare two numbers by ``is``."""
    return any(_comparisons(code) for code in reached_by(model).codes)


@contextlib.contextmanager
def refuse_sameness() -> Iterator[None]:
    """Looks at what ``is`` compares while the block runs.

    Raises:
        CaptureError: two numbers were compared.
    """
    found: dict[SourceLine, None] = {}

    def inside(frame: FrameType, event: str, _: Any) -> Any:
        if event == "opcode":
            operands = _comparisons(frame.f_code).get(frame.f_lasti, ())
            if operands and _are_numbers(frame, operands):
                code = frame.f_code
                found[SourceLine(code.co_filename, frame.f_lineno, code.co_name)] = None
        return inside

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        if not is_users(frame.f_code.co_filename) or not _comparisons(frame.f_code):
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
    if found:
        raise CaptureError(*map(_refusal, found))


def _refusal(where: SourceLine) -> Refusal:
    return Refusal(
        "The model's code asks whether two numbers are one object, or what class a number has.",
        why="Python keeps small numbers once, so that the answer is another at some sizes; a "
        "symbolic size cannot be asked.",
        remedy="Compare numbers with ==, not with is; tell their class with isinstance.",
        where=where,
    )


def _are_numbers(frame: FrameType, operands: tuple[CodeType, ...]) -> bool:
    """Whether neighbouring operands, or the only one, are plain numbers or may be such."""
    are = []
    for operand in operands:
        try:
            value = eval(operand, frame.f_globals, dict(frame.f_locals))
        except Exception:  # noqa: BLE001 - what cannot be computed again may be a number
            are.append(True)
        else:
            are.append(type(value) is int)
    if len(are) == 1:
        return are[0]
    return any(one and other for one, other in itertools.pairwise(are))


@functools.lru_cache(maxsize=4096)
def _comparisons(code: CodeType) -> dict[int, tuple[CodeType, ...]]:
    """The offset of each comparison by ``is`` that may be of numbers → its operands."""
    suspects = _suspects(code.co_filename)
    if not suspects:
        return {}
    found = {}
    for step in dis.get_instructions(code):
        if step.opname in ("IS_OP", "LOAD_ATTR") and step.positions is not None:
            operands = suspects.get(tuple(step.positions))
            if operands is not None:
                found[step.offset] = operands
    return found


@functools.lru_cache(maxsize=256)
def _suspects(file: str) -> dict[_Place, tuple[CodeType, ...]]:
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return {}
    found: dict[_Place, tuple[CodeType, ...]] = {}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and node.attr == "__class__"
            and getattr(node.value, "id", "") not in ("self", "cls")
        ):
            operands: tuple[ast.expr, ...] = (node.value,)
        elif isinstance(node, ast.Compare) and _may_be_of_numbers(node):
            operands = (node.left, *node.comparators)
        else:
            continue
        place = (node.lineno, node.end_lineno, node.col_offset, node.end_col_offset)
        found[place] = tuple(compile(ast.Expression(operand), file, "eval") for operand in operands)
    return found


def _may_be_of_numbers(node: ast.Compare) -> bool:
    """Whether a comparison by ``is`` may compare two numbers."""
    operands = (node.left, *node.comparators)
    return any(
        isinstance(way, (ast.Is, ast.IsNot)) and not (_is_no_number(one) or _is_no_number(other))
        for way, (one, other) in zip(node.ops, itertools.pairwise(operands), strict=True)
    )


def _is_no_number(operand: ast.expr) -> bool:
    """Whether the source tells that a value is no plain number."""
    if isinstance(operand, ast.Constant):
        return type(operand.value) is not int
    if isinstance(operand, ast.Call) and isinstance(operand.func, ast.Name):
        return operand.func.id == "type"
    return isinstance(operand, (ast.List, ast.Tuple, ast.Dict, ast.Set, ast.Lambda))
