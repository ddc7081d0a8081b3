"""Operators that draw random numbers."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from cachefree.recurrent import is_recurrent

__all__ = ["is_random", "is_thrown_away"]


def is_random(target: Any, args: tuple[Any, ...]) -> bool:
    """Whether a call of an operator draws random numbers: not dropout at rest."""
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    name = target._schema.name
    if name in (
        "aten::dropout",
        "aten::native_dropout",
        "aten::feature_dropout",
        "aten::alpha_dropout",
    ):
        return bool(args[2]) and args[1] != 0.0
    if name == "aten::scaled_dot_product_attention":
        return bool(args[4])
    if name == "aten::rrelu":
        return bool(args[3])
    if is_recurrent(target):
        given = {a.name: arg for a, arg in zip(target._schema.arguments, args, strict=False)}
        return bool(given["train"]) and given["dropout"] != 0.0
    return True


def is_thrown_away(node: fx.Node) -> bool:
    """Whether nothing of a traced value is returned or written, however it is computed with.

    ``p = torch.rand([])`` before ``if self.training and p < rate`` is drawn in every call and used
    in training only. Where Python asks for its value, that is an operator too, and refused.
    """
    if not _only_computes(node.target):
        return False  # a view may be written to, and what it is a view of be read
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            if user in seen:
                continue
            if user.op != "call_function" or not _only_computes(user.target):
                return False
            seen.add(user)
            pending.append(user)
    return True


def _only_computes(target: Any) -> bool:
    if target is operator.getitem:
        return True
    return isinstance(target, torch._ops.OpOverload) and not target._schema.is_mutable
