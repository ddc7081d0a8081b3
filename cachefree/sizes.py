"""Symbolic sizes, and a shape environment that hears every question which is asked about them.

``torch.export`` decides comparisons with 0 and 1 from ranges and leaves no guard. Here every symbol
ranges over ``[0, ∞)``, so nothing is decided by range: each question is answered for the example
sizes and written down, with the line of code that asked it. Questions that a torch operator asks
about its own operands are kept
apart: the operator is run again later and answers them itself.
"""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch._dynamo.source import ConstantSource
from torch._guards import SLoc
from torch.fx.experimental.symbolic_shapes import ShapeEnv, ValueRangesSLoc
from torch.utils._sympy.functions import Max, Min, Mod, PythonMod
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from cachefree.errors import SourceLine
from cachefree.padded_sizes import of_whole_blocks

__all__ = [
    "TORCH",
    "Question",
    "SizeEnvironment",
    "compiled",
    "expression",
    "preimage",
    "size_symbol",
    "user_line",
]

TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(__file__) + os.sep
# What is typed at a prompt has such a name too ("<stdin>", "<ipython-input-3-…>"), and is a user's.
_WRITTEN_BY_MACHINES = ("<frozen", "<eval_with_key>", "<__array_function__", "<attrs generated")
_WRITTEN_FUNCTIONS = ("__init__", "__new__", "__eq__", "__repr__", "__hash__", "<lambda>")
_STANDARD_LIBRARY = os.path.dirname(os.__file__) + os.sep
# torch computes sizes with them, in the middle of the user's calls
_ALGEBRA = tuple(
    os.path.dirname(sys.modules[name].__file__ or "") + os.sep for name in ("sympy", "mpmath")
)


