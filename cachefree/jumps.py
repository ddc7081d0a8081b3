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

__all__ = ["Jumps", "unwatched", "watched_jumps"]

Jumps = dict[tuple[CodeType, int], set[bool]]
"""A place in code → the ways that it went: taken or not."""


@contextlib.contextmanager
def watched_jumps(ways: Jumps) -> Iterator[None]:
    """Writes down the ways that the jumps go inside."""
    watches: dict[int, _Watch] = {}  # by identity: what a code object is equal to takes long

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        watch = watches.get(id(code))
        if watch is None:
            watch = watches[id(code)] = _Watch(code)
        if not watch.jumps:
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return watch.inside()

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)
        for watch in watches.values():
            for jump, taken in watch.went:
                ways.setdefault((watch.code, jump), set()).add(taken)


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Lets what runs inside, which is none of the user's code, run at its own speed."""
    before = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(before)


class _Watch:
    """Which way the jumps of one code object went; of no jumps, if it is not the user's."""

    def __init__(self, code: CodeType) -> None:
        self.code = code
        self.jumps = _conditional_jumps(code) if is_users(code.co_filename) else {}
        self.went: set[tuple[int, bool]] = set()

    def inside(self) -> Any:
        """What a frame of this code calls at every instruction."""
        jumps, went = self.jumps, self.went
        pending: int | None = None

        def inside(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal pending
            if event != "opcode":
                return inside
            here = frame.f_lasti
            if pending is not None:
                went.add((pending, here != jumps[pending]))
                pending = None
            if here in jumps:
                pending = here
            return inside

        return inside


@functools.lru_cache(maxsize=4096)
def _conditional_jumps(code: CodeType) -> dict[int, int]:
    """Offset of each conditional jump → offset of the instruction after it."""
    instructions = list(dis.get_instructions(code))
    return {
        instruction.offset: after.offset
        for instruction, after in itertools.pairwise(instructions)
        if instruction.opname.startswith(("POP_JUMP", "JUMP_IF"))
    }
