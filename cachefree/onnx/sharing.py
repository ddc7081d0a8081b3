"""A graph over shared buffers, run once: what is past is found, and the new rows go behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch

from cachefree.onnx.attention.shared import LENGTH
from cachefree.onnx.buffers import Buffers, BufferSet
from cachefree.onnx.domain import concrete, read_sizes
from cachefree.onnx.metadata import FileDescription
from cachefree.onnx.runtime import TensorSession
from cachefree.onnx.stepping import take_rows
from cachefree.sizes import size_symbol

__all__ = ["SharedRun"]

_BATCH = size_symbol("batch")


class SharedRun:
    """Runs a file of ``kv="shared"``.

    Args:
        session: The file.
        description: What it says of itself.
    """

    def __init__(self, session: TensorSession, description: FileDescription) -> None:
        self.session = session
        self.interface = description.interface
        self.rows_apart = description.cache.rows_apart
        layouts = description.cache.layouts
        slots = self.interface.cache
        sizes = {
            place: (
                int(slots[place].past.shape[layout.roles.index("d")]),
                slots[place].past.dtype,
            )
            for place, layout in layouts.items()
        }
        self.buffers = Buffers(layouts, sizes, session.device)
        self.pasts = {slots[place].past.name: place for place in layouts}
        self.presents = {slots[place].present.name: place for place in layouts}
        slot = slots[next(iter(layouts))]
        self.length = slot.past.shape[slot.growing_axes[0]]
        self.total = slot.present.shape[slot.growing_axes[0]]

    def run(self, tensors: Sequence[torch.Tensor], sizes: Mapping[str, int]) -> list[torch.Tensor]:
        """Runs the graph once; see `OnnxDecoder.run_flat`."""
        inputs = dict(zip((spec.name for spec in self.interface.inputs), tensors, strict=True))
        past, total = concrete((self.length, self.total), sizes)
        given = {place: inputs[name] for name, place in self.pasts.items()}
        taken = self.buffers.take(given, sizes["batch"], past, total)
        plain = {name: tensor for name, tensor in inputs.items() if name not in self.pasts}
        plain[LENGTH] = torch.tensor([past])
        due: dict[str, Any] = {
            spec.name: (concrete(spec.shape, sizes), spec.dtype)
            for spec in self.interface.outputs
            if spec.name not in self.presents
        }
        try:
            if self.rows_apart and sizes["batch"] > 1 and past and total - past > 1:
                found = self._row_by_row(plain, due, taken, sizes["batch"])
            else:
                found = self._once(plain, due, taken.tensors)
        except BaseException:
            taken.spoil()
            raise
        views = self.buffers.views(taken, total)
        return [
            views[self.presents[spec.name]] if spec.name in self.presents else found[spec.name]
            for spec in self.interface.outputs
        ]

    def reordered(
        self, cache: Mapping[str, torch.Tensor], rows: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Rows of the batch of a cache; see `OnnxDecoder.reordered`."""
        sizes = read_sizes(self.interface, cache)
        past = concrete((self.length,), sizes)[0]
        given = {place: cache[name] for name, place in self.pasts.items()}
        views = self.buffers.reordered(given, rows, past)
        return {
            slot.past.name: views[self.pasts[slot.past.name]]
            if slot.past.name in self.pasts
            else take_rows(cache[slot.past.name], slot.past, rows, sizes["batch"])
            for slot in self.interface.cache
        }

    def _once(
        self,
        plain: Mapping[str, torch.Tensor],
        due: Mapping[str, Any],
        buffers: Mapping[int, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        inputs = {**plain, **{name: buffers[place] for name, place in self.pasts.items()}}
        outputs = {**due, **{name: buffers[place] for name, place in self.presents.items()}}
        return dict(zip(outputs, self.session.run(inputs, outputs), strict=True))

    def _row_by_row(
        self,
        plain: Mapping[str, torch.Tensor],
        due: Mapping[str, Any],
        taken: BufferSet,
        batch: int,
    ) -> dict[str, torch.Tensor]:
        """Runs the rows of a batch one by one, as the file says that it may be done."""
        in_axes = {spec.name: _axis(spec) for spec in self.interface.inputs}
        out_axes = {spec.name: _axis(spec) for spec in self.interface.outputs}
        found: dict[str, torch.Tensor] = {
            name: torch.empty(shape, dtype=dtype, device=self.session.device)
            for name, (shape, dtype) in due.items()
        }
        for row in range(batch):
            mine = {
                name: _row(tensor, in_axes.get(name), row, batch) for name, tensor in plain.items()
            }
            shapes = {
                name: (tuple(_row(found[name], out_axes[name], row, batch).shape), dtype)
                for name, (_, dtype) in due.items()
            }
            buffers = {place: tensor[row : row + 1] for place, tensor in taken.tensors.items()}
            for name, tensor in self._once(mine, shapes, buffers).items():
                if name in found:
                    _row(found[name], out_axes[name], row, batch).copy_(tensor)
        return found


def _axis(spec: Any) -> int | None:
    """The axis of the rows of a batch."""
    return next(
        (
            axis
            for axis, size in enumerate(spec.shape)
            if _BATCH in sympy.sympify(size).free_symbols
        ),
        None,
    )


def _row(tensor: torch.Tensor, axis: int | None, row: int, batch: int) -> torch.Tensor:
    if axis is None:
        return tensor
    each = tensor.shape[axis] // batch
    return tensor.narrow(axis, row * each, each)
