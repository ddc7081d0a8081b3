"""Terms, sizes and steps as plain values, for a certificate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch

from cachefree.checker.replay import TRUSTED
from cachefree.facts import Facts
from cachefree.laws import Law
from cachefree.normal import Step
from cachefree.sizes import substitute
from cachefree.terms import Table, Term, replace_operands, topological

__all__ = ["Equations", "Lines", "law_steps", "pair_step", "written_size"]

_AT_EVERY_SIZE = "same-at-every-size"


def law_steps(applied: Iterable[Step], raw: Equations, lines: Lines) -> list[dict[str, Any]]:
    """Each application of a law once, with the right side as the law itself writes it."""
    steps: dict[tuple[str, Term], dict[str, Any]] = {}
    for step in applied:
        key = (step.law.name, step.before)
        if key in steps:
            continue
        after, conditions = raw.right(step.law, step.before)
        steps[key] = {
            "law": step.law.name,
            "before": lines.place(step.before),
            "after": lines.place(after),
            "where": str(step.before.line or ""),
            "because": conditions,
        }
        if step.law.name in TRUSTED and _needs_elements(step.law.name, step.before):
            steps[key]["is_trusted"] = True
    return list(steps.values())


_ALWAYS = ("mask-nothing", "packed-heads", "slice-of-convolution", "padded-convolution")


def _needs_elements(law: str, before: Term) -> bool:
    """Whether a side condition is about every element of a tensor that is not seen to be full."""
    if law in _ALWAYS:
        return True
    if law == "neutral-truth":
        one, other = before.args
        return not (_is_told(one, other, before) or _is_told(other, one, before))
    masks = {"where": before.args[:1], "fill-nothing": before.args[1:2]}.get(law, before.args)
    return not any(isinstance(mask, Term) and mask.op == "full" for mask in masks)


def _is_told(truths: Any, others: Any, whole: Term) -> bool:
    """Whether a tensor is full of one truth, which tells what it and the others make together."""
    if not isinstance(truths, Term) or truths.op != "full":
        return False
    is_neutral = bool(truths.args[1]) is ("and" in str(whole.op))
    return not is_neutral or others.shape == whole.shape


def pair_step(law: Law | None, one: Term, other: Term, lines: Lines) -> dict[str, Any]:
    """Two values that were compared by their elements, as a step that is to be trusted."""
    return {
        "law": law.name if law is not None else _AT_EVERY_SIZE,
        "before": lines.place(one),
        "after": lines.place(other),
        "where": str(one.line or other.line or ""),
        "because": [],
        "is_trusted": True,
    }


class Equations:
    """Applies a law and nothing after it: the right side as its equation writes it."""

    def __init__(self, table: Table, facts: Facts, values: Mapping[Any, Any]) -> None:
        self.table = table
        self.facts: Any = _Overheard(facts)
        self.values = values

    def right(self, law: Law, before: Term) -> tuple[Term, list[str]]:
        """The right side, and the facts that its side condition needed."""
        self.facts.heard = {}
        after = law.apply(before, self)
        assert after is not None, f"{law.name} does not apply to {before.text()} any more"
        return after, list(self.facts.heard)

    def build(
        self, op: Any, args: tuple[Any, ...], shape: Any, like: Term, dtype: Any = None
    ) -> Term:
        """A term as it is."""

        def size(arg: Any) -> Any:
            is_size = isinstance(arg, sympy.Basic)
            return self.facts.simplified(substitute(arg, self.values)) if is_size else arg

        sizes = tuple(map(size, shape))
        args = replace_operands(args, size)
        return self.table.make(op, args, sizes, dtype or like.dtype, like.device, like.line)


class _Overheard:
    """Facts that remember what was asked of them and holds."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.heard: dict[str, None] = {}

    def equal(self, one: Any, other: Any) -> bool:
        return self._told(self.facts.equal(one, other), f"{one} = {other}", one == other)

    def at_most(self, one: Any, other: Any) -> bool:
        return self._told(self.facts.at_most(one, other), f"{one} ≤ {other}", one == other)

    def _told(self, answer: bool, text: str, is_plain: bool) -> bool:
        if answer and not is_plain:
            self.heard[text] = None
        return answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.facts, name)


class Lines:
    """Terms as lines of plain values, operands before what is made of them."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self._places: dict[Term, int] = {}

    def place(self, term: Term) -> int:
        """The number of a term's line."""
        if term not in self._places:
            for below in topological([term]):
                if below not in self._places:
                    line = self._line(below)
                    self._places[below] = len(self.lines)
                    self.lines.append(line)
        return self._places[term]

    def _line(self, term: Term) -> dict[str, Any]:
        line: dict[str, Any] = {
            "op": term.op if isinstance(term.op, str) else str(term.op),
            "args": self._values(term.args),
            "shape": None if term.shape is None else self._values(term.shape),
            "dtype": self._value(term.dtype),
            "device": self._value(term.device),
        }
        if term.shape is None:
            line["several"] = [self._values(shape) for shape, _, _ in term.payload or ()]
        if term.op == "constant" and term.args[0][0] == "bits" and term.payload.numel() <= 4096:
            raw = term.payload.detach().cpu().contiguous().view(-1).view(torch.uint8)
            line["bytes"] = bytes(raw.numpy().tobytes()).hex()
        return line

    def _values(self, values: Iterable[Any]) -> list[Any]:
        return [self._value(value) for value in values]

    def _value(self, value: Any) -> Any:
        if isinstance(value, Term):
            return {"term": self._places[value]}
        if isinstance(value, (tuple, list)):
            return self._values(value)
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, sympy.Basic):
            return int(value) if value.is_Integer else {"size": written_size(value)}
        if isinstance(value, int):
            return value
        if isinstance(value, float):
            return {"float": repr(value)}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        return {type(value).__name__: str(value)}


_OPERATIONS = {
    "Add": "+", "Mul": "*", "Pow": "**", "Max": "max", "Min": "min", "FloorDiv": "//",
    "CleanDiv": "//", "Mod": "%", "PythonMod": "%", "Equality": "=", "Unequality": "!=",
    "LessThan": "<=", "StrictLessThan": "<", "GreaterThan": ">=", "StrictGreaterThan": ">",
    "And": "and", "Or": "or", "Not": "not",
}  # fmt: skip


def written_size(expr: Any) -> Any:
    """An expression or a fact of sizes as plain values; the checker has the inverse."""
    if isinstance(expr, (int, bool)):
        return expr
    if expr is sympy.true or expr is sympy.false:
        return bool(expr)
    if expr.is_Integer:
        return int(expr)
    if expr.is_Symbol:
        return str(expr)
    if expr.is_Float or expr.is_Rational:
        return float(expr)
    name = type(expr).__name__
    operands: Sequence[Any] = expr.args
    return [_OPERATIONS.get(name, name), *map(written_size, operands)]
