"""What a test of many generations comes to: a few numbers, or the smallest that differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from cachefree.errors import EquivalenceError, Refusal
from cachefree.verification.plan import Plan
from cachefree.verification.tally import Difference, Tally
from cachefree.verification.trials import Trials

__all__ = ["Verification", "counterexample", "summary"]


@dataclass(frozen=True)
class Verification:
    """What was tested, and how close it came.

    Attributes:
        generations: How many whole generations ran, each from no cache on, in all dtypes.
        calls: How many calls of the model.
        backends: What was compared with the original.
        differences: Backend → the largest absolute difference of any output; 0 where all bits
            agree.
        exact: Backend → the share of outputs that agree bit for bit.
        invariant: In how many generations chunks gave the same as one long call, in the original …
        chunked: … of how many.
        dtypes: Dtype that a copy was cast to → the same of what ran in it.
        left_out: A dtype, or a dtype and a backend, that could not be compared → why not.
    """

    generations: int
    calls: int
    backends: tuple[str, ...]
    differences: Mapping[str, float]
    exact: Mapping[str, float]
    invariant: int
    chunked: int
    dtypes: Mapping[torch.dtype, Verification] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        ran = f"{self.generations} generations, {self.calls} calls"
        lines = [f"tested on {ran}: no difference from the model"]
        lines += [f"  {backend:<12} {self._said(backend)}" for backend in self.backends]
        for dtype, found in self.dtypes.items():
            said = ", ".join(f"{name} {found._said(name)}" for name in found.differences)
            name = str(dtype).removeprefix("torch.")
            lines.append(f"  {name:<12} {found.generations} of the generations: {said}")
        if self.chunked:
            lines.append(
                f"  chunks       as one long call in {self.invariant} of {self.chunked} generations"
                " of the model"
            )
        lines += [f"  not compared {what}: {why}" for what, why in self.left_out.items()]
        return "\n".join(lines)

    __repr__ = __str__

    def _said(self, backend: str) -> str:
        difference, exact = self.differences.get(backend, 0.0), self.exact.get(backend, 1.0)
        if exact == 1:
            return "all bits equal"
        return f"{min(exact, 0.999):.1%} of outputs bit for bit, the others within {difference:.2g}"


def counterexample(difference: Difference, plan: Plan) -> EquivalenceError:
    """The error that tells a difference, with sizes, seed and a snippet that replays it."""
    is_cast = plan.dtype is not None
    snippet = (
        f"{'import torch' + chr(10) if is_cast else ''}"
        "from cachefree.verification import Plan, replay\n"
        f"replay(model, rewritten, {plan!r}, backends=({difference.backend!r},))"
    )
    sizes = ", ".join(f"{name} = {size}" for name, size in plan.sizes.items())
    calls = (
        f"{sizes}; new tokens a call: {', '.join(map(str, plan.queries))}; padding: {plan.padding};"
        f" seed: {plan.seed}{f'; in {plan.dtype}' if is_cast else ''}"
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


def summary(trials: Trials, backends: tuple[str, ...]) -> Verification:
    """The result of all generations so far."""
    dtypes = {
        dtype: _counted(trial.tally, backends)
        for dtype, trial in trials.by_dtype.items()
        if trial is not None and trial.tally.generations
    }
    own = _counted(trials.own.tally, backends)
    every = (own, *dtypes.values())
    return replace(
        own,
        generations=sum(found.generations for found in every),
        calls=sum(found.calls for found in every),
        invariant=sum(found.invariant for found in every),
        chunked=sum(found.chunked for found in every),
        dtypes=dtypes,
        left_out=trials.left_out,
    )


def _counted(tally: Tally, backends: tuple[str, ...]) -> Verification:
    return Verification(
        generations=tally.generations,
        calls=tally.calls,
        backends=backends,
        differences=dict(tally.differences),
        exact={name: tally.exact[name] / count for name, count in tally.outputs.items()},
        invariant=tally.invariant,
        chunked=tally.chunked,
    )
