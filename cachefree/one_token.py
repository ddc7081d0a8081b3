"""First paths that loop over the tokens where later ones take one token: the loop is both.

Before: ``if state is None: for t in range(n): y, h = step(x[:, t], h)``, ``else: step(x[:, 0],
state)``.

After: the loop, from the cache.

Why equal: from the neutral value it is the first path. A loop over one token is its body, which is
compared with the later path. For more tokens than one the model says nothing, and neither does the
domain.

Some later paths take more tokens and start their loop anew, as if there were no state. There the
rest of such a path is kept, and its loop starts from the cache too; the domain has one token only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import sympy
import torch
from torch import nn

from cachefree.calls import SizeSpec, TensorSpec
from cachefree.capture import capture
from cachefree.discover import Discovery
from cachefree.errors import Refusal, SourceLine, UnsupportedBranchError
from cachefree.reading import Program, read
from cachefree.rules import replaced
from cachefree.sizes import size_symbol, substitute
from cachefree.terms import SCAN, Table, Term, topological
from cachefree.write_once import OneCall

__all__ = ["ONE_TOKEN", "of_one_token", "with_cache_carried", "with_unread_carried"]

ONE_TOKEN: Mapping[sympy.Symbol, int] = {size_symbol("query"): 1}


def of_one_token(
    model: nn.Module, table: Table, names: dict[int, str], discovery: Discovery
) -> Program:
    """The later path for one token, captured at that size."""
    leaves = tuple(
        replace(leaf, shape=tuple(substitute(size, ONE_TOKEN) for size in leaf.shape))
        if isinstance(leaf, TensorSpec)
        else SizeSpec(leaf.path, substitute(leaf.expr, ONE_TOKEN))
        for leaf in discovery.later.leaves
    )
    hints = {name: size for name, size in discovery.hints.items() if name != "query"}
    return read(capture(model, replace(discovery.later, leaves=leaves), hints), table, names)


def with_cache_carried(table: Table, discovery: Discovery, first: Program) -> OneCall:
    """The first path with its loops started from the cache.

    Raises:
        UnsupportedBranchError: a tensor of the cache is none that a loop carries.
    """
    inputs = tuple(
        table.input(spec.path, spec.shape, spec.dtype, spec.device)
        for spec in discovery.later.tensors
    )
    starts: dict[tuple[Term, int], Term] = {}
    for place, output in zip(discovery.cache_leaves, discovery.carried, strict=True):
        value, past = _uncopied(first.outputs[output]), inputs[place]
        if not _is_carried(value):
            raise _not_carried(str(past.args[0]), value.line)
        if value.sizes != past.sizes or (value.args[0], value.args[1]) in starts:
            raise _not_carried(str(past.args[0]), value.line)
        starts[value.args[0], value.args[1]] = past
    return OneCall(discovery.later, inputs, _started(table, first.outputs, starts), {})


def with_unread_carried(table: Table, discovery: Discovery, later: Program) -> OneCall:
    """A later path whose loops start from those tensors of the cache that it does not read.

    Raises:
        UnsupportedBranchError: there is no such tensor, or no loop carries it.
    """
    read_by_it = set(topological(later.outputs))
    starts: dict[tuple[Term, int], Term] = {}
    for place, output in zip(discovery.cache_leaves, discovery.carried, strict=True):
        value, past = _uncopied(later.outputs[output]), later.inputs[place]
        if past in read_by_it:
            continue
        if not _is_carried(value) or value.sizes != past.sizes:
            raise _not_carried(str(past.args[0]), value.line)
        starts[value.args[0], value.args[1]] = past
    if not starts:
        raise _not_carried("that the later path leaves unread", None)
    return OneCall(discovery.later, later.inputs, _started(table, later.outputs, starts), {})


def _uncopied(value: Term) -> Term:
    """What is written to a state in place is a copy of what the loop has carried."""
    while value.op is torch.ops.aten.clone.default:
        value = value.args[0]
    return value


def _is_carried(value: Term) -> bool:
    """Whether a value is what a loop over the tokens has carried to its end."""
    if value.op != "item" or value.args[0].op != SCAN:
        return False
    return bool(value.args[1] < len(value.args[0].args[1]))


def _started(
    table: Table, outputs: tuple[Term, ...], starts: Mapping[tuple[Term, int], Term]
) -> tuple[Term, ...]:
    """The outputs with some of what loops carry started otherwise: by loop and place."""
    edits: dict[Term, Term] = {}
    for scan in topological(outputs):
        if scan.op == SCAN:
            begins = tuple(starts.get((scan, at), old) for at, old in enumerate(scan.args[2]))
            edits[scan] = table.like(scan, SCAN, (*scan.args[:2], begins, *scan.args[3:]))
    return replaced(table, outputs, edits)


def _not_carried(path: str, where: SourceLine | None) -> UnsupportedBranchError:
    return UnsupportedBranchError(
        Refusal(
            f"The cache {path} is none that the first call's loop over the tokens carries.",
            why="The later path takes one token, and the loop over them could start from the cache "
            "only if it carried all of it.",
            remedy="Let later calls go through the first path too, from the state that is given.",
            where=where,
        )
    )
