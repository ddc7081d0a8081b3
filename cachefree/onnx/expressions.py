"""Sizes and facts about them as text that is parsed and never run."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

import sympy
from torch.utils._sympy import functions as torch_functions

from cachefree.sizes import size_symbol

__all__ = ["parse_expression"]

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.USub: operator.neg,
    ast.Div: operator.truediv, ast.Pow: operator.pow, ast.Mod: torch_functions.Mod,
    ast.FloorDiv: torch_functions.FloorDiv,
    ast.BitAnd: sympy.And, ast.BitOr: sympy.Or, ast.Invert: sympy.Not,
    ast.Eq: sympy.Eq, ast.NotEq: sympy.Ne, ast.Lt: sympy.Lt, ast.LtE: sympy.Le,
    ast.Gt: sympy.Gt, ast.GtE: sympy.Ge,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Eq": sympy.Eq, "Ne": sympy.Ne, "And": sympy.And, "Or": sympy.Or, "Not": sympy.Not,
    "Max": torch_functions.Max, "Min": torch_functions.Min, "Mod": torch_functions.Mod,
    "PythonMod": torch_functions.PythonMod, "FloorDiv": torch_functions.FloorDiv,
    "CleanDiv": torch_functions.CleanDiv, "ceiling": sympy.ceiling, "floor": sympy.floor,
}  # fmt: skip
_CONSTANTS = {"True": sympy.true, "False": sympy.false}


def parse_expression(text: str) -> Any:
    """A size expression or a fact about sizes, read without running anything.

    Raises:
        ValueError: the text is anything else than numbers, size symbols and known functions of
            them.
        SyntaxError: it is no expression.
    """
    return _value(ast.parse(text, mode="eval").body)


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=bool() as truth):
            return _CONSTANTS[str(truth)]
        case ast.Constant(value=int() as number):
            return sympy.Integer(number)
        case ast.Constant(value=float() as number):
            return sympy.Float(number)
        case ast.Name(id=name):
            return size_symbol(name)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left), _value(right))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(operand))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left), _value(right))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*map(_value, args))
    raise ValueError(f"{ast.unparse(node)} is no expression of sizes")
