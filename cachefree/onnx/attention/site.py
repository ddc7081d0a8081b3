"""Attention found in the one graph: what it reads, what it does to the scores, what it gives.

Nothing is told by names. A product whose second operand is a view of a join is followed, operator
by operator, to the product with a view of another join; each operator on the way is one of those
below or the attention is left as it is, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import sympy
import torch
from torch import fx

from cachefree.onnx.attention.layout import Layout
from cachefree.onnx.attention.values import Shapes, product
from cachefree.onnx.attention.views import Join, Operand, layout_of, traced
from cachefree.sizes import size_symbol
from cachefree.spec import Interface

__all__ = ["MaskStep", "NoSiteError", "Site", "joins_of", "sites_of"]

aten = torch.ops.aten
_BATCH = size_symbol("batch")
_PRODUCTS = {aten.matmul.default, aten.bmm.default}
_RESHAPES = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.contiguous.default, aten.clone.default, aten.alias.default,
    aten.detach.default, aten.flatten.using_ints, aten.unflatten.int,
}  # fmt: skip
_CASTS = {
    aten.to.dtype, aten._to_copy.default, aten.type_as.default, aten.to.device, aten.to.other,
    aten.to.dtype_layout,
}  # fmt: skip
_SOFTMAX = {aten.softmax.int, aten._softmax.default}
_DROPOUT = {aten.dropout.default}


class NoSiteError(Exception):
    """Why an attention is left as it is."""


@dataclass(frozen=True)
class MaskStep:
    """One operator on the scores.

    Attributes:
        kind: ``"add"`` a tensor, ``"fill"`` a number where a tensor is true, ``"keep"`` the scores
            where it is true and put the number elsewhere, ``"floor"`` the number where they are lower,
            ``"scale"`` by the number, ``"triangle"`` what torch means by ``is_causal``.
        node: The tensor.
        number: The number.
        lead: The leading sizes of the scores at that point.
    """

    kind: Literal["add", "subtract", "fill", "keep", "floor", "scale", "triangle"]
    node: fx.Node | None = None
    number: float = 0.0
    lead: tuple[Any, ...] = ()


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
    results = dict(
        zip((spec.name for spec in interface.outputs), output.args[0], strict=True)  # type: ignore[arg-type]
    )
    found = {}
    for place, slot in enumerate(interface.cache):
        past, node = by_name[slot.past.name], results[slot.present.name]
        assert isinstance(node, fx.Node)
        if node.target is not aten.cat.default or len(slot.growing_axes) != 1:
            continue
        parts, *rest = node.args
        axis = int(rest[0] if rest else node.kwargs.get("dim", 0)) % len(slot.past.shape)  # type: ignore[call-overload]
        if len(parts) == 2 and parts[0] is past and axis == slot.growing_axes[0]:  # type: ignore[arg-type, index]
            found[node] = Join(slot, node, past, parts[1], place)  # type: ignore[index, arg-type]
    return found


def sites_of(
    module: fx.GraphModule, interface: Interface, joins: Mapping[fx.Node, Join], shapes: Shapes
) -> Iterator[tuple[fx.Node, Site | NoSiteError]]:
    """Each operator that may be the beginning of an attention over the cache, with what it is."""
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        is_whole = node.target is aten.scaled_dot_product_attention.default
        is_product = node.target in _PRODUCTS or node.target is aten.baddbmm.default
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
            if not _is_weighted(node.args[0]):
                yield node, error


def _is_weighted(node: Any) -> bool:
    """Whether a first operand is the weights of an attention, so that the second is its values."""
    while isinstance(node, fx.Node) and node.target in _RESHAPES | _CASTS | _DROPOUT:
        node = node.args[0]
    return isinstance(node, fx.Node) and node.target in _SOFTMAX


class _Finder:
    def __init__(self, interface: Interface, joins: Mapping[fx.Node, Join], shapes: Shapes) -> None:
        self.interface = interface
        self.joins = joins
        self.shapes = shapes

    def whole(self, node: fx.Node, keys: Operand) -> Site:
        """Torch's own attention."""
        given = dict(zip(("query", "key", "value", "attn_mask"), node.args, strict=False))
        rest = [*node.args[4:], None, None, None, None][:4]
        dropout, is_causal, scale, is_grouped = (
            node.kwargs.get(name, value)
            for name, value in zip(
                ("dropout_p", "is_causal", "scale", "enable_gqa"), rest, strict=True
            )
        )
        query, mask = given["query"], node.kwargs.get("attn_mask", given.get("attn_mask"))
        values = self._traced(given["value"])
        shape = self.shapes.of(query)  # type: ignore[arg-type]
        if len(shape) != 4 or dropout:
            raise NoSiteError("its queries have no axis of heads")
        heads = self._heads(shape[:-2])
        own = self._heads(self.shapes.of(keys.node)[:-2]) if is_grouped else heads
        site = self._site(keys, values, query, node, heads, own, shape[:-2], is_transposed=False)  # type: ignore[arg-type]
        site.is_safe = True
        site.scale = (scale if scale is not None else 1 / math.sqrt(int(shape[-1]))) * keys.factor
        if is_causal:
            site.steps.append(MaskStep("triangle", lead=shape[:-2]))
        if mask is not None:
            kind: Any = "keep" if self.shapes.dtype(mask) == torch.bool else "add"  # type: ignore[arg-type]
            site.steps.append(MaskStep(kind, mask, -math.inf, shape[:-2]))  # type: ignore[arg-type]
        return site

    def parts(self, node: fx.Node, keys: Operand) -> Site | None:
        """A product, what is done to it, a softmax and another product."""
        *_, query, _ = node.args if node.target is not aten.baddbmm.default else node.args[:3]
        shape = self.shapes.of(node)
        if len(shape) < 3 or not self.shapes.is_tensor(query):
            return None
        heads = self._heads(shape[:-2])
        chain = _Chain(self.shapes, node)
        chain.scores(keys.factor)
        product_node, values_operand = chain.weights()
        values = self._traced(values_operand)
        lead = self.shapes.of(product_node)[:-2]
        if self._heads(lead) != heads:
            raise NoSiteError("its products have different numbers of heads")
        site = self._site(
            keys, values, query, product_node, heads, heads, shape[:-2],  # type: ignore[arg-type]
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
        if math.prod(map(int, (heads,))) and sympy.sympify(
            self.shapes.of(query)[-1]
        ) != self._size(keys, key_layout):
            raise NoSiteError("its queries have heads of another size")
        if self._rows(keys) != self._rows(values):
            raise NoSiteError("its keys and values have different lengths")
        if len({self.shapes.dtype(node) for node in (query, keys.join.node, result)}) > 1:
            raise NoSiteError("its queries and its keys have different dtypes")
        return Site(
            keys.join, values.join, key_layout, value_layout, query, result, heads
        )

    def _size(self, operand: Operand, layout: Layout) -> int:
        return int(operand.join.slot.past.shape[layout.roles.index("d")])

    def _rows(self, operand: Operand) -> Any:
        slot = operand.join.slot
        return slot.past.shape[slot.growing_axes[0]]


class _Chain:
    """The operators between two products, followed from one to the next."""

    def __init__(self, shapes: Shapes, start: fx.Node) -> None:
        self.shapes = shapes
        self.node = start
        self.tail = shapes.of(start)[-2:]
        self.scale = 1.0
        self.softcap = 0.0
        self.inner: float | None = None  # the scale below a tanh
        self.steps: list[MaskStep] = []

    def scores(self, factor: float) -> None:
        """Goes on to the softmax, and into it."""
        self.scale = factor
        if self.node.target is aten.baddbmm.default:
            self._added()
        while True:
            user = self._only_user()
            if user.target in _SOFTMAX:
                axis = int(user.args[1]) % len(self.shapes.of(user))  # type: ignore[call-overload, arg-type]
                if axis != len(self.shapes.of(user)) - 1:
                    raise NoSiteError("its softmax is not over the keys")
                self._step_to(user)
                break
            self._operator(user)
        if self.inner is not None:
            self.softcap, self.scale = self.scale, self.inner * self.scale
            if self.softcap <= 0:
                raise NoSiteError(f"its soft-capping is {self.softcap}")

    def weights(self) -> tuple[fx.Node, Any]:
        """Goes on to the product with the values: its node and its other operand."""
        while True:
            user = self._only_user()
            if user.target in _PRODUCTS and user.args[0] is self.node:
                return user, user.args[1]
            is_off = user.target in _DROPOUT and not user.args[2]
            if not is_off and user.target not in _RESHAPES | _CASTS:
                raise NoSiteError(f"its weights go into {user.target} ({user.name})")
            self._step_to(user)

    def _added(self) -> None:
        bias, _, _ = self.node.args
        beta, alpha = (float(self.node.kwargs.get(name, 1)) for name in ("beta", "alpha"))  # type: ignore[arg-type]
        self.scale *= alpha
        lead = self._lead()
        if beta:
            self.steps.append(MaskStep("add", bias, lead=lead))  # type: ignore[arg-type]
            if beta != 1:
                self.steps.append(MaskStep("scale", number=beta))

    def _only_user(self) -> fx.Node:
        users = list(self.node.users)
        if len(users) != 1 or users[0].op != "call_function":
            raise NoSiteError(f"{self.node.name} is used in {len(users)} places or returned")
        return users[0]

    def _step_to(self, user: fx.Node) -> None:
        if self.shapes.of(user)[-2:] != self.tail:
            raise NoSiteError(f"{user.name} moves the scores")
        if self.shapes.dtype(user) != self.shapes.dtype(self.node):
            raise NoSiteError(f"{user.name} computes the scores in {self.shapes.dtype(user)}")
        self.node = user

    def _lead(self) -> tuple[Any, ...]:
        return self.shapes.of(self.node)[:-2]

    def _operator(self, user: fx.Node) -> None:
        lead, args = self._lead(), user.args
        name = str(user.target).removeprefix("aten.")
        if user.target in _RESHAPES | _CASTS:
            self._step_to(user)
            return
        if self.shapes.of(user) != self.shapes.of(self.node):
            raise NoSiteError(f"{user.name} broadcasts the scores")
        if user.kwargs.get("alpha", 1) != 1 or len(args) > 3:
            raise NoSiteError(f"its scores go into {user.target} ({user.name})")
        other = [arg for arg in args if arg is not self.node]
        if name.startswith(("mul.", "div.")) and isinstance(args[1], (int, float)):
            number = float(args[1]) if name.startswith("mul") else 1 / float(args[1])
            self._scaled(number)
        elif name == "tanh.default" and self.inner is None and not self.steps:
            self.inner, self.scale = self.scale, 1.0
        elif name in ("add.Tensor", "sub.Tensor") and self.shapes.is_tensor(other[0]):
            if name == "sub.Tensor" and args[0] is not self.node:
                raise NoSiteError("its scores are subtracted")
            kind: Any = "add" if name == "add.Tensor" else "subtract"
            self.steps.append(MaskStep(kind, other[0], lead=lead))  # type: ignore[arg-type]
        elif name == "masked_fill.Scalar" and args[0] is self.node:
            self.steps.append(MaskStep("fill", args[1], float(args[2]), lead))  # type: ignore[arg-type]
        elif name in ("maximum.default", "max.other") and _number(other[0]) is not None:
            self.steps.append(MaskStep("floor", number=_number(other[0]) or 0.0))
        elif name.startswith(("where.", "masked_fill.")) and args[1 if "fill" in name else 0]:
            self._chosen(user, name, lead)
        else:
            raise NoSiteError(f"its scores go into {user.target} ({user.name})")
        self._step_to(user)

    def _scaled(self, number: float) -> None:
        if self.steps:
            self.steps.append(MaskStep("scale", number=number))
        self.scale *= number

    def _chosen(self, user: fx.Node, name: str, lead: tuple[Any, ...]) -> None:
        """``where`` or ``masked_fill`` with a tensor of one number."""
        if name.startswith("masked_fill"):
            if user.args[0] is not self.node:
                raise NoSiteError("its scores are a mask")
            condition, yes, no = user.args[1], user.args[2], self.node
        else:
            condition, yes, no = user.args
        fill = no if yes is self.node else yes
        number = _number(fill)
        if number is None or condition is self.node:
            raise NoSiteError(f"{user.name} puts more than one number among the scores")
        kind: Any = "keep" if yes is self.node else "fill"
        self.steps.append(MaskStep(kind, condition, number, lead))  # type: ignore[arg-type]


def _number(value: Any) -> float | None:
    """The number that a constant tensor of one element is; None for any other."""
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, fx.Node):
        return None
    if value.op == "get_attr":
        tensor: Any = value.graph.owning_module
        for part in str(value.target).split("."):
            tensor = getattr(tensor, part)
        is_one = isinstance(tensor, torch.Tensor) and tensor.numel() == 1 and not tensor.is_meta
        return float(tensor.item()) if is_one else None
    if value.target in (aten.scalar_tensor.default,):
        return _number(value.args[0])
    if value.target is aten.full.default and tuple(value.args[0]) in ((), (1,)):  # type: ignore[arg-type]
        return _number(value.args[1])
    if value.target in (aten.clone.default, aten.detach.default, aten.alias.default,
                        aten.lift_fresh_copy.default) or value.target in _CASTS:  # fmt: skip
        return _number(value.args[0])
    return None


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
    for join in (site.keys, site.values):
        others = [
            user for user in join.past.users if user is not join.node and user.op != "call_method"
        ]
        if others:
            raise NoSiteError(f"{join.slot.past.path} is read by {others[0].name} too")
