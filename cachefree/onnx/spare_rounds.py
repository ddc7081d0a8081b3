"""A loop over tokens that may run not even once, with one more round at its end.

``Scan`` takes no sequence without rows. The round that is spare reads zeros, and hands on what is
carried as it is; what it gives besides is cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

__all__ = ["cut_to", "with_spare_round", "with_spare_row"]

aten = torch.ops.aten
Create = Callable[[Any, tuple[Any, ...]], fx.Node]
"""``(operator, arguments) → node``."""


def with_spare_round(body: fx.GraphModule, carried: int, rows: int) -> fx.GraphModule:
    """A body that takes one input more, behind its rows: whether the round is one of a token."""
    graph = fx.Graph()
    inputs = [node for node in body.graph.nodes if node.op == "placeholder"]
    copies: dict[fx.Node, fx.Node] = {}
    for place, node in enumerate(inputs):
        if place == carried + rows:
            is_token = graph.placeholder("is_token")
        copies[node] = graph.placeholder(node.name)
    if len(inputs) == carried + rows:
        is_token = graph.placeholder("is_token")
    results = graph.graph_copy(body.graph, copies)
    assert isinstance(results, (tuple, list))
    held = [
        graph.call_function(aten.where.self, (is_token, new, copies[old]))
        for new, old in zip(results[:carried], inputs[:carried], strict=True)
    ]
    graph.output((*held, *results[carried:]))
    return fx.GraphModule(body, graph)


def with_spare_row(create: Create, sources: Sequence[fx.Node]) -> tuple[list[fx.Node], fx.Node]:
    """What the rounds take, one row more each, and whether a row is a token's; and their count."""
    count = create(aten.sym_size.int, (sources[0], 0))
    padded = [
        create(aten.constant_pad_nd.default, (source, _one_more(source.meta["val"].dim())))
        for source in sources
    ]
    ones = create(aten.full.default, ([count], 1))
    is_token = create(aten.gt.Scalar, (create(aten.constant_pad_nd.default, (ones, [0, 1])), 0))
    return [*padded, is_token], count


def cut_to(create: Create, given: fx.Node, count: fx.Node) -> fx.Node:
    """What the rounds of tokens gave, without that of the spare one."""
    return create(aten.slice.Tensor, (given, 0, 0, count))


def _one_more(rank: int) -> list[int]:
    return [0] * (2 * rank - 1) + [1]
