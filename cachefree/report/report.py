"""What was done and shown, for a person to read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch

from cachefree.errors import SourceLine
from cachefree.report.outline import Outline
from cachefree.report.source import Excerpt
from cachefree.spec import CacheSlot, Domain, Interface

if TYPE_CHECKING:
    from cachefree.report.picture import Picture

__all__ = ["Branch", "Report", "Step", "Verdict"]


class Verdict(Enum):
    """How the one graph was shown to equal the model's paths, strongest first."""

    PROVED_EXACT = "proved by laws that hold bit for bit"
    PROVED_REAL = "proved by laws that hold over the real numbers"
    CHECKED = (
        "proved but for values of sizes alone, which were compared at every size up to a bound"
    )
    TESTED = "compared on random inputs only"
    NOT_CHECKED = "not checked"

    @property
    def is_proof(self) -> bool:
        """Whether it is a proof."""
        return self in (Verdict.PROVED_EXACT, Verdict.PROVED_REAL)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Branch:
    """A branch of the model's code that the one graph does not have any more.

    Attributes:
        where: Its line.
        condition: The condition's source text.
        rule: The rule that closed it.
        neutral: The neutral element that makes it vanish.
        excerpt: The statement as it stood in its file.
    """

    where: SourceLine
    condition: str
    rule: str
    neutral: str
    excerpt: Excerpt | None = None

    @property
    def file(self) -> str:
        """The path of its file, as Python knows it."""
        return self.where.file

    @property
    def line(self) -> int:
        """Its line's number, from 1."""
        return self.where.line


@dataclass(frozen=True)
class Step:
    """A step of the proof, in words.

    Attributes:
        title: What was done.
        details: With what: laws as equations, edits, values.
    """

    title: str
    details: tuple[str, ...] = ()


@dataclass(repr=False)
class Report:
    """What a rewrite did and what it showed.

    ``print(report)`` is for a terminal (in colour where ``rich`` is installed, with
    ``rich.print``); as the last line of a notebook's cell it is a page; `plot` is a picture.

    Attributes:
        model: The model's class.
        branches: The branches that were removed.
        verdict: How equality was shown.
        domain: Where it holds.
        laws: Names of the laws that were used.
        slots: One line a cache slot.
        notes: What was assumed.
        loops: Loops over tokens in the graph, which run them one by one: ``Scan`` in ONNX.
        questions: What the model's code asked about sizes.
        seconds: The time that the rewrite took.
        interface: The one graph's inputs, outputs and cache slots.
        steps: The proof, step by step.
        outline: The two paths and the one graph, line by line.
        law_kinds: Of each law, whether it holds bit for bit (``"exact"``) or over the reals.
    """

    model: str
    branches: tuple[Branch, ...]
    verdict: Verdict
    domain: Domain
    laws: tuple[str, ...]
    slots: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    loops: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    seconds: float = 0.0
    interface: Interface | None = None
    steps: tuple[Step, ...] = ()
    outline: Outline | None = None
    law_kinds: Mapping[str, str] = field(default_factory=dict)

    @property
    def assumed(self) -> tuple[str, ...]:
        """What the verdict rests on beside the laws."""
        return (
            f"torch {torch.__version__}: its tracer, its operators, their sizes and dtypes",
            "each captured path is what the model computes, writes in place as they were read",
            *self.notes,
        )

    def kinds(self) -> list[tuple[str, str, list[Branch]]]:
        """The removed branches by kind: the rule, the neutral element, the branches."""
        kinds: dict[tuple[str, str], list[Branch]] = {}
        for branch in self.branches:
            kinds.setdefault((branch.rule, branch.neutral), []).append(branch)
        return [(rule, neutral, branches) for (rule, neutral), branches in kinds.items()]

    def text(self, *, details: bool = False) -> str:
        """The report for a terminal.

        Args:
            details: Whether to show each branch with its lines, every cache slot, and every step of
                the proof.
        """
        from cachefree.report.text import plain

        return plain(self, details=details)

    def plot(self) -> Picture:
        """The first path, the later path and the one graph side by side, as a picture.

        Layers that are equal are drawn once. The picture shows itself in a notebook;
        ``report.plot().save("paths.svg")`` writes it.

        Raises:
            ValueError: the report was read from a file that has no picture in it.
        """
        from cachefree.report.picture import draw

        if self.outline is None:
            raise ValueError("this report has no graphs to draw: rewrite the model again")
        return draw(self.outline, self.model)

    def __str__(self) -> str:
        return self.text()

    __repr__ = __str__

    def __rich__(self) -> Any:
        from cachefree.report.text import styled

        return styled(self)

    def _repr_html_(self) -> str:
        from cachefree.report.html import page

        return page(self)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return {
            "model": self.model,
            "verdict": self.verdict.name,
            "domain": [
                {
                    "region": region.name,
                    "conditions": [str(condition) for condition in region.conditions],
                }
                for region in self.domain.regions
            ],
            "fixed": list(self.domain.fixed),
            "branches": [
                {
                    "file": branch.where.file,
                    "line": branch.where.line,
                    "condition": branch.condition,
                    "rule": branch.rule,
                    "neutral": branch.neutral,
                }
                for branch in self.branches
            ],
            "laws": list(self.laws),
            "proof": [{"name": law, "kind": self.law_kinds.get(law, "")} for law in self.laws],
            "assumed": list(self.assumed),
            "slots": list(self.slots),
            "cache": [] if self.interface is None else [_slot(s) for s in self.interface.cache],
            "steps": [{"title": s.title, "details": list(s.details)} for s in self.steps],
            "notes": list(self.notes),
            "loops": list(self.loops),
            "questions": list(self.questions),
            "seconds": self.seconds,
        }


def _slot(slot: CacheSlot) -> dict[str, Any]:
    return {
        "path": slot.past.path,
        "shape": [str(size) for size in slot.past.shape],
        "dtype": str(slot.past.dtype).removeprefix("torch."),
        "growing_axes": list(slot.growing_axes),
        "neutral": slot.neutral,
    }
