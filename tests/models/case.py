"""What a test model is: how it is built, how it is called first, and how it is called later."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

Call = tuple[tuple[Any, ...], dict[str, Any]]
Prefill = Callable[[int, int, torch.Generator], Call]
Step = Callable[[Any, int, int, int, torch.Generator], Call]
Draw = Callable[[int, int, int, torch.Generator], Any]

LONGEST = 64
"""Inputs are cut out of a sequence of this length, by absolute position."""


def anywhere(batch: int, past: int, query: int) -> bool:
    return True


def one_token_later(batch: int, past: int, query: int) -> bool:
    """The domain of a model whose later calls take one token each."""
    return past == 0 or query == 1


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """A decoder that `cachefree.rewrite` takes.

    `prefill` and `step` draw inputs by absolute position: with an equally seeded generator for
    every call, the inputs of the chunks are slices of the inputs of one long first call.
    """

    name: str
    build: Callable[[], nn.Module]
    prefill: Prefill
    step: Step
    patterns: tuple[str, ...]
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None
    rewrite_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    expects_proof: bool = True
    domain: Callable[[int, int, int], bool] = anywhere
    """Which (batch, past, query) the model accepts, and gives a meaning to."""
    chunk_invariant: bool = True
    """Chunks give what one long first call gives."""
    may_refuse: bool = False
    """A refusal that names the reason is as good an answer as a rewritten module."""
    device: str = "cpu"
    """`meta` for a model without storage: its calls give shapes only."""

    def __str__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class RefusalCase:
    """A model, or a call of a rewritten model, that must be refused.

    `error` is the name of a class in `cachefree`, and each text of `says` occurs in the message.
    Where `then` is given, the rewrite succeeds and `then(rewritten)` must raise the error. Where
    `or_correct` is set, a rewritten module is accepted if on the calls of `prefill` and `step` it
    equals the model or raises a `CacheFreeError`.
    """

    name: str
    build: Callable[[], nn.Module]
    error: str
    says: tuple[str, ...]
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None
    rewrite_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    then: Callable[[Any], Any] | None = None
    or_correct: bool = False
    prefill: Prefill | None = None
    step: Step | None = None

    def __str__(self) -> str:
        return self.name


def seeded(build: Callable[[], nn.Module], *, seed: int = 0, scale: float = 0.2) -> Any:
    """Makes `build` reproducible, with matrices large enough that a wrong cache shows.

    The module is in eval mode, and each parameter of two or more dimensions is normal with
    standard deviation `scale`. The global random state is left as it was.
    """

    def built() -> nn.Module:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model = build()
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(0.0, scale)
        return model.eval()

    return built


def tokens(vocabulary: int) -> Draw:
    """Token ids, shape (B, S)."""

    def draw(batch: int, past: int, query: int, generator: torch.Generator) -> torch.Tensor:
        sequence = torch.randint(vocabulary, (batch, LONGEST), generator=generator)
        return sequence[:, past : past + query]

    return draw


def frames(width: int, *, dtype: torch.dtype = torch.float32) -> Draw:
    """Feature frames, shape (B, S, width)."""

    def draw(batch: int, past: int, query: int, generator: torch.Generator) -> torch.Tensor:
        sequence = torch.randn(batch, LONGEST, width, generator=generator, dtype=dtype)
        return sequence[:, past : past + query]

    return draw


def time_major(draw: Draw) -> Draw:
    """The same inputs with time in front: shape (S, B, ...)."""

    def transposed(batch: int, past: int, query: int, generator: torch.Generator) -> torch.Tensor:
        return draw(batch, past, query, generator).transpose(0, 1).contiguous()

    return transposed


def second(outputs: Any) -> Any:
    return outputs[1]


def calls(
    new: Draw,
    *,
    cache: str | None = None,
    take: Callable[[Any], Any] = second,
    first: Any = None,
    name: str | None = None,
    also: Callable[[int, int, int, torch.Generator], dict[str, Any]] | None = None,
) -> dict[str, Prefill | Step]:
    """`prefill` and `step` of a model called as most are: new inputs, and the cache beside them.

    Args:
      new: Draws the inputs that each call adds.
      cache: The cache's keyword; None where it is passed by position, after the new inputs.
      take: Finds the cache in the outputs.
      first: What the first call passes as the cache; None leaves it out.
      name: The keyword of the new inputs; None where they are passed by position.
      also: Further keywords of every call, for a batch, a past length and a query length.
    """

    def call(passed: Any, batch: int, past: int, query: int, generator: torch.Generator) -> Call:
        drawn = new(batch, past, query, generator)
        args = () if name else (drawn,)
        kwargs = {name: drawn} if name else {}
        if also is not None:
            kwargs.update(also(batch, past, query, generator))
        if passed is not None:
            if cache is None:
                args = (*args, passed)
            else:
                kwargs[cache] = passed
        return args, kwargs

    def prefill(batch: int, query: int, generator: torch.Generator) -> Call:
        return call(first, batch, 0, query, generator)

    def step(outputs: Any, batch: int, past: int, query: int, generator: torch.Generator) -> Call:
        return call(take(outputs), batch, past, query, generator)

    return {"prefill": prefill, "step": step}


def attention_mask(batch: int, past: int, query: int) -> torch.Tensor:
    """A padding mask of length past + query: each row but the first has one dropped position.

    The dropped position is never a row's first, so that each token sees something.
    """
    mask = torch.ones(batch, LONGEST, dtype=torch.long)
    for row in range(1, batch):
        mask[row, row] = 0
    return mask[:, : past + query]


def left_padding(batch: int, past: int, query: int) -> torch.Tensor:
    """A padding mask of length past + query: row `b` starts with `b` padded positions."""
    mask = torch.ones(batch, LONGEST, dtype=torch.long)
    for row in range(1, batch):
        mask[row, :row] = 0
    return mask[:, : past + query]
