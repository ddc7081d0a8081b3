"""What was done and shown, for a person to read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from cachefree.errors import SourceLine
from cachefree.spec import Domain

__all__ = ["Branch", "Report", "Verdict"]


def _shown(file: str) -> str:
    """A path as short as it can be: relative where it is below the working directory."""
    here = os.getcwd() + os.sep
    return file.removeprefix(here)


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
    """

    where: SourceLine
    condition: str
    rule: str
    neutral: str


@dataclass
class Report:
    """The report of a rewrite.

    Attributes:
        model: The model's class.
        branches: The branches that were removed.
        verdict: How equality was shown.
        domain: Where it holds.
        laws: Names of the laws that were used.
        slots: One line a cache slot.
        notes: What was assumed.
        questions: What the model's code asked about sizes.
        seconds: The time that the rewrite took.
        kinds: Of each law, whether it holds bit for bit (``"exact"``) or over the reals.
    """

    model: str
    branches: tuple[Branch, ...]
    verdict: Verdict
    domain: Domain
    laws: tuple[str, ...]
    slots: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    seconds: float = 0.0
    nodes: dict[str, int] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)

    @property
    def assumed(self) -> tuple[str, ...]:
        """What the verdict rests on beside the laws."""
        return (
            f"torch {torch.__version__}: its tracer, its operators, their sizes and dtypes",
            "each captured path is what the model computes, writes in place as they were read",
            *self.notes,
        )

    def __str__(self) -> str:
        lines = [f"{self.model}: one graph for the first and for later calls"]
        lines.append(f"  verdict   {self.verdict.name}: {self.verdict.value}")
        lines.append(
            f"  cache     {len(self.slots)} tensors, " + (self.slots[0] if self.slots else "")
        )
        if len(self.slots) > 1:
            lines[-1] += " …"
        lines += [f"  domain    {region}" for region in self.domain.regions]
        lines += [f"  fixed     {fixed}" for fixed in self.domain.fixed]
        counted = Counter(
            (branch.rule, branch.where, branch.condition, branch.neutral)
            for branch in self.branches
        )
        for (rule, where, condition, neutral), count in counted.items():
            times = f" (×{count})" if count > 1 else ""
            lines.append(f"  branch    {_shown(where.file)}:{where.line}{times}  {condition}")
            lines.append(f"            {rule}; {neutral}")
        lines += [f"  assumed   {note}" for note in self.notes]
        lines.append(f"  laws      {', '.join(self.laws)}")
        lines.append(f"  took      {self.seconds:.1f} s")
        return "\n".join(lines)

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
            "proof": [{"name": law, "kind": self.kinds.get(law, "")} for law in self.laws],
            "assumed": list(self.assumed),
            "slots": list(self.slots),
            "notes": list(self.notes),
            "questions": list(self.questions),
            "seconds": self.seconds,
        }
