"""The model's own argument for what its encoder gives, found by what the model does with it."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from cachefree.align import compare
from cachefree.capture import Call, TensorSpec, capture
from cachefree.discover import Discovery
from cachefree.encoder import Encoder
from cachefree.errors import CacheFreeError
from cachefree.facts import Facts
from cachefree.reading import Program, read
from cachefree.sizes import symbols_of
from cachefree.structure import flatten, leaf_paths
from cachefree.terms import Table

__all__ = ["states_argument"]

log = logging.getLogger(__name__)
_NAMES = re.compile(r"enc|memory|context|states")


def states_argument(
    model: nn.Module,
    table: Table,
    names: dict[int, str],
    discovery: Discovery,
    first: Program,
    encoder: Encoder,
    dropped: Sequence[str],
) -> str:
    """The argument with which the model skips its encoder; empty where none is shown to do so.

    With the encoder's output given there, in a tuple or as it is, and without the arguments that
    only the encoder reads, the model's path has to be the one that it takes with them.
    """
    for name in discovery.absent:
        if not _NAMES.search(name):
            continue
        for call, path in _calls(model, discovery, encoder, dropped, name):
            try:
                program = read(capture(model, call, discovery.hints), table, names)
            except CacheFreeError as error:
                log.debug("the model does not take its encoder's output at %s: %s", name, error)
                continue
            if len(program.outputs) != len(first.outputs):
                continue
            sizes = symbols_of(size for leaf in call.tensors for size in leaf.shape)
            facts = Facts(tuple(size >= 1 for size in sizes))
            inputs = {path: encoder.output}
            if compare(table, program.outputs, first.outputs, facts, {}, inputs).is_equal:
                return name
    return ""


def _calls(
    model: nn.Module,
    discovery: Discovery,
    encoder: Encoder,
    dropped: Sequence[str],
    name: str,
) -> Iterator[tuple[Call, str]]:
    """First calls with the encoder's output at an argument, and its path there."""
    args, kwargs = discovery.first.structure.rebuild(list(discovery.first.leaves))
    bound = inspect.signature(model.forward).bind_partial(*args, **kwargs)
    named = {key: value for key, value in bound.arguments.items() if key not in dropped}
    extra = named.pop("kwargs", {})
    states = encoder.states
    assert states.dtype is not None
    spec = TensorSpec(name, states.sizes, states.dtype, states.device or torch.device("cpu"))
    for value in ((spec,), spec):
        leaves, structure = flatten(((), {**named, **extra, name: value}), _is_spec)
        paths = leaf_paths(structure, "")
        fixed = []
        for leaf, path in zip(leaves, paths, strict=True):
            own = leaf is spec
            fixed.append(TensorSpec(path, leaf.shape, leaf.dtype, leaf.device) if own else leaf)
        where = next(p for leaf, p in zip(leaves, paths, strict=True) if leaf is spec)
        yield Call(structure, tuple(fixed)), where


def _is_spec(value: Any) -> bool:
    return not isinstance(value, (tuple, list, dict)) and hasattr(value, "path")
