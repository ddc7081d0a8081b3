"""Sizes that are filled up to whole blocks, under one name.

``n + (c - n % c) % c`` and ``n + (-n) % c`` are ``c * ((n + c - 1) // c)``, whatever the integer n
is and for each c above 0: the first multiple of c that is not below n. Under that name a number of
blocks times their size divides by either.
"""

from __future__ import annotations

import functools
from typing import Any

import sympy
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

__all__ = ["of_whole_blocks"]


@functools.lru_cache(maxsize=4096)
def of_whole_blocks(expr: Any) -> Any:
    """An expression of sizes, with each that is filled up to whole blocks named as such."""
    if not isinstance(expr, sympy.Basic) or not expr.has(Mod, PythonMod):
        return expr
    if isinstance(expr, sympy.Add):
        for rest in expr.args:
            found = _filled(expr, rest)
            if found is not None:
                return of_whole_blocks(found)
    parts = [of_whole_blocks(part) for part in expr.args]
    return expr if tuple(parts) == expr.args else expr.func(*parts)


def _filled(expr: Any, rest: Any) -> Any:
    """The sum with what is missing to a whole block taken in; None where a part is no such."""
    if not isinstance(rest, (Mod, PythonMod)):
        return None
    missing, block = rest.args
    if not (block.is_Integer and block > 0):
        return None
    size = -missing
    if missing.has(Mod, PythonMod):
        taken = block - missing
        if not isinstance(taken, (Mod, PythonMod)) or taken.args[1] != block:
            return None
        size = taken.args[0]
    others = expr - rest - size
    if len(sympy.Add.make_args(others)) >= len(expr.args) - 1 and others != 0:
        return None
    return others + block * FloorDiv(size + block - 1, block)
