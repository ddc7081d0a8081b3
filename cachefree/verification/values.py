"""The values of inputs, cut out of one long sequence, so that chunks and one long call agree."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from typing import Any

import sympy
import torch

from cachefree.onnx.domain import concrete
from cachefree.sizes import size_symbol
from cachefree.spec import InputSpec, Interface
from cachefree.verification.plan import Plan

__all__ = ["InputValues", "is_mask", "kept_positions"]

_QUERY = size_symbol("query")


def is_mask(spec: InputSpec) -> bool:
    """Whether an input says which positions count.

    Integers or Booleans along past and new tokens, or by its name.
    """
    if spec.dtype.is_floating_point:
        return False
    return (
        any(_counts_past(size) for size in spec.shape)
        or "mask" in spec.path
        or spec.dtype is torch.bool
    )


def kept_positions(spec: InputSpec, tensor: torch.Tensor) -> torch.Tensor | None:
    """Which positions a mask of shape (batch, past + query) keeps, as Booleans.

    None for any other input.
    """
    if len(spec.shape) != 2 or not is_mask(spec) or not _counts_past(spec.shape[1]):
        return None
    return tensor == (0 if _marks_dropped(spec) else 1)


class InputValues:
    """Draws what is no cache.

    Args:
        interface: The inputs.
        vocabulary: For each input the rows of the table that its ids are looked up in, or None.
        plan: The generation.
        device: Where.
    """

    def __init__(
        self,
        interface: Interface,
        vocabulary: tuple[int | None, ...],
        plan: Plan,
        device: torch.device,
    ) -> None:
        self.plan = plan
        self.specs = [
            (spec, rows)
            for spec, rows in zip(interface.inputs, vocabulary, strict=True)
            if not spec.is_cache
        ]
        self.whole = {spec.name: self._draw(spec, rows).to(device) for spec, rows in self.specs}

    def of_call(self, start: int, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """The inputs of the call whose first new token is the ``start``-th of the generation.

        Args:
            start: How many tokens came before.
            sizes: Of this call, with the past as long as the cache really is.
        """
        end = start + sizes["query"]
        result = {}
        for spec, _ in self.specs:
            tensor = self.whole[spec.name]
            lengths = concrete(spec.shape, {**dict.fromkeys(map(str, _symbols(spec)), 0), **sizes})
            for axis, size in enumerate(spec.shape):
                if _QUERY in getattr(size, "free_symbols", ()):
                    tensor = tensor.narrow(axis, end - lengths[axis], lengths[axis])
            result[spec.name] = tensor.clone()
        return result

    def _draw(self, spec: InputSpec, rows: int | None) -> torch.Tensor:
        """The values along the whole generation."""
        generator = torch.Generator().manual_seed(
            self.plan.seed * 65_537 + zlib.crc32(spec.path.encode()) % 65_537
        )
        sizes = {
            **dict.fromkeys(map(str, _symbols(spec)), 0),
            **self.plan.sizes,
            "query": self.plan.total,
        }
        shape = concrete(spec.shape, sizes)
        if spec.dtype.is_floating_point:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(spec.dtype)
        if "pos" in spec.path and _QUERY in spec.shape:
            return _positions(spec, shape, rows)
        if is_mask(spec):
            mask = self._mask(shape, generator)
            return (1 - mask if _marks_dropped(spec) else mask).to(spec.dtype)
        return torch.randint(rows or 2, shape, generator=generator).to(spec.dtype)

    def _mask(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """1 where a position counts; in each row at least one does."""
        mask = torch.ones(shape, dtype=torch.int64)
        if self.plan.padding == "none" or len(shape) < 2:
            return mask
        length = shape[-1]
        if self.plan.padding == "holes":
            dropped = torch.rand(shape, generator=generator) < 0.3
            dropped[..., 0] = False
        else:
            starts = torch.randint(
                min(length, self.plan.queries[0]), shape[:-1], generator=generator
            )
            dropped = torch.arange(length) < starts.unsqueeze(-1)
        return mask.masked_fill(dropped, 0)


def _positions(spec: InputSpec, shape: tuple[int, ...], rows: int | None) -> torch.Tensor:
    axis = spec.shape.index(_QUERY)
    positions = torch.arange(shape[axis]).clamp(max=None if rows is None else rows - 1)
    return (
        positions.view([-1 if place == axis else 1 for place in range(len(shape))])
        .expand(shape)
        .to(spec.dtype)
        .contiguous()
    )


def _symbols(spec: InputSpec) -> set[Any]:
    return {symbol for size in spec.shape for symbol in getattr(size, "free_symbols", ())}


def _marks_dropped(spec: InputSpec) -> bool:
    """Whether a mask is 1 where a position does *not* count, as ``key_padding_mask`` is."""
    return re.search(r"padding_mask|pad_mask|is_pad|ignore", spec.path) is not None


def _counts_past(size: Any) -> bool:
    return isinstance(size, sympy.Add) and _QUERY in size.free_symbols
