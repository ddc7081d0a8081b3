"""Values that depend on sizes alone, computed at every size up to a bound."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import sympy
import torch

from cachefree.facts import Facts
from cachefree.sizes import compiled, symbols_of
from cachefree.terms import SCAN, Term, replace_operands, topological

__all__ = ["BOUND", "apply", "equal_at_every_size", "evaluate", "is_of_sizes_alone", "values_below"]

aten = torch.ops.aten
BOUND: dict[int, int] = {0: 1, 1: 64, 2: 20, 3: 9, 4: 5}
"""Number of size symbols → the largest size that is tried, from 0."""
_MOST_ELEMENTS = 2**22


def is_of_sizes_alone(term: Term) -> bool:
    """Whether a value depends on no input and on no parameter."""
    return term.shape is not None and all(
        below.op not in ("input", "attribute", "constant", "bound", SCAN)
        for below in topological([term])
    )


def equal_at_every_size(one: Term, other: Term, facts: Facts) -> bool:
    """Whether two values of sizes alone have the same bits at every size tried.

    Tried is every size up to `BOUND` that the facts allow.
    """
    terms = topological([one, other])
    own = symbols_of(_sizes_in(terms))
    known = _about(own, facts.known)
    symbols = sorted(own | symbols_of(known), key=str)
    if len(symbols) not in BOUND:
        return False
    compared = 0
    for values in itertools.product(range(BOUND[len(symbols)] + 1), repeat=len(symbols)):
        sizes = dict(zip(symbols, values, strict=True))
        if any(sympy.sympify(fact).subs(sizes) != sympy.true for fact in known):
            continue
        try:
            mine, theirs = evaluate(one, sizes), evaluate(other, sizes)
        except Exception:  # noqa: BLE001 - an operator that is not known here decides nothing
            return False
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype or not _same_bits(mine, theirs):
            return False
        compared += 1
    return compared > 0


def _about(symbols: set[sympy.Symbol], facts: Iterable[Any]) -> list[Any]:
    """The facts that say something of some sizes, if only by way of others.

    What says nothing of them is left out: there is no less to be tried then.
    """
    own, left = set(symbols), list(facts)
    found: list[Any] = []
    while True:
        linked = [fact for fact in left if symbols_of([fact]) & own]
        if not linked:
            return found
        found += linked
        left = [fact for fact in left if fact not in linked]
        own |= symbols_of(linked)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype.is_floating_point:
        numbers = ~one.isnan()
        return bool(
            torch.equal(numbers, ~other.isnan())
            and torch.equal(one[numbers], other[numbers])
            and torch.equal(one[numbers].signbit(), other[numbers].signbit())
        )
    return bool(torch.equal(one, other))


def _sizes_in(terms: Iterable[Term]) -> list[Any]:
    found: list[Any] = []

    def collect(args: Any) -> None:
        if isinstance(args, tuple):
            for arg in args:
                collect(arg)
        elif isinstance(args, sympy.Basic):
            found.append(args)

    for term in terms:
        collect(term.args)
        collect(term.shape or ())
    return found


def evaluate(term: Term, sizes: Mapping[sympy.Symbol, int]) -> Any:
    """A term's value at given sizes, on the CPU."""
    return values_below(term, sizes)[term]


def values_below(term: Term, sizes: Mapping[sympy.Symbol, int]) -> dict[Term, Any]:
    """A term's value at given sizes, on the CPU, and those of all terms below it."""
    names = {str(symbol): size for symbol, size in sizes.items()}
    values: dict[Term, Any] = {}

    def given(arg: Any) -> Any:
        if isinstance(arg, Term):
            return values[arg]
        if isinstance(arg, sympy.Basic):
            if arg.is_integer:
                return compiled(arg)(names)
            number = arg.subs(sizes)
            return int(number) if number.is_integer else float(number)
        if isinstance(arg, torch.device):
            return torch.device("cpu")
        return arg

    for below in topological([term]):
        if below.shape is not None:
            total = 1
            for size in below.shape:
                total *= int(given(size))
            if total > _MOST_ELEMENTS:
                raise MemoryError("too large to be tried")
        values[below] = apply(
            below, replace_operands(below.args, given), tuple(map(given, below.shape or ()))
        )
    return values


def apply(term: Term, args: tuple[Any, ...], shape: tuple[int, ...]) -> Any:
    """A term's operator on given operands and numbers.

    Args:
        term: The term; its own operands are not looked at.
        args: Its arguments as tensors and numbers.
        shape: Its shape, as numbers.
    """
    op = term.op
    if op in ("bound", SCAN):
        raise NotImplementedError("a loop over tokens is not computed alone")
    if op == "full":
        return torch.full(shape, args[1], dtype=term.dtype, device=args[3])
    if op == "arange":
        return torch.arange(
            args[0], args[0] + args[1] * args[2], args[2], dtype=term.dtype, device=args[4]
        )
    if op == "reshape":
        return args[0].reshape(shape)
    if op == "permute":
        return args[0].permute(args[1])
    if op == "expand":
        return args[0].expand(shape)
    if op == "slice":
        return args[0].narrow(args[1], args[2], max(0, args[3] - args[2]))
    if op == "cat":
        return torch.cat(list(args[0]), args[1])
    if op == "cast":
        return args[0].to(term.dtype)
    if op == "item":
        return args[0][args[1]]
    schema = op._schema.arguments
    positional = [
        value for argument, value in zip(schema, args, strict=False) if not argument.kwarg_only
    ]
    keywords = {
        argument.name: value
        for argument, value in zip(schema, args, strict=False)
        if argument.kwarg_only
    }
    return op(*positional, **keywords)
