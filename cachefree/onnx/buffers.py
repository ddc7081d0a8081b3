"""Buffers that past and present share, behind calls that look as if each gave a new cache.

A call gives views of the rows that are there. The next call that is given these views writes its
rows behind them, in place. Views of fewer rows than have been written since (a cache that is used
twice), and tensors from elsewhere, are copied into new buffers first. So no call changes what an
earlier one gave.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from cachefree.onnx.attention.layout import Layout

__all__ = ["BufferSet", "Buffers"]

_STEP = 64


class BufferSet:
    """One buffer a slot, all of one batch, one capacity and one length.

    Attributes:
        tensors: Place of a slot → (B, K, C, D).
        filled: How many rows were written; no further call is to write before them.
    """

    def __init__(self, tensors: dict[int, torch.Tensor], filled: int) -> None:
        self.tensors = tensors
        self.filled = filled
        self.lock = threading.Lock()

    @property
    def capacity(self) -> int:
        """C."""
        return next(iter(self.tensors.values())).shape[2]

    @property
    def batch(self) -> int:
        """B."""
        return next(iter(self.tensors.values())).shape[0]

    def claim(self, past: int, total: int) -> bool:
        """Takes the rows from ``past`` to ``total``, if nobody has written there."""
        with self.lock:
            if self.filled != past or total > self.capacity:
                return False
            self.filled = total
            return True

    def spoil(self) -> None:
        """After a run that failed: what stands behind the rows is not known."""
        with self.lock:
            self.filled = -1


class Buffers:
    """The buffers of a file's slots.

    Args:
        layouts: Place of a slot → how the model lays it out.
        sizes: Place of a slot → D and dtype.
        device: Where the buffers are.
    """

    def __init__(
        self,
        layouts: Mapping[int, Layout],
        sizes: Mapping[int, tuple[int, torch.dtype]],
        device: torch.device,
    ) -> None:
        self.layouts = dict(layouts)
        self.sizes = dict(sizes)
        self.device = device
        self._views: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.copies = 0

    def take(
        self, given: Mapping[int, torch.Tensor], batch: int, past: int, total: int
    ) -> BufferSet:
        """Buffers that hold what is past, with room for ``total`` rows.

        This call alone writes to the rows from ``past`` on.

        Args:
            given: Place of a slot → what is past, as the model has it.
            batch: B.
            past: P.
            total: P and the new rows.
        """
        known = self._known(given)
        if known is not None and known.batch == batch and known.claim(past, total):
            return known
        made = self._made(batch, total)
        for place, layout in self.layouts.items():
            if past:
                made.tensors[place][:, :, :past] = layout.heads_first(given[place]).to(self.device)
        self.copies += bool(past)
        return made

    def reordered(
        self, given: Mapping[int, torch.Tensor], rows: torch.Tensor, past: int
    ) -> dict[int, torch.Tensor]:
        """Rows of the batch of what is past, in new buffers: views, as the model has them."""
        made = self._made(len(rows), past)
        for place, layout in self.layouts.items():
            old = layout.heads_first(given[place]).to(self.device)
            made.tensors[place][:, :, :past] = old.index_select(0, rows.to(self.device))
        return self.views(made, past)

    def _made(self, batch: int, total: int) -> BufferSet:
        """New buffers, with room to grow: a quarter more, so that few copies come in the end."""
        capacity = total + max(total // 4, _STEP)
        capacity += -capacity % _STEP
        tensors = {}
        for place, layout in self.layouts.items():
            size, dtype = self.sizes[place]
            shape = (batch, layout.heads, capacity, size)
            tensors[place] = torch.zeros(shape, dtype=dtype, device=self.device)
        return BufferSet(tensors, total)

    def _known(self, given: Mapping[int, torch.Tensor]) -> BufferSet | None:
        """The buffers that all of the given tensors are views of, each of its own slot's."""
        found: BufferSet | None = None
        for place in self.layouts:
            buffers = self._views.get(given[place])
            if buffers is None or (found is not None and buffers is not found):
                return None
            found = buffers
            rows = given[place].shape[self.layouts[place].roles.index("p")]
            due = self._view(buffers, place, rows)
            mine = given[place]
            if (mine.data_ptr(), mine.shape, mine.stride()) != (
                due.data_ptr(), due.shape, due.stride(),
            ):  # fmt: skip
                return None
        return found

    def _view(self, buffers: BufferSet, place: int, rows: int) -> torch.Tensor:
        return self.layouts[place].as_model(buffers.tensors[place][:, :, :rows])

    def views(self, buffers: BufferSet, rows: int) -> dict[int, torch.Tensor]:
        """Place of a slot → the rows that are there, as the model has them."""
        views = {place: self._view(buffers, place, rows) for place in self.layouts}
        for view in views.values():
            self._views[view] = buffers
        return views
