"""The operators between the two products of an attention, followed from one to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from cachefree.onnx.attention.prepare import CASTS, DROPOUT, RESHAPES, SOFTMAX
from cachefree.onnx.attention.values import Shapes

__all__ = ["PRODUCTS", "Chain", "MaskStep", "NoSiteError"]

aten = torch.ops.aten
PRODUCTS = {aten.matmul.default, aten.bmm.default}


class NoSiteError(Exception):
    """Why an attention is left as it is."""


@dataclass(frozen=True)
class MaskStep:
    """One operator on the scores.

    Attributes:
        kind: ``"add"`` a tensor, ``"fill"`` a number where a tensor is true, ``"keep"`` the scores
            where it is true and put the number elsewhere, ``"floor"`` the number where they are
            lower, ``"scale"`` by the number, ``"triangle"`` what torch means by ``is_causal``.
        node: The tensor.
        number: The number.
        lead: The leading sizes of the scores at that point.
    """

    kind: Literal["add", "subtract", "fill", "keep", "floor", "scale", "triangle"]
    node: fx.Node | None = None
    number: float = 0.0
    lead: tuple[Any, ...] = ()


class Chain:
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
            if user.target in SOFTMAX:
                axis = _axis(user) % len(self.shapes.of(user))
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
            if user.target in PRODUCTS and user.args[0] is self.node:
                return user, user.args[1]
            is_off = user.target in DROPOUT and not user.args[2]
            if not is_off and user.target not in RESHAPES | CASTS:
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
        if user.target in RESHAPES | CASTS:
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
        if number <= 0:
            raise NoSiteError(f"its scores are multiplied by {number}")
        if self.steps:
            self.steps.append(MaskStep("scale", number=number))
        self.scale *= number

    def _chosen(self, user: fx.Node, name: str, lead: tuple[Any, ...]) -> None:
        """``where`` or ``masked_fill`` with a tensor of one number."""
        args: tuple[Any, ...] = user.args
        condition: Any
        yes: Any
        no: Any
        if name.startswith("masked_fill"):
            if user.args[0] is not self.node:
                raise NoSiteError("its scores are a mask")
            _, condition, yes = args
            no = self.node
        else:
            condition, yes, no = args
        fill = no if yes is self.node else yes
        number = _number(fill)
        if number is None or condition is self.node:
            raise NoSiteError(f"{user.name} puts more than one number among the scores")
        kind: Any = "keep" if yes is self.node else "fill"
        self.steps.append(MaskStep(kind, condition, number, lead))


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
                        aten.lift_fresh_copy.default) or value.target in CASTS:  # fmt: skip
        return _number(value.args[0])
    return None


def _axis(softmax: fx.Node) -> int:
    axis: Any = softmax.args[1]
    return int(axis)
