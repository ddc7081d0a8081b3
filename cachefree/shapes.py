"""Whether the sizes that a capture wrote down are right at other sizes than the examples.

While a path is captured, operators ask about the sizes of their operands, and the answers go into
the sizes of their results. An answer matters only if at sizes where it is another one, some
operator gives a result of another size than was written down. That is tried, operator by operator,
on tensors without storage.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cachefree.explaining import silenced
from cachefree.laws.evaluation import apply
from cachefree.sizes import size_symbol
from cachefree.terms import Term, replace_operands, topological

__all__ = ["Signatures"]

log = logging.getLogger(__name__)


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
        self.terms: Sequence[Term] = tuple(found.values())
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

    def is_known(self, sizes: Mapping[str, int]) -> bool:
        """Whether these sizes were tried."""
        return tuple(sorted(sizes.items())) in self._known

    def _broken(self, sizes: Mapping[str, int]) -> Term | None:
        values = {size_symbol(name): size for name, size in sizes.items()}
        with silenced(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            for term in self.terms:
                if not _holds(term, values):
                    return term
        return None


def _signature(term: Term) -> Any:
    def describe(arg: Any) -> Any:
        if isinstance(arg, Term):
            return ("tensor", arg.shape, arg.dtype)
        return (type(arg).__name__, repr(arg)) if isinstance(arg, (bool, float)) else arg

    return (term.op, replace_operands(term.args, describe), term.shape)


def _holds(term: Term, values: Mapping[sympy.Symbol, int]) -> bool:
    def number(expr: Any) -> Any:
        if not isinstance(expr, sympy.Basic):
            return expr
        found = expr.subs(values)
        return int(found) if found.is_integer else float(found)

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
        return False
    if shape is not None:
        return isinstance(result, torch.Tensor) and tuple(result.shape) == shape
    if not isinstance(result, (tuple, list)) or len(result) != len(term.payload):
        return False
    return all(
        tuple(part.shape) == tuple(number(size) for size in kind[0])
        for part, kind in zip(result, term.payload, strict=True)
    )
