"""The places of tokens in a loop over them, as symbols."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy

from cachefree.sizes import size_symbol

__all__ = ["TOKEN", "is_token", "least_of"]

TOKEN = "token_"


def is_token(symbol: Any) -> bool:
    """Whether a symbol is the place of a token in a loop."""
    return bool(symbol.name.startswith(TOKEN))


def least_of(expr: Any, counts: Mapping[sympy.Symbol, Any] | None = None) -> Any:
    """What an expression is at least, over all places of tokens; other sizes are at least 1."""
    for symbol, count in (counts or {}).items():
        if symbol in expr.free_symbols:
            slope = _of_sizes_of_one(sympy.diff(expr, symbol))
            if symbol in slope.free_symbols:
                return sympy.nan
            if slope.is_nonnegative:
                expr = expr.subs(symbol, 0)
            elif slope.is_nonpositive:
                expr = expr.subs(symbol, count - 1)
            else:
                return sympy.nan
    return _of_sizes_of_one(expr)


def _of_sizes_of_one(expr: Any) -> Any:
    """The expression where every size is one and something more."""
    positive = {symbol: size_symbol(f"{symbol}_more") + 1 for symbol in expr.free_symbols}
    return sympy.expand(expr.subs(positive))
