"""How a model is called: the structure of its arguments, and the sizes and types of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from cachefree.structure import Structure

__all__ = ["Call", "SizeSpec", "TensorSpec"]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a call: its path, its sizes as ints or expressions, its dtype and device."""

    path: str
    shape: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class SizeSpec:
    """A Python integer in a call that is no constant but an expression of sizes."""

    path: str
    expr: Any


@dataclass(frozen=True)
class Call:
    """How a model is called: ``(args, kwargs)`` taken apart.

    Attributes:
        structure: The structure of ``(args, kwargs)``.
        leaves: One spec a leaf of the structure.
        fixed: Paths of tensors in the result that are constants of the code, from call to call.
        units: Place of a leaf and axis → how many of its rows are one, where that is not 1.
    """

    structure: Structure
    leaves: tuple[TensorSpec | SizeSpec, ...]
    fixed: frozenset[str] = frozenset()
    units: Mapping[tuple[int, int], int] = field(default_factory=dict, hash=False)

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """The tensors among the leaves, in order."""
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, TensorSpec))

    @property
    def sizes(self) -> tuple[SizeSpec, ...]:
        """The Python numbers among the leaves, in order."""
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, SizeSpec))
