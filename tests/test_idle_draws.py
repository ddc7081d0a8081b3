"""Random numbers from generators that are not torch's: drawn and thrown away, or used."""

from __future__ import annotations

import math
import random
from random import uniform
from typing import Any

import numpy
import pytest
import torch

import cachefree

from .small import IDS, Small, rewritten_small, small

KEPT: dict[str, Any] = {}
shared = numpy.random  # what models of that time draw from


class LayerDrop(Small):
    """Draws for every layer, as older encoder–decoders do, and looks at it in training only."""

    rate = 0.1

    def forward(self, ids, past=None):
        logits, present = super().forward(ids, past)
        for draw in (random.random, lambda: random.uniform(0, 1), lambda: uniform(0, 1)):
            dropout_probability = draw()
            if self.training and (dropout_probability < self.rate):
                logits = logits * 0
        skip = shared.uniform(0, 1)
        return (logits * 0 if self.training and skip < self.rate else logits), present


def test_what_is_drawn_and_thrown_away_is_no_reason_to_refuse() -> None:
    model = small(LayerDrop)
    random.seed(5)
    shared.seed(5)
    before = random.getstate(), str(shared.get_state())
    rewritten = rewritten_small(model)
    assert rewritten.report.verdict.is_proof
    assert (random.getstate(), str(shared.get_state())) == before
    (logits, _), (expected, _) = rewritten(IDS), model(IDS)
    assert torch.equal(logits, expected)


class Uses(Small):
    """Draws, and does something with the number."""

    def __init__(self, use: Any) -> None:
        super().__init__()
        self.use = use

    def forward(self, ids, past=None):
        logits, present = super().forward(ids, past)
        chosen = self.use(self, random.uniform(0, 1), logits)
        return (logits * 2 if chosen is True else logits), present


def _swallows(model: Any, number: Any, logits: Any) -> bool:
    try:
        return number < 0.5
    except Exception:  # noqa: BLE001 - as careless code does
        return False


def _tells_its_class(model: Any, number: Any, logits: Any) -> bool:
    return isinstance(number, float)


def _keeps_on_the_model(model: Any, number: Any, logits: Any) -> None:
    model.last = number


def _keeps_in_a_global(model: Any, number: Any, logits: Any) -> None:
    KEPT["last"] = number


def _keeps_in_a_list(model: Any, number: Any, logits: Any) -> None:
    model.__dict__.setdefault("seen", []).append([number])


USES = {
    "compares": lambda model, number, logits: number < 0.5,
    "swallows": _swallows,
    "class": _tells_its_class,
    "truth": lambda model, number, logits: bool(number),
    "text": lambda model, number, logits: f"{number:.1f}" == "0.5",
    "shown": lambda model, number, logits: repr(number) == "0.5",
    "floor": lambda model, number, logits: math.floor(number) == 0,
    "attribute": lambda model, number, logits: number.is_integer() or True,
    "asked": lambda model, number, logits: hasattr(number, "hex"),
    "times": lambda model, number, logits: (logits * number).dim() == 3,
    "reflected": lambda model, number, logits: (2 - number) > 1,
    "operator": lambda model, number, logits: torch.full((1,), number) is None,
    "tensor": lambda model, number, logits: torch.tensor(number) is None,
    "array": lambda model, number, logits: numpy.asarray(number) is None,
    "key": lambda model, number, logits: hash(number) == 1,
    "largest": lambda model, number, logits: max(number, 0.5) is number,
    "on the model": _keeps_on_the_model,
    "in a global": _keeps_in_a_global,
    "in a list": _keeps_in_a_list,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_any_use_is_refused(use: Any) -> None:
    model = small(lambda: Uses(use))
    random.seed(5)
    before, attributes = random.getstate(), set(vars(model))
    with pytest.raises(cachefree.CaptureError, match="draws random numbers outside of torch"):
        rewritten_small(model)
    assert random.getstate() == before
    assert (set(vars(model)), KEPT) == (attributes, {})


def _class_of(number: Any) -> Any:
    return type(number)


def _same_class(model: Any, number: Any, logits: Any) -> bool:
    return _class_of(number) is float


@pytest.mark.parametrize(
    "use",
    [
        _same_class,
        lambda model, number, logits: random.randint(0, 1),
        lambda model, number, logits: shared.rand(2),
        lambda model, number, logits: random.getrandbits(3),
    ],
)
def test_other_draws_are_heard_by_the_generator_moving_on(use: Any) -> None:
    with pytest.raises(cachefree.CaptureError, match="draws random numbers outside of torch"):
        rewritten_small(small(lambda: Uses(use)))


def test_the_line_of_the_use_is_told() -> None:
    with pytest.raises(cachefree.CaptureError) as caught:
        rewritten_small(small(lambda: Uses(_swallows)))
    where = caught.value.refusals[0].where
    assert where is not None
    assert where.text == "return number < 0.5"


class DrawsFromTorch(Small):
    """Draws by torch, and does something with the number where it is told what."""

    use: Any = None

    def forward(self, ids, past=None):
        logits, present = super().forward(ids, past)
        dropout_probability = torch.rand([])
        is_skipped = dropout_probability < 0.1
        if self.training and is_skipped:
            logits = logits * 0
        return (logits if self.use is None else self.use(logits, dropout_probability)), present


def test_what_torch_draws_and_nothing_reads_is_no_reason_to_refuse() -> None:
    model = small(DrawsFromTorch)
    state = torch.get_rng_state()
    rewritten = rewritten_small(model)
    assert rewritten.report.verdict.is_proof
    assert not any("rand" in str(node.target) for node in rewritten.graph_module.graph.nodes)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(rewritten(IDS)[0], model(IDS)[0])


def _writes(logits: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    logits[:, 0] = number
    return logits


def _draws_into_a_view(logits: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    kept = torch.ones_like(logits)
    kept[:, :, :2].bernoulli_(0.5)
    return logits * kept


@pytest.mark.parametrize(
    ("use", "text"),
    [
        (_draws_into_a_view, "draws random numbers"),
        (lambda logits, number: logits * number, "draws random numbers"),
        (lambda logits, number: logits * (number * 0), "draws random numbers"),
        (lambda logits, number: logits.add_(number), "draws random numbers"),
        (lambda logits, number: (logits, number), "draws random numbers"),
        (_writes, "draws random numbers"),
        (lambda logits, number: logits * 2 if number < 0.5 else logits, "values of a tensor"),
        (lambda logits, number: logits * float(number), "values of a tensor"),
    ],
)
def test_what_torch_draws_and_something_reads_is_refused(use: Any, text: str) -> None:
    model = small(DrawsFromTorch)
    model.use = use
    with pytest.raises(cachefree.CaptureError, match=text):
        rewritten_small(model)
