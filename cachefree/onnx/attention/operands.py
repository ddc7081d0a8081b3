"""The operands of an attention in the shapes that ONNX's operators take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from cachefree.onnx.attention.editing import Writing
from cachefree.onnx.attention.layout import Layout
from cachefree.onnx.attention.site import Site
from cachefree.sizes import size_symbol

__all__ = ["Plain", "expanded"]

aten = torch.ops.aten


class Plain:
    """The operands of a site as (B, H, S, D) and (B, K, P, D)."""

    def __init__(self, writing: Writing, site: Site) -> None:
        self.writing = writing
        self.site = site
        self.graph = writing.graph
        self.sizes = writing.sizes
        slot = site.keys.slot
        self.size = int(slot.past.shape[site.key_layout.roles.index("d")])
        self.length = slot.present.shape[slot.growing_axes[0]]
        shape = writing.shapes.of(site.query)
        self.tokens = shape[-2]
        self.batch = size_symbol("batch")

    def shaped(self, node: fx.Node, shape: Iterable[Any]) -> fx.Node:
        """A node in another shape."""
        sizes = [self.sizes.node(size) for size in shape]
        return self.graph.call_function(aten.reshape.default, (node, sizes))

    def query(self) -> fx.Node:
        """(B, H, S, D)."""
        shape = (self.batch, self.site.heads, self.tokens, self.size)
        if self.writing.shapes.of(self.site.query) == shape:
            return self.site.query
        return self.shaped(self.site.query, shape)

    def rows(self, node: fx.Node, layout: Layout) -> fx.Node:
        """A slot's rows as (B, K, n, D)."""
        shape = list(self.writing.shapes.of(node))
        if len(shape) == 3:
            known = {**dict(zip(layout.roles, shape, strict=True)), "b": self.batch}
            shape = [known.get(role, layout.heads) for role in layout.apart]
            node = self.shaped(node, shape)
        if layout.order == (0, 1, 2, 3):
            return node
        return self.graph.call_function(aten.permute.default, (node, list(layout.order)))

    def as_slot(self, node: fx.Node, shape: Iterable[Any], layout: Layout) -> fx.Node:
        """(B, K, n, D) as the model has it; the layout is plain."""
        return node if len(layout.roles) == 4 else self.shaped(node, shape)

    def present(self) -> list[Any]:
        """The sizes of a present."""
        shape = (self.batch, self.site.key_layout.heads, self.length, self.size)
        return [self.sizes.node(size) for size in shape]

    def result(self) -> list[Any]:
        """The sizes of the result, (B, H, S, D)."""
        shape = (self.batch, self.site.heads, self.tokens, self.size)
        return [self.sizes.node(size) for size in shape]

    def as_result(self, node: fx.Node) -> fx.Node:
        """(B, H, S, D) in the shape of the site's result."""
        shape = self.writing.shapes.of(self.site.result)
        return node if len(shape) == 4 else self.shaped(node, shape)

    def whole_rows(self, mask: fx.Node) -> fx.Node:
        """A mask as (B or 1, H or 1, S, T)."""
        return expanded(self.writing, mask, self.tokens, self.length)

    def attributes(self) -> dict[str, float | int]:
        """Scale, soft-capping."""
        site = self.site
        found: dict[str, float | int] = {"scale": float(site.scale)}
        if site.softcap:
            found["softcap"] = float(site.softcap)
        return found


def expanded(writing: Writing, mask: fx.Node, tokens: Any, length: Any) -> fx.Node:
    """A mask with S rows and T keys of its own, four axes in all."""
    shape = writing.shapes.of(mask)
    lead = (1,) * (4 - len(shape))
    whole = [*lead, *shape[: max(0, len(shape) - 2)]]
    whole = [*whole, *([1] * (2 - len(whole)))][:2]
    sizes = [writing.sizes.node(size) for size in (*whole, tokens, length)]
    return writing.graph.call_function(aten.expand.default, (mask, sizes))
