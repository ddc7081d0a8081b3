"""The one graph with another kind of cache: ``"attention"`` or ``"shared"``.

``"attention"``: a join and the attention that reads it become ONNX's ``Attention`` with a past and
a present. ``"shared"``: the past and the present of a slot are one buffer of a fixed capacity, into
which each call writes its new rows; nothing is copied. `shared.py` writes that.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from cachefree.onnx.attention.layout import Layout
from cachefree.onnx.attention.masking import (
    check_fills,
    lowest_kept,
    mask_of,
    with_blank_rows,
)
from cachefree.onnx.attention.operators import onnx_node
from cachefree.onnx.attention.seeing import Sight, sight_of
from cachefree.onnx.attention.site import NoSiteError, Site, joins_of, sites_of
from cachefree.onnx.attention.values import Shapes, SizeNodes
from cachefree.sizes import size_symbol
from cachefree.spec import Interface

__all__ = ["KV", "KvGraph", "KvReport", "Writing", "with_attention"]

log = logging.getLogger(__name__)
aten = torch.ops.aten
KV = Literal["concat", "attention", "shared"]
_CONSTANTS: dict[Any, Any] = {
    aten.new_ones.default: aten.ones.default, aten.new_zeros.default: aten.zeros.default,
    aten.ones_like.default: aten.ones.default, aten.zeros_like.default: aten.zeros.default,
    aten.new_full.default: aten.full.default, aten.full_like.default: aten.full.default,
}  # fmt: skip


@dataclass
class KvReport:
    """What became of each slot of the cache.

    Attributes:
        kind: What was asked for.
        kernels: Path of a slot → the operator that holds it.
        reasons: Path of a slot → why it is joined by ``Concat``.
    """

    kind: str
    kernels: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for kernel in self.kernels.values():
            counts[kernel] = counts.get(kernel, 0) + 1
        lines = [f"{count} slots: {kernel}" for kernel, count in counts.items()]
        lines += [f"{slot}: Concat, since {reason}" for slot, reason in self.reasons.items()]
        return "\n".join([f'kv="{self.kind}"', *lines])


@dataclass
class KvGraph:
    """A graph and its interface after the change.

    Attributes:
        module: The graph; parameters are shared with the model.
        interface: Its inputs and outputs.
        report: What became of each slot.
        layouts: Place of a slot that is a buffer → how the model lays it out.
        rows_apart: Whether several rows of a batch with a past and several new tokens have to be
            run one by one.
    """

    module: fx.GraphModule
    interface: Interface
    report: KvReport
    layouts: dict[int, Layout] = field(default_factory=dict)
    rows_apart: bool = False


class Writing:
    """A copy of the one graph that is being changed.

    Attributes:
        module: The copy.
        graph: Its graph.
        interface: Its interface.
        sizes: Nodes of sizes.
        report: What became of each slot.
    """

    def __init__(self, module: fx.GraphModule, interface: Interface, kind: str) -> None:
        self.graph = copy.deepcopy(module.graph)
        self.module = fx.GraphModule(module, self.graph)
        self.graph = self.module.graph
        self.interface = interface
        self.report = KvReport(kind)
        self.shapes = Shapes(self.module, interface)
        self.sizes = SizeNodes(self.graph, interface)
        self._read_no_shapes()

    def _read_no_shapes(self) -> None:
        """Makes constants of a tensor's shape from the sizes themselves: nothing reads it then."""
        for node in list(self.graph.nodes):
            made = _CONSTANTS.get(node.target)
            if made is None:
                continue
            fill = node.args[-1] if made is aten.full.default else None
            sizes = [self.sizes.node(size) for size in self.shapes.of(node)]
            options = {"dtype": self.shapes.dtype(node), "device": self.shapes.value(node).device}
            args = (sizes,) if fill is None else (sizes, fill)
            with self.graph.inserting_before(node):
                node.replace_all_uses_with(self.graph.call_function(made, args, options))
            self.graph.erase_node(node)

    def sites(self) -> list[Site]:
        """The attentions that can be written as one operator; the reasons for all other slots."""
        joins = joins_of(self.module, self.interface)
        reasons: dict[str, str] = {}
        sites = []
        for node, found in sites_of(self.module, self.interface, joins, self.shapes):
            if isinstance(found, Site):
                sites.append(found)
            else:
                log.debug("%s: %s", node, found)
                for join in joins.values():
                    if _reads(node, join.node):
                        reasons.setdefault(join.slot.past.path, str(found))
        self._refuse_twice(sites, reasons)
        taken = {join.node for site in sites for join in (site.keys, site.values)}
        known = {join.slot.past.path for join in joins.values()}
        for slot in self.interface.cache:
            path = slot.past.path
            if not any(join.slot is slot and join.node in taken for join in joins.values()):
                default = (
                    "no attention reads it as keys and values"
                    if path in known
                    else "it is no join of what is past with what is new"
                )
                self.report.reasons[path] = reasons.get(path, default)
        return sites

    def _refuse_twice(self, sites: list[Site], reasons: dict[str, str]) -> None:
        for site in list(sites):
            mine = {site.keys.node, site.values.node}
            if any(
                mine & {other.keys.node, other.values.node} for other in sites if other is not site
            ):
                for join in (site.keys, site.values):
                    reasons[join.slot.past.path] = "several attentions read it"
                sites.remove(site)

    def refuse(self, site: Site, reason: str) -> None:
        """Leaves an attention as it is."""
        for join in (site.keys, site.values):
            self.report.reasons[join.slot.past.path] = reason

    def mask(self, site: Site) -> tuple[fx.Node | None, Sight]:
        """The mask of a site, written before its result, and what was shown of it."""
        dtype = self.shapes.dtype(site.query)
        check_fills(site, dtype)
        with self.graph.inserting_before(site.result):
            mask = mask_of(site, self.graph, self.sizes, self.shapes, dtype)
        if mask is None:
            return None, Sight(sees_itself=True)
        past = site.keys.slot.past.shape[site.keys.slot.growing_axes[0]]
        sight = sight_of(mask, self.interface, self.shapes, past)
        if self.shapes.dtype(mask) != dtype:
            raise NoSiteError(f"its mask is {self.shapes.dtype(mask)}")
        return mask, sight

    def kept_low(self, site: Site, mask: fx.Node, sight: Sight) -> fx.Node:
        """A mask whose rows that see nothing come out as they do in the model."""
        if sight.sees_itself or all(step.kind in ("keep", "fill") and step.number == float("-inf")
                                    for step in site.steps):  # fmt: skip
            return mask
        if self.shapes.dtype(mask) != torch.float32:
            raise NoSiteError("a row of it may see nothing, and its mask is not float32")
        return lowest_kept(self.graph, mask)

    def replace(self, site: Site, result: fx.Node, presents: Iterable[fx.Node]) -> None:
        """Puts an operator's results in the places of an attention's."""
        site.result.replace_all_uses_with(result)
        for join, present in zip((site.keys, site.values), presents, strict=True):
            output = next(node for node in self.graph.nodes if node.op == "output")
            output.replace_input_with(join.node, present)

    def finish(self) -> None:
        """Removes what nothing reads any more."""
        # a dropout that is off counts as random, and would keep all before it
        self.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        self.graph.lint()
        self.module.recompile()


