"""A loop over tokens in a graph: a body that is run for one token after the other.

It is ``torch.ops.higher_order.scan``, which exporters know, where it is captured. Where it runs it
is a loop, without what that operator prepares for each call, and gradients go through it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from cachefree.errors import CacheFreeError, Refusal

__all__ = ["token_scan"]


def token_scan(
    body: Any,
    first: Sequence[Any],
    sources: Sequence[Any],
    outside: Sequence[Any],
    may_be_none: bool = False,
) -> tuple[Any, ...]:
    """Runs a body for one token after the other.

    Args:
        body: ``(*carried, *rows, *outside) → (*carried, *given)``.
        first: What is carried to the first token.
        sources: Tensors that have the tokens along axis 0; each round takes one row.
        outside: What every round takes as it is.
        may_be_none: Whether there may be no tokens, which torch's operator does not take.

    Returns:
        What is carried after the last token, and what all rounds gave, along axis 0.

    Raises:
        CacheFreeError: while ``torch.jit.trace`` records, which keeps no loop.
    """
    given = (*first, *sources, *outside)
    proxy = next((value for value in given if isinstance(value, fx.Proxy)), None)
    if proxy is not None:
        args = (body, list(first), list(sources), tuple(outside), may_be_none)
        made: Any = proxy.tracer.create_proxy("call_function", token_scan, args, {})
        return made  # type: ignore[no-any-return]
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise CacheFreeError(
            Refusal(
                "torch.jit.trace cannot record the graph's loop over the tokens.",
                why="It writes down the rounds that it sees, so that the result would be right for "
                "the example's number of tokens only.",
                remedy="Export with cachefree.to_onnx, torch.onnx.export or torch.export.export.",
            )
        )
    is_plain = (
        bool(sources)
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch.compiler.is_compiling()
        and not any(torch._C._functorch.is_functorch_wrapped_tensor(value) for value in given)
    )
    if not is_plain and may_be_none and sources:
        return _with_spare_round(body, first, sources, outside)
    if not is_plain:
        results: tuple[Any, ...] = torch.ops.higher_order.scan(
            body, list(first), list(sources), tuple(outside)
        )
        return results
    return _run(body, first, sources, outside)


def _with_spare_round(
    body: Any, first: Sequence[Any], sources: Sequence[Any], outside: Sequence[Any]
) -> tuple[Any, ...]:
    """The loop with one more round at its end, which hands on what it is given."""
    count, kept = sources[0].shape[0], len(first)
    rows = [F.pad(source, _one_more(source.dim())) for source in sources]
    is_token = F.pad(sources[0].new_ones(count, dtype=torch.int64), (0, 1)) > 0

    def spare(*values: Any) -> tuple[Any, ...]:
        place = kept + len(rows)
        results = body(*values[:place], *values[place + 1 :])
        carried = [
            torch.where(values[place], new, old)
            for new, old in zip(results[:kept], values[:kept], strict=True)
        ]
        return (*carried, *results[kept:])

    results = torch.ops.higher_order.scan(spare, list(first), [*rows, is_token], tuple(outside))
    return (*results[:kept], *(value[:count] for value in results[kept:]))


def _one_more(rank: int) -> tuple[int, ...]:
    """How one row more along axis 0 is said to ``pad``."""
    return (*(0,) * (2 * rank - 1), 1)


def _run(
    body: Any,
    first: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    outside: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    carried, kept = tuple(first), len(first)
    given: list[tuple[torch.Tensor, ...]] = []
    for rows in zip(*(source.unbind(0) for source in sources), strict=True):
        results = body(*itertools.chain(carried, rows, outside))
        carried = results[:kept]
        given.append(results[kept:])
    if not given:
        zeros = [source.new_zeros(source.shape[1:]) for source in sources]
        like = body(*itertools.chain(carried, zeros, outside))[kept:]
        return (*carried, *(value.new_empty((0, *value.shape)) for value in like))
    return (*carried, *(torch.stack(values) for values in zip(*given, strict=True)))
