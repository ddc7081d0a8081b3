"""Attention found in the one graph: what it reads, what it does to the scores, what it gives.

Nothing is told by names. A product whose second operand is a view of a join is followed, operator
by operator, to the product with a view of another join; each operator on the way is one of those
below or the attention is left as it is, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from cachefree.onnx.attention.chain import PRODUCTS, Chain, MaskStep, NoSiteError
from cachefree.onnx.attention.layout import Layout
from cachefree.onnx.attention.prepare import follows_softmax
from cachefree.onnx.attention.values import Shapes, product
from cachefree.onnx.attention.views import Join, Operand, layout_of, traced
from cachefree.sizes import size_symbol
from cachefree.spec import Interface

__all__ = ["Site", "joins_of", "sites_of"]

aten = torch.ops.aten
_BATCH = size_symbol("batch")
_ATTENTION = (
    "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"
)  # fmt: skip


@dataclass
class Site:
    """An attention over a cache.

    Attributes:
        keys: The join of the keys.
        values: The join of the values.
        key_layout: How the keys lie.
        value_layout: How the values lie.
        query: The operand with the queries: leading sizes whose product is B · H, then S and D.
        result: The node that the attention computes: the same, with D.
        heads: H.
        scale: What the products are multiplied by.
        softcap: c of ``c · tanh(x / c)``; 0 for none.
        steps: What is done to the scores, in order.
        is_safe: Whether a row that sees nothing gives zeros, as torch's own attention does; else it
            gives what a softmax does.
    """

    keys: Join
    values: Join
    key_layout: Layout
    value_layout: Layout
    query: fx.Node
    result: fx.Node
    heads: int
    scale: float = 1.0
    softcap: float = 0.0
    steps: list[MaskStep] = field(default_factory=list)
    is_safe: bool = False


def joins_of(module: fx.GraphModule, interface: Interface) -> dict[fx.Node, Join]:
    """The slots that are a join of what is past with what is new, by the node of the join."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    by_name = dict(zip((spec.name for spec in interface.inputs), placeholders, strict=True))
    output = next(node for node in module.graph.nodes if node.op == "output")
    returned: Any = output.args[0]
    results = dict(zip((spec.name for spec in interface.outputs), returned, strict=True))
    found = {}
    for place, slot in enumerate(interface.cache):
        past, node = by_name[slot.past.name], results[slot.present.name]
        assert isinstance(node, fx.Node)
        if node.target is not aten.cat.default or len(slot.growing_axes) != 1:
            continue
        args: tuple[Any, ...] = (*node.args, node.kwargs.get("dim", 0))
        parts, axis = args[0], args[1] % len(slot.past.shape)
        if len(parts) == 2 and parts[0] is past and axis == slot.growing_axes[0]:
            found[node] = Join(slot, node, past, parts[1], place)
    return found


def sites_of(
    module: fx.GraphModule, interface: Interface, joins: Mapping[fx.Node, Join], shapes: Shapes
) -> Iterator[tuple[fx.Node, Site | NoSiteError]]:
    """Each operator that may be the beginning of an attention over the cache, with what it is."""
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        is_whole = node.target is aten.scaled_dot_product_attention.default
        is_product = node.target in PRODUCTS or node.target is aten.baddbmm.default
        if not is_whole and not is_product:
            continue
        keys = traced(node.args[2 if node.target is aten.baddbmm.default else 1], joins)
        if keys is None:
            continue
        finder = _Finder(interface, joins, shapes)
        try:
            site = finder.whole(node, keys) if is_whole else finder.parts(node, keys)
            if site is not None:
                _check_private(site, module)
                yield node, site
        except NoSiteError as error:
            if not follows_softmax(node.args[0]):
                yield node, error