def with_attention(module: fx.GraphModule, interface: Interface) -> KvGraph:
    """Writes joins and attentions as ``Attention`` with a past and a present (opset 23 on).

    Args:
        module: The one graph.
        interface: Its inputs and outputs.
    """
    writing = Writing(module, interface, "attention")
    for site in writing.sites():
        try:
            if not (site.key_layout.is_plain and site.value_layout.is_plain):
                raise NoSiteError("its rows are not (batch, heads, rows, size) in memory")
            if writing.shapes.dtype(site.query) not in (torch.float32, torch.float16):
                raise NoSiteError(f"Attention computes in float32, and it is in "
                                  f"{writing.shapes.dtype(site.query)}")  # fmt: skip
            _write_attention(writing, site)
        except NoSiteError as error:
            writing.refuse(site, str(error))
            continue
        for join in (site.keys, site.values):
            writing.report.kernels[join.slot.past.path] = "Attention"
    writing.finish()
    for path, reason in writing.report.reasons.items():
        log.info("%s is joined by Concat: %s", path, reason)
    return KvGraph(writing.module, interface, writing.report)


def _write_attention(writing: Writing, site: Site) -> None:
    mask, sight = writing.mask(site)
    graph, dtype = writing.graph, writing.shapes.dtype(site.query)
    with graph.inserting_before(site.result):
        if mask is not None:
            mask = writing.kept_low(site, mask, sight)
        plain = Plain(writing, site)
        bias = None if mask is None else plain.whole_rows(mask)
        inputs = [
            plain.query(), plain.rows(site.keys.new, site.key_layout),
            plain.rows(site.values.new, site.value_layout), bias,
            plain.rows(site.keys.past, site.key_layout),
            plain.rows(site.values.past, site.value_layout),
        ]  # fmt: skip
        present = (dtype, plain.present())
        result, keys, values = onnx_node(
            graph, "Attention", inputs, [(dtype, plain.result()), present, present],
            plain.attributes(),
        )  # fmt: skip
        if mask is not None and not site.is_safe and not sight.sees_itself:
            result = with_blank_rows(graph, mask, result, dtype)
        result = plain.as_result(result)
        presents = [
            plain.as_slot(keys, site.keys.slot.present.shape, site.key_layout),
            plain.as_slot(values, site.values.slot.present.shape, site.value_layout),
        ]
    writing.replace(site, result, presents)


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
            place = layout.roles.index("bk" if "bk" in layout.roles else "b")
            shape[place : place + 1] = [self.batch, layout.heads]
            if "bk" not in layout.roles:
                shape = [self.batch if r == "b" else 1 if r == "k" else s for r, s in zip(
                    layout.apart, _spread(self.writing.shapes.of(node), layout), strict=True)]  # fmt: skip
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


def _spread(shape: tuple[Any, ...], layout: Layout) -> list[Any]:
    """A shape without an axis of heads, with one."""
    known = dict(zip(layout.roles, shape, strict=True))
    return [known.get(role, 1) for role in layout.apart]


def _reads(node: fx.Node, wanted: fx.Node) -> bool:
    """Whether an operand of a node is made from another by views."""
    pending, seen = list(node.all_input_nodes), set()
    while pending:
        other = pending.pop()
        if other is wanted:
            return True
        if other not in seen and len(seen) < 12:
            seen.add(other)
            pending += other.all_input_nodes
    return False

