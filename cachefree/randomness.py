"""Operators that draw random numbers."""

from __future__ import annotations

from typing import Any

import torch

from cachefree.recurrent import is_recurrent

__all__ = ["is_random"]


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
