"""Sizes as nodes of a graph: read from its inputs, and computed from these."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import CleanDiv, FloorDiv, Max, Min, Mod, PythonMod

from cachefree.errors import CaptureError
from cachefree.terms import Term

__all__ = ["SizeNodes"]


class SizeNodes:
    """The nodes that hold sizes, one for each expression that is asked for.

    Args:
        graph: Where they are written.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._nodes: dict[Any, Any] = {}

    def find(self, inputs: Sequence[tuple[Term, fx.Node]]) -> None:
        """Where each size symbol is read.

        A dimension that is the symbol, else one that it can be solved from.
        """
        pending: list[tuple[fx.Node, int, Any]] = []
        for term, node in inputs:
            for dim, size in enumerate(term.sizes):
                if isinstance(size, sympy.Symbol):
                    self._define(size, node, dim)
                elif isinstance(size, sympy.Basic):
                    pending.append((node, dim, size))
        for node, dim, size in pending:
            unknown = [symbol for symbol in size.free_symbols if symbol not in self._nodes]
            if unknown and size not in self._nodes:
                # rows of a convolution with a stride tell their own number, and not that of theirs
                self._nodes[size] = self.graph.call_method("size", (node, dim))
            factor = _factor(size, unknown[0]) if len(unknown) == 1 else None
            if factor is not None:
                whole = sympy.Dummy("whole", integer=True)
                rest = sympy.expand(whole - size + factor * unknown[0])
                self._nodes[whole] = self.graph.call_method("size", (node, dim))
                self._nodes[unknown[0]] = self.node(FloorDiv(rest, factor))

    def _define(self, symbol: sympy.Symbol, node: fx.Node, dim: int) -> None:
        if symbol not in self._nodes:
            size = self.graph.call_method("size", (node, dim))
            self._nodes[symbol] = size

    def node(self, expr: Any) -> Any:
        """The node that computes a size expression."""
        if not isinstance(expr, sympy.Basic):
            return expr
        if expr.is_Integer:
            return int(expr)
        if expr.is_Float or expr.is_Rational:
            return float(expr)
        if expr not in self._nodes:
            self._nodes[expr] = self._computed(expr)
        return self._nodes[expr]

    def _computed(self, expr: sympy.Basic) -> Any:
        if isinstance(expr, sympy.Symbol):
            raise CaptureError(f"The size {expr} cannot be read from any input of the graph.")
        call = self.graph.call_function
        if isinstance(expr, sympy.Add):
            for size in list(self._nodes):
                rest = sympy.expand(expr - size)
                if len(size.args) > 1 and rest.free_symbols < expr.free_symbols:
                    return call(operator.add, (self._nodes[size], self.node(rest)))
            positive = [arg for arg in expr.args if not arg.could_extract_minus_sign()]
            negative = [-arg for arg in expr.args if arg.could_extract_minus_sign()]
            total = self.node(positive[0]) if positive else 0
            for arg in positive[1:]:
                total = call(operator.add, (total, self.node(arg)))
            for arg in negative:
                total = call(operator.sub, (total, self.node(arg)))
            return total
        function = next((f for cls, f in _SIZE_FUNCTIONS if isinstance(expr, cls)), None)
        if function is not None:
            values = [self.node(arg) for arg in expr.args]
            total = values[0]
            for value in values[1:]:
                total = call(function, (total, value))
            return total
        if isinstance(expr, sympy.Pow) and expr.exp.is_Integer and expr.exp > 0:
            base = self.node(expr.base)
            total = base
            for _ in range(int(expr.exp) - 1):
                total = call(operator.mul, (total, base))
            return total
        if type(expr).__name__ in _FLOAT_FUNCTIONS:
            function = _FLOAT_FUNCTIONS[type(expr).__name__]
            return call(function, tuple(self.node(arg) for arg in expr.args))
        raise CaptureError(
            f"The size expression {expr} ({type(expr).__name__}) cannot be written in the graph."
        )


def _factor(size: Any, symbol: sympy.Symbol) -> Any:
    """The k of ``k * symbol + rest``; None where the size is another function of the symbol."""
    if size.has(Max, Min, FloorDiv, Mod):
        return None
    factor = sympy.diff(size, symbol)
    return factor if factor.is_Integer and factor > 0 else None


_SIZE_FUNCTIONS: tuple[tuple[type, Any], ...] = (
    (sympy.Mul, operator.mul),
    (Max, torch.sym_max),
    (sympy.Max, torch.sym_max),
    (Min, torch.sym_min),
    (sympy.Min, torch.sym_min),
    (CleanDiv, operator.floordiv),
    (FloorDiv, operator.floordiv),
    (PythonMod, operator.mod),
    (Mod, operator.mod),
)
_FLOAT_FUNCTIONS: dict[str, Any] = {
    "ToFloat": torch.sym_float,
    "FloatTrueDiv": operator.truediv,
    "IntTrueDiv": operator.truediv,
    "FloatPow": operator.pow,
    "OpaqueUnaryFn_sqrt": torch.sym_sqrt,
}