class _Finder:
    def __init__(self, interface: Interface, joins: Mapping[fx.Node, Join], shapes: Shapes) -> None:
        self.interface = interface
        self.joins = joins
        self.shapes = shapes

    def whole(self, node: fx.Node, keys: Operand) -> Site:
        """Torch's own attention."""
        given: dict[str, Any] = {**dict(zip(_ATTENTION, node.args, strict=False)), **node.kwargs}
        query, mask, scale = given["query"], given.get("attn_mask"), given.get("scale")
        is_grouped = given.get("enable_gqa")
        values = self._traced(given["value"])
        shape = self.shapes.of(query)
        if len(shape) != 4 or given.get("dropout_p"):
            raise NoSiteError("its queries have no axis of heads")
        heads = self._heads(shape[:-2])
        own = self._heads(self.shapes.of(keys.node)[:-2]) if is_grouped else heads
        site = self._site(keys, values, query, node, heads, own, shape[:-2], is_transposed=False)
        site.is_safe = True
        site.scale = (scale if scale is not None else 1 / math.sqrt(int(shape[-1]))) * keys.factor
        if given.get("is_causal"):
            site.steps.append(MaskStep("triangle", lead=shape[:-2]))
        if mask is not None:
            kind: Any = "keep" if self.shapes.dtype(mask) == torch.bool else "add"
            site.steps.append(MaskStep(kind, mask, -math.inf, shape[:-2]))
        return site

    def parts(self, node: fx.Node, keys: Operand) -> Site | None:
        """A product, what is done to it, a softmax and another product."""
        query: Any = node.args[1 if node.target is aten.baddbmm.default else 0]
        shape = self.shapes.of(node)
        if len(shape) < 3 or not self.shapes.is_tensor(query):
            return None
        heads = self._heads(shape[:-2])
        chain = Chain(self.shapes, node)
        chain.scores(keys.factor)
        product_node, values_operand = chain.weights()
        values = self._traced(values_operand)
        lead = self.shapes.of(product_node)[:-2]
        if self._heads(lead) != heads:
            raise NoSiteError("its products have different numbers of heads")
        site = self._site(
            keys, values, query, product_node, heads, heads, shape[:-2],
            is_transposed=True, value_lead=lead,
        )  # fmt: skip
        site.scale, site.softcap, site.steps = chain.scale, chain.softcap, chain.steps
        return site

    def _traced(self, operand: Any) -> Operand:
        values = traced(operand, self.joins)
        if values is None or values.scalings:
            raise NoSiteError("its values are no view of a slot of the cache")
        return values

    def _heads(self, lead: tuple[Any, ...]) -> int:
        heads = sympy.cancel(product(lead) / _BATCH)
        if not heads.is_Integer:
            raise NoSiteError(f"its leading sizes {lead} are not the batch and heads")
        return int(heads)

    def _site(
        self,
        keys: Operand,
        values: Operand,
        query: fx.Node,
        result: fx.Node,
        heads: int,
        own: int,
        lead: tuple[Any, ...],
        *,
        is_transposed: bool,
        value_lead: tuple[Any, ...] | None = None,
    ) -> Site:
        if keys.join is values.join:
            raise NoSiteError("its keys and values are one slot of the cache")
        if heads % own:
            raise NoSiteError(f"{heads} heads are no multiple of {own}")
        leads = (None, None) if own != heads else (lead, value_lead or lead)
        key_layout = layout_of(
            keys, self.interface, own, is_transposed=is_transposed, lead=leads[0]
        )
        value_layout = layout_of(values, self.interface, own, is_transposed=False, lead=leads[1])
        for operand, layout in ((keys, key_layout), (values, value_layout)):
            if layout is None:
                raise NoSiteError(
                    f"{operand.join.slot.past.path} is not read as attention reads keys and values"
                )
        assert key_layout is not None
        assert value_layout is not None
        if key_layout.heads != value_layout.heads:
            raise NoSiteError("its keys and values have different numbers of heads")
        if self._size(keys, key_layout) != self._size(values, value_layout):
            raise NoSiteError("its keys and values have heads of different sizes")
        if math.prod(map(int, (heads,))) and sympy.sympify(self.shapes.of(query)[-1]) != self._size(
            keys, key_layout
        ):
            raise NoSiteError("its queries have heads of another size")
        if self._rows(keys) != self._rows(values):
            raise NoSiteError("its keys and values have different lengths")
        if len({self.shapes.dtype(node) for node in (query, keys.join.node, result)}) > 1:
            raise NoSiteError("its queries and its keys have different dtypes")
        return Site(keys.join, values.join, key_layout, value_layout, query, result, heads)

    def _size(self, operand: Operand, layout: Layout) -> int:
        return int(operand.join.slot.past.shape[layout.roles.index("d")])

    def _rows(self, operand: Operand) -> Any:
        slot = operand.join.slot
        return slot.past.shape[slot.growing_axes[0]]


def _check_private(site: Site, module: fx.GraphModule) -> None:
    """Refuses a site whose joins, scores or weights are read by something else."""
    inner = {site.keys.node, site.values.node}
    pending = list(inner)
    while pending:
        node = pending.pop()
        for user in node.users:
            if user.op == "output" and node not in (site.keys.node, site.values.node):
                raise NoSiteError(f"{node.name} is returned, or its keys are read elsewhere")
            if user.op != "output" and user is not site.result and user not in inner:
                inner.add(user)
                pending.append(user)
    read = [site.query, site.keys.new, site.values.new, *(step.node for step in site.steps)]
    if inner & set(read):
        raise NoSiteError("its queries or its mask are made of its keys or values")
    for join in (site.keys, site.values):
        others = [
            user for user in join.past.users if user is not join.node and user.op != "call_method"
        ]
        if others:
            raise NoSiteError(f"{join.slot.past.path} is read by {others[0].name} too")
