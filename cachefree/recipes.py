"""A value of parameters and sizes alone, to be computed outside the graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import sympy
import torch

from cachefree.laws.evaluation import apply
from cachefree.terms import Operator, Term, replace_operands, topological

__all__ = ["Recipe"]


@dataclass(frozen=True)
class _Operand:
    """The result of an earlier step."""

    step: int


@dataclass(frozen=True)
class _Step:
    """An operator applied to earlier results; a parameter by its name, a constant as it is.

    It has what `cachefree.laws.evaluation.apply` reads of a term.
    """

    name: str
    args: tuple[Any, ...]
    shape: tuple[Any, ...]
    dtype: torch.dtype | None
    value: torch.Tensor | None = None

    @property
    def op(self) -> Operator:
        """The operator, which is kept by its name so that copies can be made."""
        if not self.name.startswith("aten."):
            return self.name
        _, packet, overload = self.name.split(".")
        return getattr(getattr(torch.ops.aten, packet), overload)


@dataclass(frozen=True)
class Recipe:
    """How a value is computed, without the terms that it was found as.

    Attributes:
        steps: In order; the last one is the value.
    """

    steps: tuple[_Step, ...]

    @classmethod
    def of(cls, term: Term) -> Recipe:
        """The recipe of a term that depends on no input."""
        places: dict[Term, _Operand] = {}
        steps = []
        for below in topological([term]):
            args = replace_operands(
                below.args, lambda arg: places[arg] if isinstance(arg, Term) else arg
            )
            value = below.payload if below.op == "constant" else None
            steps.append(_Step(str(below.op), args, below.shape or (), below.dtype, value))
            places[below] = _Operand(len(steps) - 1)
        return cls(tuple(steps))

    @property
    def attributes(self) -> tuple[str, ...]:
        """The names of the parameters and buffers that it reads."""
        return tuple(str(step.args[0]) for step in self.steps if step.op == "attribute")

    def value(
        self,
        size: Callable[[Any], Any],
        attribute: Callable[[str], torch.Tensor],
        device: torch.device,
    ) -> torch.Tensor:
        """The value.

        Args:
            size: An expression of sizes → a number.
            attribute: The name of a parameter or buffer → itself.
            device: Where constants are made.
        """
        results: list[Any] = []

        def given(arg: Any) -> Any:
            if isinstance(arg, _Operand):
                return results[arg.step]
            if isinstance(arg, torch.device):
                return device
            return size(arg) if isinstance(arg, sympy.Basic) else arg

        for step in self.steps:
            if step.op == "attribute":
                results.append(attribute(step.args[0]).to(device))
            elif step.value is not None:
                results.append(step.value.to(device))
            else:
                args = replace_operands(step.args, given)
                results.append(apply(cast(Term, step), args, tuple(map(given, step.shape))))
        last: torch.Tensor = results[-1]
        return last.contiguous()
