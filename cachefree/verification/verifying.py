"""Random generations, the smallest that differs told with a snippet."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.random import fork_rng

from cachefree.errors import CacheFreeError, Refusal
from cachefree.explaining import foreseen
from cachefree.preconditions import refuse_not_rewritten
from cachefree.spec import Interface
from cachefree.verification.plan import Plan, draw_plan, next_sizes
from cachefree.verification.result import Verification, counterexample, summary
from cachefree.verification.runners import temporary_directory
from cachefree.verification.tally import Difference
from cachefree.verification.trial import OriginalFailedError, Trial
from cachefree.verification.trials import BACKENDS, Trials

__all__ = ["Verification", "replay", "verify"]

_SHORT = ((1, 1, 1), (2, 1), (1, 3), (3, 2, 1), (1,), (4,))


@foreseen("The two could not be compared")
def verify(
    model: nn.Module,
    rewritten: Any,
    *,
    backends: str | Sequence[str] = BACKENDS,
    providers: Sequence[Any] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    max_examples: int = 100,
    seed: int | None = None,
) -> Verification:
    """Tests that a rewritten model is the original, on whole generations.

    Draws a batch, the new tokens of each call (one token, many, a first call without a cache and
    later ones, each implementation with its own cache), padding and values inside the domain, and
    compares every output of every call, the cache too. Where one long call gives the original what
    its chunks give, the same is asked of the others. Equal bits pass, and so does what the dtype's
    rounding explains, measured against the original in float64.

    The same in other dtypes: on a copy of the model that is cast and rewritten again, as a call of
    ``rewritten`` does by itself after ``model.half()``. What a model, the rewrite or a backend
    cannot do in a dtype is told, and is no difference.

    Args:
        model: The original.
        rewritten: What ``cachefree.rewrite`` gave for it.
        backends: ``"eager"`` for the rewritten module, ``"onnxruntime"`` for its export; both, or
            one of them.
        providers: ONNX Runtime's execution providers.
        dtypes: Other dtypes to draw from; by default float64, float16, bfloat16 and float32 without
            the model's own. Each costs a copy of the weights and a rewrite; ``()`` for none.
        max_examples: How many generations to draw.
        seed: For the same generations again.

    Returns:
        What was run and how large the differences were.

    Raises:
        EquivalenceError: something differs; the smallest counterexample, with a snippet that
            replays it.
        CacheFreeError: hypothesis is missing, or the model runs on none of the generations.
    """
    refuse_not_rewritten(rewritten, "verify")
    _refuse_other_kinds(model, max_examples)
    backends = (backends,) if isinstance(backends, str) else tuple(backends)
    hypothesis = _hypothesis()
    with temporary_directory() as directory, fork_rng(devices=[]):
        trials = Trials(model, rewritten, backends, providers, Path(directory), dtypes)
        for plan in _corners(trials.own.interface):
            _run_or_skip(trials.own, plan)
        _search(hypothesis, trials, max_examples, seed)
    if not trials.own.tally.generations:
        raise CacheFreeError(
            Refusal(
                "The model itself ran on none of the generations.",
                why=trials.own.failure or "No sizes fit into the domain.",
                remedy=(
                    "Check that the model runs with random inputs of the shapes in"
                    " rewritten.interface."
                ),
            )
        )
    return summary(trials, backends)


def replay(
    model: nn.Module,
    rewritten: Any,
    plan: Plan,
    *,
    backends: str | Sequence[str] = BACKENDS,
    providers: Sequence[Any] | None = None,
) -> Verification:
    """Runs one generation again, as the message of an `EquivalenceError` says.

    Raises:
        EquivalenceError: it differs.
        CacheFreeError: the model does not run on it.
    """
    backends = (backends,) if isinstance(backends, str) else tuple(backends)
    with temporary_directory() as directory, fork_rng(devices=[]):
        dtypes = () if plan.dtype is None else (plan.dtype,)
        trials = Trials(model, rewritten, backends, providers, Path(directory), dtypes)
        trial = trials.of(plan.dtype)
        if trial is None:
            raise CacheFreeError(
                Refusal(
                    f"The model cannot be compared in {plan.dtype}.",
                    why="; ".join(trials.left_out.values()),
                )
            )
        try:
            difference = trial.run(plan)
        except OriginalFailedError as error:
            raise CacheFreeError(
                Refusal("The model itself does not run on this generation.", why=str(error))
            ) from error
    if difference is not None:
        raise counterexample(difference, plan)
    return summary(trials, backends)


def _refuse_other_kinds(model: object, max_examples: object) -> None:
    if not isinstance(model, nn.Module):
        told = f"verify takes the model and what rewrite gave, not {type(model).__name__}."
        raise CacheFreeError(Refusal(told, remedy="Call cachefree.verify(model, rewritten)."))
    if not isinstance(max_examples, int) or max_examples < 1:
        raise CacheFreeError(
            Refusal(
                f"max_examples={max_examples!r} is no number of generations.",
                remedy="Give 1 or more.",
            )
        )


def _hypothesis() -> Any:
    try:
        import hypothesis
    except ImportError as error:
        raise CacheFreeError(
            Refusal(
                "hypothesis is not installed.",
                why=(
                    "cachefree.verify draws its generations with it, and finds the smallest that"
                    " differs."
                ),
                remedy="pip install hypothesis",
            )
        ) from error
    return hypothesis


def _corners(interface: Interface) -> Iterator[Plan]:
    """Small generations that are always run.

    Batch 1 and 2; one token first, one token later, several later.
    """
    pasts = set(interface.past_symbols)
    names = [name for name in interface.symbols if name not in pasts | {"query"}]
    for number, queries in itertools.product((1, 2), _SHORT):
        fixed = dict.fromkeys(names, number)
        sizes = {**fixed, **dict.fromkeys(pasts, 0)}
        for place, query in enumerate(queries):
            sizes = interface.of_call({**sizes, "query": query}, is_first=place == 0)
            if not interface.domain.holds(sizes, is_first=place == 0):
                break
            sizes = next_sizes(interface, sizes)
        else:
            yield Plan(queries, fixed)


class _DifferenceFoundError(Exception):
    def __init__(self, difference: Difference, plan: Plan) -> None:
        super().__init__(difference, plan)
        self.difference = difference
        self.plan = plan


def _run_or_skip(trial: Trial, plan: Plan) -> None:
    try:
        difference = trial.run(plan)
    except OriginalFailedError:
        return
    if difference is not None:
        raise counterexample(difference, plan)


def _search(hypothesis: Any, trials: Trials, max_examples: int, seed: int | None) -> None:
    """Draws generations, and shrinks one that differs."""
    strategies = hypothesis.strategies
    # the model's own dtype stands first, as what is simplest, and is as likely as all others
    dtypes = [None, *[None for _ in trials.others[1:]], *trials.others]

    @strategies.composite  # type: ignore[untyped-decorator]
    def plans(draw: Any) -> Plan | None:
        seed = draw(strategies.integers(0, 2**16))
        dtype = draw(strategies.sampled_from(dtypes))
        trial = trials.of(dtype)
        if trial is None:
            return None
        return draw_plan(
            lambda options: draw(strategies.sampled_from(options)),
            trial.interface,
            trial.has_masks,
            seed,
            dtype,
        )

    @hypothesis.settings(
        max_examples=max_examples,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        verbosity=hypothesis.Verbosity.quiet,
        report_multiple_bugs=False,
        print_blob=False,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
    )  # type: ignore[untyped-decorator]
    @hypothesis.given(plans())  # type: ignore[untyped-decorator]
    def run(plan: Plan | None) -> None:
        hypothesis.assume(plan is not None)
        assert plan is not None
        trial = trials.of(plan.dtype)
        assert trial is not None
        try:
            difference = trial.run(plan)
        except OriginalFailedError:
            hypothesis.reject()
        else:
            if difference is not None:
                raise _DifferenceFoundError(difference, plan)

    try:
        (run if seed is None else hypothesis.seed(seed)(run))()
    except _DifferenceFoundError as found:
        raise counterexample(found.difference, found.plan) from None
    except hypothesis.errors.Unsatisfiable:
        return
    except hypothesis.errors.Flaky as error:
        raise CacheFreeError(
            Refusal(
                "The same generation differed once and agreed once.",
                why="The model, or a backend, gives other results for the same inputs.",
                remedy="Call model.eval(), and look for random numbers in forward.",
            )
        ) from error