def size_symbol(name: str) -> sympy.Symbol:
    """The symbol of a size: a nonnegative integer. Equal names are equal symbols."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


def expression(size: Any) -> Any:
    """The sympy expression of a ``SymInt``, ``SymFloat`` or ``SymBool``; an int stays one."""
    if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        expr = size.node.expr
        return int(expr) if expr.is_Integer else expr
    if isinstance(size, sympy.Integer):
        return int(size)
    return size


@dataclass(frozen=True)
class Question:
    """What a program asked about sizes while it was captured.

    Attributes:
        fact: The Boolean expression that was true of the example sizes (the question, or its
            negation).
        where: The user's line that asked, or that called the torch operator which did.
        froze: Whether a size was turned into a Python number (``int(n)``, ``range(n)``,
            ``len(x)``).
    """

    fact: sympy.Basic
    where: SourceLine | None
    froze: bool = False

    def __str__(self) -> str:
        return f"{self.fact}" + (f"  asked at {self.where}" if self.where else "")


class SizeEnvironment(ShapeEnv):
    """A ``ShapeEnv`` whose symbols start at 0 and whose questions are all written down.

    Args:
        hints: The example size of each symbol.
        asked: Sizes by which the questions of Python code are answered where they are others: a
            path that the model takes for one token only is captured with several, so that its sizes
            stay symbols.

    Attributes:
        totals: Sizes of arguments that hold all tokens, each with the number of past ones: a cut to
            the last token begins there.
    """

    def __init__(self, hints: Mapping[str, int], asked: Mapping[str, int] | None = None) -> None:
        super().__init__(specialize_zero_one=False, duck_shape=False)
        self._replacements_version_counter = 1  # at 0 torch asks for no replacement
        self.asked = {
            size_symbol(name): sympy.Integer(size) for name, size in (asked or {}).items()
        }
        self.questions: dict[tuple[sympy.Basic, SourceLine | None], Question] = {}
        self.operator_questions: dict[sympy.Basic, Question] = {}
        self.totals: dict[sympy.Basic, sympy.Basic] = {}
        self.loops: Any = None  # the loops over tokens, while they are heard
        self.asked_by_code = 0  # how often Python code asked
        self.is_asked_by_users = False  # an operator answers what the user's code asks it
        self._answers: dict[tuple[sympy.Basic, bool], Any] = {}
        self.sizes: dict[str, Any] = {
            name: self.new_size(name, hint) for name, hint in hints.items()
        }

    def new_size(self, name: str, hint: int) -> Any:
        """A new symbol, with its example."""
        symbol, source = size_symbol(name), ConstantSource(name)
        sloc = SLoc(None, None)
        self.backed_var_to_val[symbol] = sympy.Integer(hint)
        self.var_to_sources[symbol] = [source]
        self.source_to_var[name] = symbol
        self.var_to_range[symbol] = ValueRanges(0, int_oo)
        self.var_to_range_sloc[symbol] = ValueRangesSLoc(sloc, sloc)
        return self.create_symintnode(symbol, hint=hint, source=source)

    def replace(self, expr: Any) -> Any:  # type: ignore[override]
        """An expression with one name for sizes that are known to be equal."""
        return of_whole_blocks(super().replace(expr))

    def example(self, expr: Any) -> Any:
        """What an expression is for the example sizes."""
        return sympy.sympify(expr).xreplace(self.backed_var_to_val)

    def size_of(self, expr: Any) -> Any:
        """The ``SymInt`` of an expression in this environment's symbols; an int for a number."""
        expr = sympy.sympify(expr)
        if expr.is_Integer:
            return int(expr)
        expr = self.learnt(expr)
        if expr.is_Integer:
            return int(expr)
        hint = int(expr.xreplace(self.backed_var_to_val))
        return self.create_symintnode(expr, hint=hint)

    def learnt(self, expr: Any) -> Any:
        """An expression with one name for sizes that were found to be equal."""
        return expr.xreplace(
            {
                size_symbol(n): s.node.expr
                for n, s in self.sizes.items()
                if isinstance(s, torch.SymInt)
            }
        )

    def evaluate_expr(
        self,
        orig_expr: sympy.Basic,
        hint: Any = None,
        fx_node: Any = None,
        size_oblivious: bool = False,
        fallback_value: bool | None = None,
        *,
        forcing_spec: bool = False,
    ) -> sympy.Basic:
        """Answers a question for the example sizes, and writes it down."""

        def ask_torch() -> sympy.Basic:
            return super(SizeEnvironment, self).evaluate_expr(
                orig_expr, hint, fx_node, size_oblivious, fallback_value, forcing_spec=forcing_spec
            )

        orig_expr, symbols = _with_numbers(orig_expr)
        if symbols is None:
            return orig_expr
        if not symbols <= self.backed_var_to_val.keys():
            return ask_torch()  # sizes that depend on values: torch refuses with its own words
        if self._suppress_guards_tls():  # the layout of a tensor like one before is no question
            return orig_expr.xreplace(self.backed_var_to_val)
        asker = sys._getframe(1)
        inside_operator = _is_operator(asker) and not self.is_asked_by_users
        pretends = bool(self.asked) and not inside_operator and bool(symbols & self.asked.keys())
        answer = self._answers.get((orig_expr, pretends))
        if answer is None:
            values = (
                {**self.backed_var_to_val, **self.asked} if pretends else self.backed_var_to_val
            )
            answer = self._answers[orig_expr, pretends] = orig_expr.xreplace(values)
        asks_truth = answer in (sympy.true, sympy.false)
        if asks_truth:
            fact = orig_expr if answer is sympy.true else sympy.Not(orig_expr)
        else:
            fact = sympy.Eq(orig_expr, answer)
        if not (inside_operator and asks_truth):
            where = user_line(asker)
            self.asked_by_code += 1
            self.questions.setdefault((fact, where), Question(fact, where, froze=not asks_truth))
        elif fact not in self.operator_questions:
            self.operator_questions[fact] = Question(fact, user_line(asker))
        if pretends:
            return answer
        if not asks_truth or (answer is sympy.true and isinstance(orig_expr, sympy.Eq)):
            return ask_torch()  # torch learns the equality, so that equal sizes get one name
        return answer


@functools.lru_cache(maxsize=4096)
def _with_numbers(expr: sympy.Basic) -> tuple[sympy.Basic, frozenset[sympy.Basic] | None]:
    """``n == True`` as Python has it, ``n == 1``, and its symbols; None for a constant."""
    if expr.atoms(sympy.logic.boolalg.BooleanAtom):
        expr = expr.replace(
            lambda part: (
                isinstance(part, sympy.core.relational.Relational)
                and any(side in (sympy.true, sympy.false) for side in part.args)
            ),
            lambda part: part.func(
                *(
                    sympy.Integer(side is sympy.true) if side in (sympy.true, sympy.false) else side
                    for side in part.args
                )
            ),
        )
    is_constant = expr.is_number or expr in (sympy.true, sympy.false)
    return expr, None if is_constant else frozenset(expr.free_symbols)


