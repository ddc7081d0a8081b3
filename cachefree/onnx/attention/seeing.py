"""What a mask lets a token see, shown by a solver for every index and every size.

The mask's operators are read as terms, and its element at a row i and a key j as a few cases of the
indices and sizes (`cachefree.laws.elements`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from cachefree.facts import Facts
from cachefree.fakes import has_no_values
from cachefree.laws.elements import (
    Applied,
    Constant,
    Element,
    Elements,
    Integer,
    UnknownElementError,
)
from cachefree.laws.readers import READERS
from cachefree.normal import Normaliser
from cachefree.onnx.attention.values import Shapes
from cachefree.sizes import expression
from cachefree.spec import Interface
from cachefree.terms import Table, Term

__all__ = ["Sight", "sight_of"]

aten = torch.ops.aten
_HIDES = -1e9
_SAFE = ("add", "sub", "mul", "neg", "cast", "abs")


@dataclass(frozen=True)
class Sight:
    """What was shown of a mask.

    Attributes:
        hides_future: No token sees a later one.
        is_causal: Every token sees all others up to itself, as they are, and hides later ones.
        sees_itself: Every token sees itself, so that no row is empty.
    """

    hides_future: bool = False
    is_causal: bool = False
    sees_itself: bool = False


def sight_of(mask: fx.Node | None, interface: Interface, shapes: Shapes, past: Any) -> Sight:
    """What is shown of a mask that broadcasts to (B, H, S, T).

    Args:
        mask: The mask; None hides nothing.
        interface: The graph's inputs, and the domain in whose regions this is to hold.
        shapes: Of the graph's nodes.
        past: The size P; T is P + S.
    """
    if mask is None:
        return Sight(sees_itself=True)
    table = Table()
    try:
        term = _Reader(table, interface, shapes).tensor(mask)
    except (ValueError, TypeError):
        return Sight()
    shown = [
        _seen(table, term, Facts(c.fact for c in region.conditions), past)
        for region in interface.domain.regions
    ]
    return Sight(
        all(sight.hides_future for sight in shown),
        all(sight.is_causal for sight in shown),
        all(sight.sees_itself for sight in shown),
    )


def _seen(table: Table, term: Term, facts: Facts, past: Any) -> Sight:
    with facts.solver_lock:
        try:
            normal = Normaliser(table, facts, is_exact=True).normal([term])[0]
            elements = Elements(facts, lambda one, other: one is other, READERS)
            z3 = elements.z3
            names = [z3.Int(name) for name in ("batch_at", "head_at", "row_at", "key_at")]
            elements.assumptions += [index >= 0 for index in names]
            length = elements.size(past)
            row, key = names[2:]
            cases = elements.broadcast(normal, tuple(names))

            def never(wanted: Any, leaves: list[Any]) -> bool:
                return all(elements.never(z3.And(wanted, condition)) for condition, _ in leaves)

            shown = [case for case in cases if not _is_hidden(case[1])]
            changed = [case for case in cases if not _is_zero(case[1])]
            unsure = [case for case in cases if not _is_moderate(case[1])]
            hides_future = never(key > row + length, shown)
            return Sight(
                hides_future,
                hides_future and never(key <= row + length, changed),
                never(key == row + length, unsure),
            )
        except (UnknownElementError, NotImplementedError):
            return Sight()


def _is_hidden(leaf: Any) -> bool:
    return isinstance(leaf, Constant) and float(leaf.text) <= _HIDES


def _is_zero(leaf: Any) -> bool:
    return isinstance(leaf, Constant) and float(leaf.text) == 0


def _is_moderate(leaf: Any) -> bool:
    """Whether a number is finite and hides nothing."""
    if isinstance(leaf, Constant):
        return abs(float(leaf.text)) < -_HIDES
    if isinstance(leaf, Integer):
        return True
    if isinstance(leaf, Element):
        tensor = leaf.term.payload
        if leaf.term.op not in ("attribute", "constant") or tensor.is_meta:
            return False
        return bool((tensor.detach().abs() < 1e6).all())
    if isinstance(leaf, Applied):
        name = str(leaf.op).removeprefix("aten.").split(".")[0]
        return name in _SAFE and all(map(_is_moderate, leaf.operands))
    return False


class _Reader:
    """Nodes of the one graph as terms."""

    def __init__(self, table: Table, interface: Interface, shapes: Shapes) -> None:
        self.table = table
        self.interface = interface
        self.shapes = shapes
        self.known: dict[fx.Node, Any] = {}

    def tensor(self, node: fx.Node) -> Term:
        """The term of a node.

        Raises:
            ValueError: the node has several results, or is no operator of torch.
        """
        if node not in self.known:
            self.known[node] = self._read(node)
        term: Term = self.known[node]
        return term

    def _read(self, node: fx.Node) -> Term:
        shape, dtype = self.shapes.of(node), self.shapes.dtype(node)
        sizes = tuple(int(size) if size.is_Integer else size for size in shape)
        device = torch.device("cpu")
        if node.op == "placeholder":
            return self.table.input(node.name, sizes, dtype, device)
        if node.op == "get_attr":
            return self._attribute(node, sizes, dtype)
        if not isinstance(node.target, torch._ops.OpOverload):
            raise ValueError(f"{node.target} is no operator of torch")
        return self.table.make(node.target, self._arguments(node), sizes, dtype, device)

    def _arguments(self, node: fx.Node) -> tuple[Any, ...]:
        full = []
        for place, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
            value = argument.default_value if argument.has_default_value() else None
            value = node.kwargs.get(argument.name, value)
            value = node.args[place] if place < len(node.args) else value
            full.append(self._argument(value) if argument.name != "pin_memory" else None)
        return tuple(full)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            if self.shapes.is_tensor(value):
                return self.tensor(value)
            known = self.shapes.value(value)
            return known if isinstance(known, torch.device) else expression(known)
        if isinstance(value, (tuple, list)):
            return tuple(map(self._argument, value))
        return value

    def _attribute(self, node: fx.Node, sizes: tuple[Any, ...], dtype: torch.dtype) -> Term:
        """A parameter or buffer; one that holds a triangle is read as a triangle."""
        tensor: Any = node.graph.owning_module
        for part in str(node.target).split("."):
            tensor = getattr(tensor, part)
        device = torch.device("cpu") if has_no_values(tensor) else tensor.device
        return self._triangle(tensor, sizes, dtype) or self.table.attribute(
            str(node.target), tensor, device
        )

    def _triangle(
        self, tensor: torch.Tensor, sizes: tuple[Any, ...], dtype: torch.dtype
    ) -> Term | None:
        if tensor.dim() < 2 or has_no_values(tensor) or min(tensor.shape[-2:]) < 2:
            return None
        whole = tensor.detach()
        for op, diagonal in ((aten.tril.default, 0), (aten.triu.default, 1)):
            value = whole[..., 0, diagonal].flatten()[0]
            if value == 0 or bool(torch.isnan(value.double())):
                continue
            made = op(torch.full_like(whole, value.item()), diagonal)
            if torch.equal(made, whole):
                number: Any = value.item()
                device = torch.device("cpu")
                full = self.table.make("full", (sizes, number, dtype, device), sizes, dtype, device)
                return self.table.make(op, (full, diagonal), sizes, dtype, device)
        return None
