"""Programs as values: hash-consed terms, one object for each distinct value.

A term is an operator applied to terms, sizes and constants. Two terms of one table are the same
object exactly when they are the same expression, so that comparing two programs costs nothing once
both are in normal form.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import sympy
import torch

from cachefree.errors import SourceLine

__all__ = [
    "SCAN",
    "Operator",
    "Table",
    "Term",
    "operands",
    "replace_operands",
    "scan_parts",
    "topological",
]

Operator = Any  # an OpOverload of ATen, or the name of a leaf or a canonical operator


SCAN = "scan"
"""A loop over tokens: ``(n, carried, first, rows, sources, next, given)``.

``next`` and ``given`` are the body's values, over the ``"bound"`` terms ``carried`` and ``rows``.
Its results are what is carried after the last token, and then ``given`` of all tokens, axis 0.
"""


class Term:
    """A value: an operator and its arguments.

    Attributes:
        op: ``torch.ops.aten`` overload, or a name: ``"input"``, ``"attribute"``, ``"constant"``,
            ``"item"`` (one result of an operator with several) and the canonical operators of
            `cachefree.laws`.
        args: Terms, sizes (int or sympy), constants, nested tuples of these.
        shape: The sizes; None for an operator with several results.
        dtype: The dtype; None likewise.
        device: The device; None likewise.
        line: The user's line that it came from, the first of them.
        payload: The tensor of an ``"attribute"`` or ``"constant"``; the results' types of an
            operator with several.
    """

    __slots__ = ("args", "device", "dtype", "line", "number", "op", "payload", "shape")

    def __init__(
        self,
        op: Operator,
        args: tuple[Any, ...],
        shape: tuple[Any, ...] | None,
        dtype: torch.dtype | None,
        device: torch.device | None,
        line: SourceLine | None,
        payload: Any,
        number: int,
    ) -> None:
        self.op = op
        self.args = args
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.line = line
        self.payload = payload
        self.number = number

    @property
    def name(self) -> str:
        """The operator's name, without its namespace."""
        return self.op if isinstance(self.op, str) else str(self.op).removeprefix("aten.")

    @property
    def sizes(self) -> tuple[Any, ...]:
        """The shape of a single tensor."""
        assert self.shape is not None, f"{self.name} has several results"
        return self.shape

    def __repr__(self) -> str:
        return f"%{self.number}"

    def text(self, depth: int = 2) -> str:
        """The expression in words, to a depth."""
        if self.op in ("input", "attribute"):
            return str(self.args[0])
        if depth == 0:
            return "…"

        def show(arg: Any) -> str:
            if isinstance(arg, Term):
                return arg.text(depth - 1)
            if isinstance(arg, tuple):
                return "[" + ", ".join(map(show, arg)) + "]"
            return str(arg)

        return f"{self.name}({', '.join(show(arg) for arg in self.args)})"


def _key(arg: Any) -> Any:
    if isinstance(arg, tuple):
        return tuple(map(_key, arg))
    if isinstance(arg, bool):
        return ("bool", arg)
    if isinstance(arg, float):
        return ("float", repr(arg))
    if isinstance(arg, sympy.Integer):
        return int(arg)
    return arg


