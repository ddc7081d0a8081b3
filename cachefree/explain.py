"""What `rewrite` would do with a model, or why it would not, without handing back a module."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from torch import nn

from cachefree.advice import changes_for
from cachefree.branches import removed_branches
from cachefree.discover import Carry, Discovery
from cachefree.errors import CacheFreeError
from cachefree.example_sizes import capture_where_it_runs
from cachefree.explanation import Explanation
from cachefree.isolation import one_at_a_time
from cachefree.lifting.subject import find_subject
from cachefree.outlines import outline
from cachefree.report import Branch, Outline
from cachefree.rewrite import rewrite
from cachefree.sizes import symbols_of

__all__ = ["explain"]

log = logging.getLogger(__name__)


@one_at_a_time
def explain(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    cache: str | Sequence[str] | None = None,
    carry: Carry | None = None,
    method: str | tuple[str, str] = "forward",
    progress: bool | None = None,
) -> Explanation:
    """Says what differs between a model's paths and what would be done about it.

    For a model that would be refused: why, at which line of its code, and the smallest change of
    that code with which it would go, where one is known. The arguments are those of
    `cachefree.rewrite`; nothing is raised where that would refuse.

    Args:
        model: Any ``nn.Module``.
        example_inputs: Inputs of a first call, or None.
        cache: Name or names of the arguments that carry the cache, or None.
        carry: ``(outputs, inputs) → later inputs``, or None.
        method: The method that is called; two where the first call has one of its own.
        progress: Whether to show a progress bar.

    Returns:
        The explanation: text with ``print``, a page in a notebook, plain values with ``as_dict``.

    Example:
        >>> class Noisy(torch.nn.Module):
        ...     def forward(self, x, past=None):
        ...         k = x if past is None else torch.cat([past, x], dim=1)
        ...         return x + torch.nn.functional.dropout(x, 0.5), k
        >>> found = cachefree.explain(Noisy().eval(), (torch.zeros(2, 5, 3),))
        >>> found.is_rewritable, found.error
        (False, 'CaptureError')
        >>> found.refusals[0].what
        'The path draws random numbers (aten.dropout.default).'
    """
    started = time.perf_counter()
    options: dict[str, Any] = {"cache": cache, "carry": carry, "method": method}
    name = model.__name__ if isinstance(model, type) else type(model).__name__
    try:
        report = rewrite(model, example_inputs, **options, progress=progress).report
        return Explanation(name, report, outline=report.outline, branches=report.branches)
    except CacheFreeError as error:
        refusal = error
    if not _is_module(model):
        return Explanation(name, None, type(refusal).__name__, refusal.refusals)
    branches, drawn, axes = _seen(model, example_inputs, options)
    changes = changes_for(model, refusal, axes)
    return Explanation(
        name,
        None,
        type(refusal).__name__,
        refusal.refusals,
        changes,
        branches,
        drawn,
        time.perf_counter() - started,
    )


def _is_module(model: object) -> bool:
    return isinstance(model, nn.Module)


def _seen(
    model: nn.Module, example_inputs: Any, options: dict[str, Any]
) -> tuple[tuple[Branch, ...], Outline | None, frozenset[int]]:
    """What can be seen of a refused model: where its paths part, and how its cache grows."""
    try:
        subject, found = find_subject(model, example_inputs, **options)
        axes = frozenset(
            axis
            for place in found.cache_leaves
            for axis, size in enumerate(found.later.tensors[place].shape)
            if any(str(symbol).startswith("past") for symbol in symbols_of([size]))
        )
        branches, drawn = _both_paths(subject, found)
    except Exception as error:  # noqa: BLE001 - it was refused, for a reason that is told
        log.debug("no more to see of a refused model: %s", error)
        return (), None, frozenset()
    return branches, drawn, axes


def _both_paths(subject: nn.Module, found: Discovery) -> tuple[tuple[Branch, ...], Outline]:
    later, _ = capture_where_it_runs(
        subject,
        found.later,
        found.hints,
        found.asked,
        settled=found.first_path.sizes,
    )
    grows = "zero length on the axis that grows"
    branches = removed_branches(found.first_path.jumps, later.jumps, (), grows)
    paths = [found.later.tensors[place].path for place in found.cache_leaves]
    return branches, outline(found.first_path, later, (), paths)