_PYTHON_ASKS = ("__bool__", "__int__", "__index__", "__float__", "__len__")


def _is_operator(frame: FrameType | None) -> bool:
    """Whether an operator asks (in C++, or while it is dispatched), and no line of the user's."""
    asked_in_python = False
    while frame is not None:
        name = frame.f_code.co_name
        if name == "__torch_dispatch__":
            return True
        if name in _PYTHON_ASKS:
            asked_in_python = True
        if not _is_foreign_file(frame.f_code.co_filename):
            break
        frame = frame.f_back
    return not asked_in_python


def is_of_this_package(file: str) -> bool:
    """Whether a file is cachefree's own, and no example that is shipped with it."""
    return file.startswith(_HERE) and not os.path.basename(file).startswith("demo")


@functools.lru_cache(maxsize=4096)
def _is_foreign_file(file: str) -> bool:
    return file.startswith((TORCH, "<frozen")) or is_of_this_package(file)


def user_line(frame: FrameType | None) -> SourceLine | None:
    """The nearest line outside torch, cachefree and the standard library."""
    while frame is not None:
        code = frame.f_code
        if is_users(code.co_filename) and not _is_written_by_python(code):
            return SourceLine(code.co_filename, frame.f_lineno, code.co_name)
        frame = frame.f_back
    return None


@functools.lru_cache(maxsize=4096)
def is_users(file: str) -> bool:
    """Whether a file is the user's: not torch, not cachefree, not the standard library."""
    return not (
        file.startswith((TORCH, *_WRITTEN_BY_MACHINES))
        or is_of_this_package(file)
        or is_standard(file)
    )


@functools.lru_cache(maxsize=4096)
def is_standard(file: str) -> bool:
    """Whether a file is of Python's standard library, or of what torch computes sizes with."""
    is_in_library = file.startswith(_STANDARD_LIBRARY) and "site-packages" not in file
    return is_in_library or file.startswith(_ALGEBRA)


def _is_written_by_python(code: CodeType) -> bool:
    """Whether code is what ``dataclass`` and ``namedtuple`` write, and not typed at a prompt."""
    return code.co_filename == "<string>" and code.co_name in _WRITTEN_FUNCTIONS


def substitute(expr: Any, values: Mapping[sympy.Symbol, Any]) -> Any:
    """``expr`` with symbols replaced; ints stay ints."""
    if isinstance(expr, sympy.Basic):
        if not expr.free_symbols & values.keys():
            return expression(expr)
        try:
            # xreplace keeps what sympy evaluated under other assumptions; subs evaluates again
            return expression(expr.subs(values))
        except (TypeError, ValueError, ArithmeticError):
            return _undefined(expr, values)
    return expr


def _undefined(expr: Any, values: Mapping[sympy.Symbol, Any]) -> Any:
    """A number that is equal to itself alone: the power of a negative one, where none is due.

    ``(2 * n / 2048 - 1) ** 1.02`` is complex below 1024, about which code asks before.
    """
    known = sorted(values.items(), key=lambda pair: str(pair[0]))
    told = ", ".join(f"{symbol}={value}" for symbol, value in known if symbol in expr.free_symbols)
    return sympy.Symbol(f"undefined({expr}; {told})", real=True)


def symbols_of(exprs: Iterable[Any]) -> set[sympy.Symbol]:
    """The size symbols that occur in any of the expressions."""
    found: set[sympy.Symbol] = set()
    for expr in exprs:
        if isinstance(expr, sympy.Basic):
            found |= {symbol for symbol in expr.free_symbols if isinstance(symbol, sympy.Symbol)}
    return found


@functools.lru_cache(maxsize=16384, typed=True)
def compiled(expr: Any) -> Callable[[Mapping[str, int]], Any]:
    """An expression or a fact of sizes as a Python function of the sizes by name."""
    if not isinstance(expr, sympy.Basic):
        return lambda sizes: expr
    try:
        source = _source(expr)
    except NotImplementedError:
        return lambda sizes: _as_python(
            expr.subs({symbol: sizes[str(symbol)] for symbol in expr.free_symbols})
        )
    return eval(f"lambda s: {source}", dict(_FUNCTIONS))  # type: ignore[no-any-return]


def _as_python(value: Any) -> Any:
    """A number or a truth value of sympy as Python's."""
    if isinstance(value, Boolean):
        return bool(value)
    return int(value) if value.is_Integer else float(value)


