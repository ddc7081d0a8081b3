"""Random generations, the smallest that differs told with a snippet."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.random import fork_rng

from cachefree.errors import CacheFreeError, Refusal
from cachefree.lifting.subject import called_alike
from cachefree.preconditions import refuse_not_rewritten
from cachefree.spec import Interface
from cachefree.verification.plan import Plan, draw_plan, next_sizes
from cachefree.verification.result import Verification, counterexample, summary
from cachefree.verification.runners import (
    OwnCall,
    Runner,
    double_copy,
    onnx_runner,
    temporary_directory,
)
from cachefree.verification.tally import Difference
from cachefree.verification.trial import OriginalFailedError, Trial, device_of

__all__ = ["Verification", "replay", "verify"]

BACKENDS = ("eager", "onnxruntime")
_SHORT = ((1, 1, 1), (2, 1), (1, 3), (3, 2, 1), (1,), (4,))


def verify(
    model: nn.Module,
    rewritten: Any,
    *,
    backends: Sequence[str] = BACKENDS,
    providers: Sequence[Any] | None = None,
    max_examples: int = 100,
    seed: int | None = None,
) -> Verification:
    """Tests that a rewritten model is the original, on whole generations.

    Draws a batch, the new tokens of each call (one token, many, a first call without a cache and
    later ones, each implementation with its own cache), padding and values inside the domain, and
    compares every output of every call, the cache too. Where one long call gives the original what
    its chunks give, the same is asked of the others. Equal bits pass, and so does what the dtype's
    rounding explains, measured against the original in float64.

    Args:
        model: The original.
        rewritten: What ``cachefree.rewrite`` gave for it.
        backends: ``"eager"`` for the rewritten module, ``"onnxruntime"`` for its export.
        providers: ONNX Runtime's execution providers.
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
    hypothesis = _hypothesis()
    with temporary_directory() as directory, fork_rng(devices=[]):
        trial = _trial(model, rewritten, backends, providers, Path(directory))
        failures: list[str] = []
        for plan in _corners(trial.interface):
            _run_or_skip(trial, plan, failures)
        _search(hypothesis, trial, max_examples, seed, failures)
    if not trial.tally.generations:
        raise CacheFreeError(
            Refusal(
                "The model itself ran on none of the generations.",
                why=failures[-1] if failures else "No sizes fit into the domain.",
                remedy=(
                    "Check that the model runs with random inputs of the shapes in"
                    " rewritten.interface."
                ),
            )
        )
    return summary(trial.tally, tuple(backends))


def replay(
    model: nn.Module,
    rewritten: Any,
    plan: Plan,
    *,
    backends: Sequence[str] = BACKENDS,
    providers: Sequence[Any] | None = None,
) -> Verification:
    """Runs one generation again, as the message of an `EquivalenceError` says.

    Raises:
        EquivalenceError: it differs.
        CacheFreeError: the model does not run on it.
    """
    with temporary_directory() as directory, fork_rng(devices=[]):
        trial = _trial(model, rewritten, backends, providers, Path(directory))
        try:
            difference = trial.run(plan)
        except OriginalFailedError as error:
            raise CacheFreeError(
                Refusal("The model itself does not run on this generation.", why=str(error))
            ) from error
    if difference is not None:
        raise counterexample(difference, plan)
    return summary(trial.tally, tuple(backends))


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
                remedy="pip install cachefree[verify]",
            )
        ) from error
    return hypothesis


def _trial(
    model: nn.Module,
    rewritten: Any,
    backends: Sequence[str],
    providers: Sequence[Any] | None,
    directory: Path,
) -> Trial:
    unknown = [backend for backend in backends if backend not in BACKENDS]
    if unknown or not backends:
        raise CacheFreeError(
            Refusal(
                f"Unknown backends: {', '.join(unknown) or 'none given'}.",
                remedy=f"Known are {', '.join(BACKENDS)}.",
            )
        )
    if any(tensor.is_meta for tensor in model.parameters()):
        raise CacheFreeError(
            Refusal(
                "The model's weights are on the meta device: it computes nothing that could be"
                " compared.",
                remedy="Load the weights first, or trust the proof: rewritten.report.verdict.",
            )
        )
    other = rewritten.calling.another_mode("model", is_training=model.training)
    if other is not None:
        raise CacheFreeError(other)
    own_call = OwnCall(rewritten)
    others = []
    if "eager" in backends:
        others.append(Runner("eager", rewritten, own_call))
    if "onnxruntime" in backends:
        try:
            others.append(onnx_runner(rewritten, own_call, directory, providers))
        except CacheFreeError as error:
            without = Refusal("To verify without ONNX Runtime, pass backends=('eager',).")
            raise type(error)(*error.refusals, without) from error
    exact = double_copy(model)
    return Trial(
        Runner("original", called_alike(model, rewritten), own_call),
        None
        if exact is None
        else Runner("float64", called_alike(exact, rewritten), own_call, _float64()),
        others,
        rewritten,
        device_of(model),
    )


def _float64() -> Any:
    import torch

    return torch.float64


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


def _run_or_skip(trial: Trial, plan: Plan, failures: list[str]) -> bool:
    """Runs a generation; whether the original could."""
    try:
        difference = trial.run(plan)
    except OriginalFailedError as error:
        failures.append(str(error))
        return False
    if difference is not None:
        raise counterexample(difference, plan)
    return True


def _search(
    hypothesis: Any, trial: Trial, max_examples: int, seed: int | None, failures: list[str]
) -> None:
    """Draws generations, and shrinks one that differs."""
    strategies = hypothesis.strategies

    @strategies.composite  # type: ignore[untyped-decorator]
    def plans(draw: Any) -> Plan | None:
        seed = draw(strategies.integers(0, 2**16))
        return draw_plan(
            lambda options: draw(strategies.sampled_from(options)),
            trial.interface,
            trial.has_masks,
            seed,
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
        try:
            difference = trial.run(plan)
        except OriginalFailedError as error:
            failures.append(str(error))
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