class Table:
    """Makes terms; equal ones are the same object."""

    def __init__(self) -> None:
        self._terms: dict[Any, Term] = {}

    def __len__(self) -> int:
        return len(self._terms)

    def make(
        self,
        op: Operator,
        args: Iterable[Any],
        shape: Iterable[Any] | None,
        dtype: torch.dtype | None,
        device: torch.device | None,
        line: SourceLine | None = None,
        payload: Any = None,
    ) -> Term:
        """The term of an operator and its arguments."""
        args = tuple(args)
        sizes = None if shape is None else tuple(shape)
        key: Any = (op, _key(args))
        term = self._terms.get(key)
        if term is not None and term.shape != sizes:
            key = (*key, sizes)  # one of the two was written down at sizes that are not these
            term = self._terms.get(key)
        if term is None:
            term = Term(op, args, sizes, dtype, device, line, payload, len(self._terms))
            self._terms[key] = term
        return term

    def like(
        self, term: Term, op: Operator, args: Iterable[Any], shape: Iterable[Any] | None = None
    ) -> Term:
        """A term with the dtype, device, line and (unless given) the shape of another."""
        return self.make(
            op,
            args,
            term.shape if shape is None else shape,
            term.dtype,
            term.device,
            term.line,
            term.payload,
        )

    def input(
        self, path: str, shape: Iterable[Any], dtype: torch.dtype, device: torch.device
    ) -> Term:
        """An input tensor."""
        shape = tuple(shape)
        return self.make("input", (path, shape, dtype), shape, dtype, device)

    def attribute(self, name: str, tensor: torch.Tensor, device: torch.device) -> Term:
        """A parameter or buffer of the model, and the device that it counts as being on."""
        shape = tuple(tensor.shape)
        return self.make("attribute", (name,), shape, tensor.dtype, device, payload=tensor)

    def constant(self, tensor: torch.Tensor) -> Term:
        """A tensor that the code made from numbers, compared by its bits."""
        if tensor.is_meta or type(tensor) is not torch.Tensor or tensor.numel() == 0:
            identity: Any = ("empty",) if tensor.numel() == 0 else ("object", id(tensor))
        else:
            raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            identity = ("bits", hashlib.sha256(raw).hexdigest())
        shape = tuple(tensor.shape)
        args = (identity, shape, tensor.dtype, str(tensor.device))
        return self.make("constant", args, shape, tensor.dtype, tensor.device, payload=tensor)


def operands(term: Term) -> Iterator[Term]:
    """The terms among a term's arguments, in order."""
    yield from _terms_in(term.args)


def _terms_in(args: tuple[Any, ...]) -> Iterator[Term]:
    for arg in args:
        if isinstance(arg, Term):
            yield arg
        elif isinstance(arg, tuple):
            yield from _terms_in(arg)


def scan_parts(scan: Term) -> tuple[list[Term], list[Term]]:
    """What the body of a scan returns, and what it takes from outside.

    What it takes are the largest values below it in which nothing of the scan is bound.
    """
    _, carried, _, rows, _, following, given = scan.args
    results = [*following, *given]
    is_open: dict[Term, bool] = {}
    order = topological(results)
    bound = {*carried, *rows}
    for term in order:
        is_open[term] = term in bound or any(is_open[below] for below in operands(term))
    outside = {
        below: None
        for term in order
        if is_open[term]
        for below in operands(term)
        if not is_open[below]
    }
    outside.update({term: None for term in results if not is_open[term]})
    return results, list(outside)


def outer_operands(term: Term) -> Iterator[Term]:
    """The terms that a value is computed from; of a scan, those outside of its body."""
    if term.op != SCAN:
        yield from operands(term)
        return
    _, _, first, _, sources, _, _ = term.args
    yield from (*first, *sources, *scan_parts(term)[1])


def is_part(term: Term) -> bool:
    """Whether a value may share the memory of its operand."""
    if isinstance(term.op, str):
        return term.op not in ("full", "arange", "cat")
    returns = term.op._schema.returns
    return any(value.alias_info is not None for value in returns)


def replace_operands(args: Any, replace: Callable[[Any], Any]) -> Any:
    """``args`` with ``replace`` applied to everything that is no tuple."""
    if isinstance(args, tuple):
        return tuple(replace_operands(arg, replace) for arg in args)
    return replace(args)


def topological(
    outputs: Iterable[Term], below: Callable[[Term], Iterable[Term]] = operands
) -> list[Term]:
    """All terms below the outputs, operands first; without recursion, for deep graphs."""
    order: list[Term] = []
    seen: set[Term] = set()
    stack: list[tuple[Term, bool]] = [(term, False) for term in reversed(list(outputs))]
    while stack:
        term, is_expanded = stack.pop()
        if is_expanded:
            order.append(term)
        elif term not in seen:
            seen.add(term)
            stack.append((term, True))
            stack.extend(
                (operand, False) for operand in reversed(list(below(term))) if operand not in seen
            )
    return order