def _is_clear(one: float, other: float) -> bool:
    """Whether two numbers are far enough apart for their order to be no matter of rounding."""
    return not math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-9)


_FUNCTIONS: dict[str, Any] = {"max": max, "min": min, "math": math, "is_clear": _is_clear}


def _is_rounded(fact: Any) -> bool:
    """Whether a comparison may have another answer in Python, which adds in the order of the code.

    ``n - 0.1 - 0.2`` is ``n - 0.3`` for sympy. Numbers such as 0.5 are exact, in any order.
    """
    if any(float(number) * 1024 % 1 for number in fact.atoms(sympy.Float)):
        return True
    sums = (sympy.Add, sympy.Mul)
    return any(
        sum(not arg.is_integer for arg in part.args) > 2
        for part in sympy.preorder_traversal(fact)
        if isinstance(part, sums)
    )


_OPERATORS: dict[str, str] = {
    "Add": " + ",
    "Mul": " * ",
    "Equality": " == ",
    "Unequality": " != ",
    "LessThan": " <= ",
    "StrictLessThan": " < ",
    "GreaterThan": " >= ",
    "StrictGreaterThan": " > ",
    "And": " and ",
    "Or": " or ",
    "FloorDiv": " // ",
    "CleanDiv": " // ",
    "Mod": " % ",
    "PythonMod": " % ",
    "Pow": " ** ",
    "FloatTrueDiv": " / ",
    "IntTrueDiv": " / ",
    "FloatPow": " ** ",
    "PowByNatural": " ** ",
}
_CALLS: dict[str, str] = {
    "OpaqueUnaryFn_sqrt": "math.sqrt",
    "OpaqueUnaryFn_log2": "math.log2",
    "TruncToInt": "math.trunc",
    "CeilToInt": "math.ceil",
    "FloorToInt": "math.floor",
}


def _source(expr: Any) -> str:
    """Python's source of an expression over ``s``, the sizes by name.

    Raises:
        NotImplementedError: an operation that is not known here.
    """
    if expr is sympy.true or expr is sympy.false:
        return str(expr is sympy.true)
    if isinstance(expr, sympy.Symbol):
        return f"s[{expr.name!r}]"
    if expr.is_Integer:
        return f"({int(expr)})"
    if expr.is_Float or expr.is_Rational:
        return f"({float(expr)!r})"
    name = type(expr).__name__
    if name == "Not" and isinstance(expr.args[0], (sympy.And, sympy.Or)):
        dual = sympy.Or if isinstance(expr.args[0], sympy.And) else sympy.And
        return _source(dual(*map(sympy.Not, expr.args[0].args)))
    parts = [_source(part) for part in expr.args]
    if name in ("Max", "Min"):
        return f"{name.lower()}({', '.join(parts)})"
    if name == "Not":
        return f"(not {parts[0]})"
    if name in _CALLS:
        return f"{_CALLS[name]}({', '.join(parts)})"
    if name == "ToFloat":
        return f"({parts[0]} * 1.0)"
    if name not in _OPERATORS:
        raise NotImplementedError(name)
    source = "(" + _OPERATORS[name].join(parts) + ")"
    if isinstance(expr, sympy.core.relational.Relational) and _is_rounded(expr):
        # where it is not clear, neither the fact nor its contrary is taken for true
        return f"({source} and is_clear({', '.join(parts)}))"
    return source


_LONGEST = 1 << 24


def preimage(expr: Any, symbol: sympy.Symbol, known: Mapping[str, int], size: int) -> int | None:
    """The smallest number at which an expression that never falls has a value; None if none has.

    The rows of a convolution with a stride do not tell how many there were before. What is given
    the rows alone depends on nothing else, so that any number with as many rows will do.

    Args:
        expr: The expression.
        symbol: The unknown in it.
        known: The other sizes.
        size: The value.
    """
    if expr.has(sympy.Max, sympy.Min, Max, Min, Mod, PythonMod):
        return None  # a window that is full does not tell how much went through it
    function = compiled(expr)

    def value(number: int) -> int:
        return int(function({**known, str(symbol): number}))

    high = 1
    while value(high) < size:
        high *= 2
        if high > _LONGEST:
            return None
    low = 0
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if value(middle) >= size else (middle + 1, high)
    return low if value(low) == size else None
