"""Terms of a certificate in one region: one object for each value, and which values are equal."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch

from cachefree.checker.sizes import Sizes, parsed

__all__ = ["Term", "Terms"]

COMMUTATIVE = frozenset(
    f"aten.{name}"
    for name in (
        "mul.Tensor",
        "logical_and.default",
        "logical_or.default",
        "bitwise_and.Tensor",
        "bitwise_or.Tensor",
        "eq.Tensor",
        "ne.Tensor",
    )
)


class Term:
    """An operator and its arguments; sizes are ints or sympy, floats and truths are tagged."""

    __slots__ = ("args", "device", "dtype", "number", "op", "parts", "shape")

    def __init__(self, op: str, args: Any, shape: Any, dtype: Any, device: Any, number: int):
        self.op, self.args, self.shape = op, args, shape
        self.dtype, self.device, self.number = dtype, device, number
        self.parts: Any = None  # the shapes of several results; the bytes of a constant


class Float(float):
    """A floating-point argument: equal to another if their bits are (one NaN is any other)."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Float) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


class Truth(int):
    """A Boolean argument, which is no number."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Truth) and bool(self) == bool(other)

    def __hash__(self) -> int:
        return hash(("truth", int(self)))


class Terms:
    """Makes terms, and joins those that a step shows to be equal (congruence closure)."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self._made: dict[Any, Term] = {}
        self._leader: dict[Term, Term] = {}
        self._members: dict[Term, list[Term]] = {}
        self._users: defaultdict[Term, list[Term]] = defaultdict(list)
        self._signatures: dict[Any, Term] = {}

    def make(self, op: str, args: Iterable[Any], shape: Any, dtype: Any, device: Any) -> Term:
        """The term of an operator and its arguments."""
        args = self.plain(tuple(args))
        shape = None if shape is None else tuple(map(self.sizes.form, shape))
        key = (op, args, shape, dtype, device)
        term = self._made.get(key)
        if term is None:
            term = self._made[key] = Term(op, args, shape, dtype, device, len(self._made))
            self._leader[term], self._members[term] = term, [term]
            for operand in operands(args):
                self._users[self._leader[operand]].append(term)
            same = self._signatures.setdefault(self._signature(term), term)
            if same is not term:
                self.join(term, same)
        return term

    def plain(self, arg: Any) -> Any:
        """An argument in the one form that it has in terms."""
        if isinstance(arg, (tuple, list)):
            return tuple(map(self.plain, arg))
        if isinstance(arg, bool):
            return Truth(arg)
        if isinstance(arg, float):
            return Float(arg)
        is_size = isinstance(arg, (int, sympy.Basic)) and not isinstance(arg, Truth)
        return self.sizes.form(arg) if is_size else arg

    def _signature(self, term: Term) -> Any:
        def led(arg: Any) -> Any:
            if isinstance(arg, tuple):
                return tuple(map(led, arg))
            return self._leader[arg] if isinstance(arg, Term) else arg

        args = led(term.args)
        is_sum = term.op == "aten.add.Tensor" and args[2] == 1
        if (is_sum or term.op in COMMUTATIVE) and all(isinstance(a, Term) for a in args[:2]):
            args = (*sorted(args[:2], key=lambda operand: operand.number), *args[2:])
        return term.op, args, term.shape, term.dtype, term.device

    def join(self, one: Term, other: Term) -> None:
        """Notes that two terms are equal, and so all that is made of them in one way."""
        pending = [(one, other)]
        while pending:
            kept, gone = (self._leader[term] for term in pending.pop())
            if kept is gone:
                continue
            if len(self._members[kept]) < len(self._members[gone]):
                kept, gone = gone, kept
            for member in self._members.pop(gone):
                self._leader[member] = kept
                self._members[kept].append(member)
            for user in self._users.pop(gone, ()):
                self._users[kept].append(user)
                same = self._signatures.setdefault(self._signature(user), user)
                if same is not user:
                    pending.append((user, same))

    def are_equal(self, one: Term, other: Term) -> bool:
        """Whether two terms were shown to be equal."""
        return self._leader[one] is self._leader[other]

    # The operators that laws write their right sides with.

    def reshape(self, x: Term, shape: Sequence[Any]) -> Term:
        """``x`` with the elements in the same order."""
        return self.make("reshape", (x, tuple(shape)), shape, x.dtype, x.device)

    def permute(self, x: Term, order: Sequence[int]) -> Term:
        """``x`` with its dimensions in another order."""
        shape = [x.shape[dim] for dim in order]
        return self.make("permute", (x, tuple(order)), shape, x.dtype, x.device)

    def expand(self, x: Term, shape: Sequence[Any]) -> Term:
        """``x`` broadcast."""
        return self.make("expand", (x, tuple(shape)), shape, x.dtype, x.device)

    def slice(self, x: Term, dim: int, start: Any, end: Any) -> Term:
        """``x[start:end]`` along a dimension, where 0 ≤ start ≤ end ≤ size."""
        shape = (*x.shape[:dim], sympy.sympify(end) - start, *x.shape[dim + 1 :])
        return self.make("slice", (x, dim, start, end, 1), shape, x.dtype, x.device)

    def cat(self, parts: Sequence[Term], dim: int, shape: Sequence[Any], like: Term) -> Term:
        """The parts one after the other."""
        return self.make("cat", (tuple(parts), dim), shape, like.dtype, like.device)

    def cast(self, x: Term, dtype: Any, device: Any) -> Term:
        """``x`` in another dtype."""
        return self.make("cast", (x, dtype, device), x.shape, dtype, device)

    def full(self, shape: Sequence[Any], number: Any, dtype: Any, device: Any) -> Term:
        """One number everywhere."""
        return self.make("full", (tuple(shape), number, dtype, device), shape, dtype, device)

    def read(self, written: Sequence[Any], stand_ins: Mapping[str, Term]) -> list[Term]:
        """The terms of a certificate, inputs replaced, sizes as they are in the region."""
        terms: list[Term] = []

        def argument(value: Any) -> Any:
            return _argument(value, terms)

        for line in written:
            if line["op"] == "input" and line["args"][0] in stand_ins:
                terms.append(stand_ins[line["args"][0]])
                continue
            shape = None if line["shape"] is None else argument(line["shape"])
            kind, device = argument(line["dtype"]), argument(line["device"])
            term = self.make(line["op"], argument(line["args"]), shape, kind, device)
            parts: Any = None
            if "several" in line:
                parts = [tuple(map(self.sizes.form, s)) for s in argument(line["several"])]
            elif "bytes" in line:
                parts = _bytes_of(term, bytes.fromhex(line["bytes"]))
            if term.parts not in (None, parts):
                raise ValueError(f"{term.op} is written with other results than before")
            term.parts = parts
            terms.append(term)
        return terms


def _bytes_of(term: Term, raw: bytes) -> bytes:
    """The values of a constant, if they are those that it is named by."""
    due = ("bits", hashlib.sha256(raw).hexdigest())
    if term.op != "constant" or tuple(term.args[0]) != due or term.args[1] != term.shape:
        raise ValueError(f"{term.op} is written with values that are not its own")
    return raw


def _argument(value: Any, terms: Sequence[Term]) -> Any:
    """An argument from its JSON form, with the terms that were read before it."""
    if isinstance(value, list):
        return tuple(_argument(part, terms) for part in value)
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "term":
        if not 0 <= content < len(terms):
            raise ValueError("a term is made of one that comes after it")
        return terms[content]
    if kind == "size":
        return parsed(content)
    if kind == "dtype":
        return getattr(torch, content)
    return float(content) if kind == "float" else f"{kind}:{content}"


def operands(args: Any) -> list[Term]:
    """The terms among arguments."""
    if isinstance(args, Term):
        return [args]
    return [t for arg in args for t in operands(arg)] if isinstance(args, tuple) else []
