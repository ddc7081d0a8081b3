"""The proof written down: every step with its law, its place and its side condition.

What the prover did is remembered as it was; it is written only when somebody asks for it. What
reads it again is in `cachefree.checker`, which shares no code with the prover.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachefree.certify import Certified
from cachefree.checker.replay import FORMAT
from cachefree.errors import CacheFreeError, Refusal
from cachefree.facts import Facts
from cachefree.laws import Law
from cachefree.normal import Step
from cachefree.regimes import Kind, Regime
from cachefree.report import Report, Verdict
from cachefree.rules import Closing
from cachefree.spec import Domain, Interface
from cachefree.terms import Table, Term
from cachefree.written import Equations, Lines, law_steps, pair_step, written_size

__all__ = ["Certificate", "Evidence"]


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
            kind.values_where(regime.pinned, regime.region.conditions),
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
        asks_values: Whether the model's code asks for the values of an input.
    """

    table: Table
    inputs: tuple[tuple[str, Term], ...]
    outputs: tuple[Term, ...]
    verdict: Verdict
    domain: Domain
    laws: tuple[Law, ...]
    closings: tuple[Closing, ...]
    regions: tuple[Region, ...]
    asks_values: bool = False

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
            bool(certified.values),
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
        if self.asks_values:
            raise CacheFreeError(
                Refusal(
                    "A graph of code that asks for the values of an input has no certificate.",
                    why="The paths that the code takes where the input is one number throughout "
                    "were compared by the prover alone.",
                    remedy="Compare the two with cachefree.verify(model, rewritten).",
                )
            )
        graph = Lines()
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
                {"call": region.name, "facts": [written_size(c.fact) for c in region.conditions]}
                for region in self.domain.regions
            ],
            "fixed": list(self.domain.fixed),
            "laws": {law.name: {"statement": law.statement, "kind": law.kind} for law in self.laws},
            "stand_ins": sorted({name for region in self.regions for name in region.stand_ins}),
            "assumed": list(report.assumed),
        }
        return Certificate(json.loads(json.dumps(content)))

    def _region(self, region: Region) -> dict[str, Any]:
        raw = Equations(self.table, Facts(region.facts), region.values)
        lines = Lines()
        steps = [
            *law_steps(region.steps, raw, lines),
            *(pair_step(law, one, other, lines) for law, one, other in region.pairs),
        ]
        return {
            "call": region.kind.name,
            "facts": [written_size(fact) for fact in region.facts],
            "values": {str(symbol): written_size(size) for symbol, size in region.values.items()},
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
