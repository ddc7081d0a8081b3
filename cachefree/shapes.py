"""Whether the sizes that a capture wrote down are right at other sizes than the examples.

While a path is captured, operators ask about the sizes of their operands, and the answers go into
the sizes of their results. An answer matters only if at sizes where it is another one, some
operator gives a result of another size than was written down. That is tried, operator by operator,
on tensors without storage.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cachefree.explaining import silenced
from cachefree.laws.evaluation import apply
from cachefree.sizes import size_symbol, symbols_of
from cachefree.terms import Term, replace_operands, topological

__all__ = ["Signatures"]

log = logging.getLogger(__name__)


_OF_CALLS = ("query", "past", "encoder")


class Signatures:
    """The distinct operators of a program, by the sizes and dtypes of their operands.

    Args:
        outputs: The program.
    """

    def __init__(self, outputs: Iterable[Term]) -> None:
        found: dict[Any, Term] = {}
        for term in topological(outputs):
            if term.op not in ("input", "attribute", "constant", "item"):
                found.setdefault(_signature(term), term)
        self._symbols = {term: _symbols_of(term) for term in found.values()}
        self._held: dict[Any, bool | None] = {}
        self._known: dict[tuple[tuple[str, int], ...], Term | None] = {}

    def hold(self, sizes: Mapping[str, int]) -> bool:
        """Whether every operator runs at these sizes and gives what was written down."""
        return self.broken(sizes) is None

    def broken(self, sizes: Mapping[str, int]) -> Term | None:
        """An operator that does not, or None."""
        key = tuple(sorted(sizes.items()))
        if key not in self._known:
            self._known[key] = self._broken(sizes)
        return self._known[key]

    def wrong(self, sizes: Mapping[str, int]) -> Term | None:
        """An operator that does not, though the model may be called at these sizes, or None.

        Where an operator raises at sizes none of which is one of tokens or of rows, it raises for
        the model too, on the call that computes it: a picture that is smaller than a kernel.
        """
        if self.broken(sizes) is None:
            return None
        return self._broken(sizes, may_raise=True)

    def is_known(self, sizes: Mapping[str, int]) -> bool:
        """Whether these sizes were tried."""
        return tuple(sorted(sizes.items())) in self._known

    def _broken(self, sizes: Mapping[str, int], *, may_raise: bool = False) -> Term | None:
        values = {size_symbol(name): size for name, size in sizes.items()}
        numbers: dict[Any, Any] = {}
        with silenced(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            for term, symbols in self._symbols.items():
                key = (term, tuple(map(sizes.get, symbols)))
                if key not in self._held:
                    self._held[key] = _holds(term, values, numbers)
                holds = self._held[key]
                is_spared = may_raise and holds is None and not _are_of_calls(symbols, sizes)
                if not holds and not is_spared:
                    return term
        return None


def _are_of_calls(symbols: Iterable[str], sizes: Mapping[str, int]) -> bool:
    """Whether one of these sizes is 0, or one of tokens or of rows, as those of each call are."""
    own = set(symbols) - {"batch"}
    return not own or any(name.startswith(_OF_CALLS) or not sizes.get(name) for name in own)


def _signature(term: Term) -> Any:
    def describe(arg: Any) -> Any:
        if isinstance(arg, Term):
            return ("tensor", arg.shape, arg.dtype)
        return (type(arg).__name__, repr(arg)) if isinstance(arg, (bool, float)) else arg

    return (term.op, replace_operands(term.args, describe), term.shape)


def _symbols_of(term: Term) -> list[str]:
    """The sizes that an operator on its own depends on."""
    found: set[sympy.Symbol] = set()

    def collect(part: Any) -> Any:
        if isinstance(part, Term):
            for size in part.payload if part.shape is None else part.shape:
                collect(size)
        elif isinstance(part, (tuple, list)):
            for size in part:
                collect(size)
        else:
            found.update(symbols_of([part]))
        return part

    replace_operands(term.args, collect)
    collect(term)
    return sorted(map(str, found))


def _holds(term: Term, values: Mapping[sympy.Symbol, int], numbers: dict[Any, Any]) -> bool | None:
    """Whether an operator gives the sizes that were written down; None where it does not run.

    Args:
        term: The operator.
        values: The number for each symbol.
        numbers: Those of expressions that are known by now.
    """

    def number(expr: Any) -> Any:
        if not isinstance(expr, sympy.Basic):
            return expr
        if expr not in numbers:
            found = expr.subs(values)
            numbers[expr] = int(found) if found.is_integer else float(found)
        return numbers[expr]

    def tensor(shape: Any, dtype: Any, device: Any) -> torch.Tensor:
        return torch.empty([number(size) for size in shape], dtype=dtype, device=device)

    def operand(arg: Any) -> Any:
        if isinstance(arg, Term):
            if arg.shape is None:
                return tuple(tensor(*kind) for kind in arg.payload)
            return tensor(arg.shape, arg.dtype, arg.device)
        return number(arg)

    try:
        args = replace_operands(term.args, operand)
        shape = None if term.shape is None else tuple(number(size) for size in term.shape)
        result = apply(term, args, shape or ())
    except NotImplementedError:
        return True  # an operator that cannot be tried alone
    except Exception as error:  # noqa: BLE001 - an operator may raise anything
        log.debug("%s does not run at %s: %s", term.name, values, error)
        return None
    if shape is not None:
        return isinstance(result, torch.Tensor) and tuple(result.shape) == shape
    if not isinstance(result, (tuple, list)) or len(result) != len(term.payload):
        return False
    return all(
        tuple(part.shape) == tuple(number(size) for size in kind[0])
        for part, kind in zip(result, term.payload, strict=True)
    )
