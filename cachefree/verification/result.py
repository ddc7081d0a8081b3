"""What a test of many generations comes to: a few numbers, or the smallest that differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cachefree.errors import EquivalenceError, Refusal
from cachefree.verification.plan import Plan
from cachefree.verification.tally import Difference, Tally

__all__ = ["Verification", "counterexample", "summary"]


@dataclass(frozen=True)
class Verification:
    """What was tested, and how close it came.

    Attributes:
        generations: How many whole generations ran, each from no cache on.
        calls: How many calls of the model.
        backends: What was compared with the original.
        differences: Backend → the largest absolute difference of any output; 0 where all bits
            agree.
        exact: Backend → the share of outputs that agree bit for bit.
        invariant: In how many generations chunks gave the same as one long call, in the original …
        chunked: … of how many.
    """

    generations: int
    calls: int
    backends: tuple[str, ...]
    differences: Mapping[str, float]
    exact: Mapping[str, float]
    invariant: int
    chunked: int

    def __str__(self) -> str:
        ran = f"{self.generations} generations, {self.calls} calls"
        lines = [f"tested on {ran}: no difference from the model"]
        for backend in self.backends:
            difference, exact = self.differences.get(backend, 0.0), self.exact.get(backend, 1.0)
            said = (
                "all bits equal"
                if exact == 1
                else (
                    f"{min(exact, 0.999):.1%} of outputs bit for bit, the others within"
                    f" {difference:.2g}"
                )
            )
            lines.append(f"  {backend:<12} {said}")
        if self.chunked:
            lines.append(
                f"  chunks       as one long call in {self.invariant} of {self.chunked} generations"
                " of the model"
            )
        return "\n".join(lines)

    __repr__ = __str__


def counterexample(difference: Difference, plan: Plan) -> EquivalenceError:
    """The error that tells a difference, with sizes, seed and a snippet that replays it."""
    snippet = (
        "from cachefree.verification import Plan, replay\n"
        f"replay(model, rewritten, {plan!r}, backends=({difference.backend!r},))"
    )
    sizes = ", ".join(f"{name} = {size}" for name, size in plan.sizes.items())
    calls = (
        f"{sizes}; new tokens a call: {', '.join(map(str, plan.queries))}; padding: {plan.padding};"
        f" seed: {plan.seed}"
    )
    why = f"{difference.why}\n         {calls}" + (
        f"\n         inputs: {difference.shapes}" if difference.shapes else ""
    )
    return EquivalenceError(
        Refusal(
            f"{difference.backend} is not the model: {difference.place}.",
            why=why,
            remedy="Replay it with:",
            snippet=snippet,
        )
    )


def summary(tally: Tally, backends: tuple[str, ...]) -> Verification:
    """The result of all generations so far."""
    return Verification(
        generations=tally.generations,
        calls=tally.calls,
        backends=backends,
        differences=dict(tally.differences),
        exact={name: tally.exact[name] / count for name, count in tally.outputs.items()},
        invariant=tally.invariant,
        chunked=tally.chunked,
    )
