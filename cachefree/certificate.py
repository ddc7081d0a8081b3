"""The proof written down: every step with its law, its place and its side condition.

What the prover did is remembered as it was; it is written only when somebody asks for it. What
reads it again is in `cachefree.checker`, which shares no code with the prover.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy
import torch

from cachefree.certify import Certified
from cachefree.checker.replay import FORMAT, TRUSTED
from cachefree.errors import CacheFreeError, Refusal
from cachefree.facts import Facts
from cachefree.laws import Law
from cachefree.normal import Step
from cachefree.regimes import Kind, Regime
from cachefree.report import Report, Verdict
from cachefree.rules import Closing
from cachefree.sizes import substitute
from cachefree.spec import Domain, Interface
from cachefree.terms import Table, Term, replace_operands, topological

__all__ = ["Certificate", "Evidence"]

_AT_EVERY_SIZE = "same-at-every-size"
_BY_ELEMENTS = ("elementwise", "elementwise-real")


class Certificate:
    """A proof as plain values, for `cachefree.check_certificate`.

    Attributes:
        content: What stands in the file.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = dict(content)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes it as JSON, whole or not at all."""
        target = Path(path)
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            beside.write_text(json.dumps(self.content, indent=None, separators=(",", ":")))
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)
        return target

    def for_onnx(self, path: Path) -> Certificate:
        """The certificate with the digests of an ONNX file and of its weights."""
        from cachefree.checker.binding import digests

        return Certificate({**self.content, "onnx": digests(path)})

    def __str__(self) -> str:
        steps = sum(len(region["steps"]) for region in self.content["regions"])
        return f"{self.content['model']}: {self.content['verdict']}, {steps} steps"


@dataclass(frozen=True)
class Region:
    """What was shown in one region; without the capture, which is large.

    Attributes:
        kind: First call or later calls.
        facts: What holds of the sizes.
        values: Symbols that are other sizes there.
        path: The outputs of the path that the model takes.
        steps: Every application of a law.
        pairs: Values that were compared element by element, with the law; None for those that were
            compared at every size up to a bound.
        stand_ins: Operators that others stand for.
    """

    kind: Kind
    facts: tuple[Any, ...]
    values: Mapping[Any, Any]
    path: tuple[Term, ...]
    steps: tuple[Step, ...]
    pairs: tuple[tuple[Law | None, Term, Term], ...]
    stand_ins: tuple[str, ...]

    @classmethod
    def of(cls, kind: Kind, regime: Regime) -> Region:
        """What a regime showed."""
        return cls(
            kind,
            (*kind.basics, *(condition.fact for condition in regime.region.conditions)),
            kind.values(regime.pinned),
            regime.program.outputs,
            regime.comparison.steps,
            regime.comparison.pairs,
            regime.program.captured.stand_ins,
        )


@dataclass(frozen=True)
class Evidence:
    """What the prover left behind, from which a certificate is written.

    Attributes:
        table: Of all terms.
        inputs: The one graph's inputs, with their names.
        outputs: Its outputs.
        verdict: What was shown.
        domain: Where it holds.
        laws: The laws that were used.
        closings: The rules that changed the later path.
        regions: What was shown in each region.
    """

    table: Table
    inputs: tuple[tuple[str, Term], ...]
    outputs: tuple[Term, ...]
    verdict: Verdict
    domain: Domain
    laws: tuple[Law, ...]
    closings: tuple[Closing, ...]
    regions: tuple[Region, ...]

    @classmethod
    def of(
        cls, table: Table, certified: Certified, interface: Interface, inputs: Sequence[Term]
    ) -> Evidence:
        """What was left of a proof."""
        names = [spec.name for spec in interface.inputs]
        return cls(
            table,
            tuple(zip(names, inputs, strict=True)),
            certified.outputs,
            certified.verdict,
            certified.domain,
            certified.laws,
            certified.closings,
            tuple(Region.of(kind, one) for kind, served in certified.shown for one in served),
        )

    def written(self, report: Report) -> Certificate:
        """The certificate of a proof.

        Raises:
            CacheFreeError: nothing was proved.
        """
        if not self.verdict.is_proof and self.verdict is not Verdict.CHECKED:
            raise CacheFreeError(
                Refusal(
                    f"There is no certificate of a graph that is {self.verdict}.",
                    why="Nothing was proved.",
                    remedy='Rewrite with check="prove".',
                )
            )
        graph = _Terms()
        content = {
            "format": FORMAT,
            "model": report.model,
            "verdict": self.verdict.name,
            "graph": {
                "outputs": [graph.place(term) for term in self.outputs],
                "inputs": [[name, graph.place(term)] for name, term in self.inputs],
                "terms": graph.lines,
            },
            "regions": [self._region(region) for region in self.regions],
            "edits": self._edits(),
            "domain": [
                {"call": region.name, "facts": [_size(c.fact) for c in region.conditions]}
                for region in self.domain.regions
            ],
            "fixed": list(self.domain.fixed),
            "laws": {law.name: {"statement": law.statement, "kind": law.kind} for law in self.laws},
            "stand_ins": sorted({name for region in self.regions for name in region.stand_ins}),
            "assumed": list(report.assumed),
        }
        return Certificate(json.loads(json.dumps(content)))

    def _region(self, region: Region) -> dict[str, Any]:
        raw = _Raw(self.table, Facts(region.facts), region.values)
        lines = _Terms()
        steps = [
            *_law_steps(region.steps, raw, lines),
            *(_pair(law, one, other, lines) for law, one, other in region.pairs),
        ]
        return {
            "call": region.kind.name,
            "facts": [_size(fact) for fact in region.facts],
            "values": {str(symbol): _size(size) for symbol, size in region.values.items()},
            "neutral": {path: lines.place(term) for path, term in region.kind.inputs.items()},
            "path": [lines.place(term) for term in region.path],
            "steps": steps,
            "terms": lines.lines,
        }

    def _edits(self) -> list[dict[str, Any]]:
        """The changes that rules made to the later path.

        Their obligation is that of the regions of later calls: there, at every past of 1 and more,
        the edited graph is shown to be the model's own path.
        """
        return [
            {
                "rule": closing.rule.name,
                "neutral": closing.rule.neutral,
                "closes": [
                    {
                        "later": divergence.one.text(3),
                        "first": divergence.other.text(3),
                        "where": str(divergence.one.line or divergence.other.line or ""),
                    }
                    for divergence in closing.divergences
                ],
                "obligation": "the regions of later calls",
            }
            for closing in self.closings
        ]


def _law_steps(applied: Iterable[Step], raw: _Raw, lines: _Terms) -> list[dict[str, Any]]:
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
    masks = {"where": before.args[:1], "fill-nothing": before.args[1:2]}.get(law, before.args)
    return not any(isinstance(mask, Term) and mask.op == "full" for mask in masks)


def _pair(law: Law | None, one: Term, other: Term, lines: _Terms) -> dict[str, Any]:
    return {
        "law": law.name if law is not None else _AT_EVERY_SIZE,
        "before": lines.place(one),
        "after": lines.place(other),
        "where": str(one.line or other.line or ""),
        "because": [],
        "is_trusted": True,
    }


class _Raw:
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


class _Terms:
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
            return int(value) if value.is_Integer else {"size": _size(value)}
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


def _size(expr: Any) -> Any:
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
    return [_OPERATIONS.get(name, name), *map(_size, operands)]
