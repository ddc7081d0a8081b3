"""Which way every conditional jump of the user's code goes while a call runs."""

from __future__ import annotations

import contextlib
import dis
import functools
import itertools
import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

from cachefree.sizes import is_users

__all__ = ["Jumps", "watched_jumps"]

Jumps = dict[tuple[CodeType, int], set[bool]]
"""A place in code → the ways that it went: taken or not."""


@contextlib.contextmanager
def watched_jumps(ways: Jumps) -> Iterator[None]:
    """Writes down the ways that the jumps go inside."""
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
