"""What the integers of a model's inputs may be.

The sizes of the tables that they are looked up in.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

__all__ = ["vocabulary_sizes"]

aten = torch.ops.aten

_KEEPS_VALUES = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.default,
    aten.transpose.int,
    aten.permute.default,
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.to.dtype,
    aten.to.device,
    aten._to_copy.default,
}


def vocabulary_sizes(module: fx.GraphModule) -> tuple[int | None, ...]:
    """The number of rows of the smallest table that each input is looked up in.

    Follows an input through operators that only move its values (views, slices, casts) to the
    embeddings that it feeds.

    Args:
        module: A graph of ATen operators over flat tensors.

    Returns:
        For each placeholder V, where its ids must be in ``[0, V)``; None where it is not looked up.
    """
    sizes: list[int | None] = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            rows = [_rows(module, use) for value in _carriers(node) for use in _lookups(value)]
            sizes.append(min(rows) if rows else None)
    return tuple(sizes)


def _carriers(node: fx.Node) -> Iterator[fx.Node]:
    """The node, and every node that holds the same values in another shape."""
    pending, seen = [node], {node}
    while pending:
        value = pending.pop()
        yield value
        for user in value.users:
            if user.target in _KEEPS_VALUES and user.args[0] is value and user not in seen:
                seen.add(user)
                pending.append(user)


def _lookups(value: fx.Node) -> Iterator[fx.Node]:
    for user in value.users:
        is_indexed = user.target is aten.embedding.default and user.args[1] is value
        is_selected = user.target is aten.index_select.default and user.args[2] is value
        if (
            is_indexed
            or is_selected
            or (user.target is aten.index.Tensor and _indexes_rows(user, value))
        ):
            yield user


def _indexes_rows(node: fx.Node, value: fx.Node) -> bool:
    indices = node.args[1]
    return isinstance(indices, (list, tuple)) and len(indices) > 0 and indices[0] is value


def _rows(module: fx.GraphModule, lookup: fx.Node) -> int:
    table = lookup.args[0]
    axis = lookup.args[1] if lookup.target is aten.index_select.default else 0
    if isinstance(table, fx.Node) and table.op == "get_attr" and isinstance(axis, int):
        tensor: torch.Tensor = _attribute(module, str(table.target))
        return int(tensor.shape[axis])
    return 2  # a table that is computed: it has at least the rows that masks and flags need


def _attribute(module: torch.nn.Module, path: str) -> torch.Tensor:
    value: object = module
    for name in path.split("."):
        value = getattr(value, name)
    assert isinstance(value, torch.Tensor)
    return value
