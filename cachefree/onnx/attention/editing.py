"""A copy of the one graph in which attentions are replaced by operators of ONNX."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable

import torch
from torch import fx

from cachefree.onnx.attention.chain import NoSiteError
from cachefree.onnx.attention.kinds import KvReport
from cachefree.onnx.attention.masking import check_fills, lowest_kept, mask_of
from cachefree.onnx.attention.prepare import prepare
from cachefree.onnx.attention.seeing import Sight, sight_of
from cachefree.onnx.attention.site import Site, joins_of, sites_of
from cachefree.onnx.attention.values import Shapes, SizeNodes
from cachefree.spec import Interface

__all__ = ["Writing"]

log = logging.getLogger(__name__)


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
        prepare(self.graph, self.shapes, self.sizes)

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


def _reads(node: fx.Node, wanted: fx.Node) -> bool:
    """Whether an operand of a node is made from another by views."""
    pending, seen = list(node.all_input_nodes), set[fx.Node]()
    while pending:
        other = pending.pop()
        if other is wanted:
            return True
        if other not in seen and len(seen) < 12:
            seen.add(other)
            pending += other.all_input_nodes
    return False
