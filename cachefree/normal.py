"""Normal form: a program under a substitution of sizes and inputs, with all laws applied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from cachefree.facts import Facts
from cachefree.laws import EXACT_LAWS, LAWS, NO_ELEMENTS, Law, slice_extent
from cachefree.sizes import substitute
from cachefree.terms import Table, Term, operands, replace_operands, topological

__all__ = ["Normaliser", "Step"]

_MOST_STEPS = 200


@dataclass(frozen=True)
class Step:
    """One application of a law: ``before = after``."""

    law: Law
    before: Term
    after: Term


class Normaliser:
    """Brings terms into normal form.

    Args:
        table: Where the new terms are made.
        facts: What holds of the sizes.
        sizes: Sizes to substitute.
        inputs: Inputs (by path) and the terms that stand in their place.
        is_exact: Whether to use exact laws only.
        more: Laws to be tried too, after the others.

    Attributes:
        steps: The laws that were applied.
        misnoted: Slices whose length at these sizes is not the one that was written down when the
            program was captured at others, or cannot be told: nothing about them is shown.
    """

    def __init__(
        self,
        table: Table,
        facts: Facts,
        sizes: Mapping[sympy.Symbol, Any] | None = None,
        inputs: Mapping[str, Term] | None = None,
        *,
        is_exact: bool = True,
        more: Iterable[Law] = (),
    ) -> None:
        self.is_exact = is_exact
        self.table = table
        self.facts = facts
        self.substitution = dict(sizes or {})
        self.inputs = dict(inputs or {})
        self.steps: list[Step] = []
        self.misnoted: list[Term] = []
        self._normal: dict[Term, Term] = {}
        self._settled: dict[Term, Term] = {}
        self._sizes: dict[Any, Any] = {}
        self._laws: dict[Any, list[Law]] = {}
        further = [law for law in more if law.kind == "exact" or not is_exact]
        for law in (*(EXACT_LAWS if is_exact else LAWS), *further):
            for op in law.ops:
                self._laws.setdefault(op, []).append(law)

    def normal(self, outputs: Iterable[Term]) -> tuple[Term, ...]:
        """The outputs in normal form."""
        outputs = tuple(outputs)
        for term in topological([*self.inputs.values(), *outputs]):
            if term not in self._normal:
                self._normal[term] = self._one(term)
        return tuple(self._normal[term] for term in outputs)

    def of(self, term: Term) -> Term:
        """The normal form of a term that `normal` has seen."""
        return self._normal[term]

    def _size(self, value: Any) -> Any:
        if not isinstance(value, sympy.Basic):
            return value
        if value not in self._sizes:
            self._sizes[value] = self.facts.simplified(substitute(value, self.substitution))
        return self._sizes[value]

    def _one(self, term: Term) -> Term:
        def replaced(arg: Any) -> Any:
            return self._normal[arg] if isinstance(arg, Term) else self._size(arg)

        if term.op == "input" and term.args[0] in self.inputs:
            return self._normal[self.inputs[term.args[0]]]
        if term.op in ("attribute", "input"):
            args = replace_operands(term.args, replaced)
            return self.settle(
                self.table.make(
                    term.op,
                    args,
                    self._shape(term),
                    term.dtype,
                    term.device,
                    term.line,
                    term.payload,
                )
            )
        args = replace_operands(term.args, replaced)
        payload = term.payload
        if term.shape is None and payload is not None:
            payload = tuple(
                (tuple(map(self._size, shape)), dtype, device) for shape, dtype, device in payload
            )
        new = self.table.make(
            term.op, args, self._shape(term), term.dtype, term.device, term.line, payload
        )
        if not self._has_its_size(new):
            self.misnoted.append(new)
        return self.settle(new)

    def _has_its_size(self, term: Term) -> bool:
        """Whether a result has the size here that was written down elsewhere.

        Two sizes that are equal at the examples, and are asked for, are written as one.
        """
        if term.op is torch.ops.aten.slice.Tensor:
            return self._is_as_noted(term)
        if term.op is torch.ops.aten.cat.default:
            return self._is_the_sum(term)
        if (
            not isinstance(term.op, torch._ops.OpOverload)
            or torch.Tag.pointwise not in term.op.tags
        ):
            return True
        if term.shape is None:
            return True
        return all(
            size == 1 or self.facts.equal(size, due)
            for operand in operands(term)
            if operand.shape is not None
            for size, due in zip(reversed(operand.shape), reversed(term.shape), strict=False)
        )

    def _is_the_sum(self, term: Term) -> bool:
        """Whether a join is as long here as its parts; elsewhere two sizes may have been one."""
        parts, dim = term.args
        rank = len(term.sizes)
        dim %= rank
        lengths = [sympy.sympify(part.sizes[dim]) for part in parts if len(part.sizes) == rank]
        return self.facts.equal(sum(lengths, sympy.Integer(0)), term.sizes[dim])

    def _is_as_noted(self, term: Term) -> bool:
        """Whether a slice has the length here that it was captured with elsewhere."""
        source, dim, _, _, step = term.args
        if step not in (None, 1):
            return True
        extent = slice_extent(term, self.facts)
        return extent is not None and self.facts.equal(
            extent[1], term.sizes[dim % len(source.sizes)]
        )

    def _shape(self, term: Term) -> tuple[Any, ...] | None:
        return None if term.shape is None else tuple(map(self._size, term.shape))

    def build(
        self, op: Any, args: tuple[Any, ...], shape: Any, like: Term, dtype: Any = None
    ) -> Term:
        """A term in normal form; see `cachefree.laws.Rewriter`."""
        args = replace_operands(args, lambda arg: arg if isinstance(arg, Term) else self._size(arg))
        sizes = tuple(self._size(size) for size in shape)
        return self.settle(
            self.table.make(op, args, sizes, dtype or like.dtype, like.device, like.line)
        )

    def settle(self, term: Term) -> Term:
        """Applies laws to a term whose operands are in normal form, until none applies."""
        found = self._settled.get(term)
        if found is not None:
            return found
        start = term
        for _ in range(_MOST_STEPS):
            step = self._step(term)
            if step is None:
                break
            self.steps.append(step)
            term = step.after
            if term in self._settled:
                term = self._settled[term]
                break
        self._settled[start] = term
        self._settled.setdefault(term, term)
        return term

    def _step(self, term: Term) -> Step | None:
        after = NO_ELEMENTS.apply(term, self)
        if after is not None and after is not term:
            return Step(NO_ELEMENTS, term, after)
        for law in self._laws.get(term.op, ()):
            after = law.apply(term, self)
            if after is not None and after is not term:
                return Step(law, term, after)
        return None
