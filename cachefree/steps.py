"""The proof, step by step, in words."""

from __future__ import annotations

from collections.abc import Iterator

from cachefree.certify import Certified
from cachefree.reading import Program
from cachefree.report import Step
from cachefree.spec import Interface

__all__ = ["steps_of"]


def steps_of(
    first: Program, later: Program, certified: Certified, interface: Interface
) -> tuple[Step, ...]:
    """What was done to show that one graph is both paths, in order."""
    return tuple(_steps(first, later, certified, interface))


def _steps(
    first: Program, later: Program, certified: Certified, interface: Interface
) -> Iterator[Step]:
    for name, program in (("first", first), ("later", later)):
        asked = program.captured.questions
        yield Step(
            f"The {name} path was captured with symbolic sizes, and read as terms.",
            tuple(
                f"its code asks: {text}"
                for text in dict.fromkeys(str(question) for question in asked)
            ),
        )
    neutral: dict[str, list[str]] = {}
    for slot in interface.cache:
        neutral.setdefault(slot.neutral, []).append(slot.past.path)
    yield Step(
        "The cache was replaced by its neutral element.",
        tuple(f"{', '.join(paths)}: {words}" for words, paths in neutral.items()),
    )
    for closing in certified.closings:
        lines = [d.other.line or d.one.line for d in closing.divergences]
        told = dict.fromkeys(f"at {line}" for line in lines if line is not None)
        yield Step(f"{closing.rule.name}: {closing.rule.neutral}", tuple(told))
    if certified.laws:
        yield Step(
            "Both were brought to a normal form by laws, applied from left to right.",
            tuple(
                f"{law.name}: {law.statement}"
                + ("   (over the real numbers)" if law.kind != "exact" else "")
                for law in certified.laws
            ),
        )
    regions = tuple(str(region) for region in certified.domain.regions)
    if certified.verdict.is_proof:
        yield Step("In each region the one graph and the model's path are the same term.", regions)
    else:
        yield Step(f"In each region: {certified.verdict.value}.", regions)
    for exclusion in certified.excluded:
        yield Step("Outside the domain, and an error there.", (str(exclusion.refusal.what),))
