"""The values of what a run on fake tensors computes of numbers alone: masks, positions.

Beside each fake tensor that is made of no input and no parameter stands the real one. It is asked
where the code asks for values: ``if mask.any()``. Only runs of models that ask such things have it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["SHAPED", "KnownValues"]

_MOST_ELEMENTS = 2**22
_LIFTS = {torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default}
SHAPED = {
    getattr(torch.ops.aten, name)
    for name in ("new_ones", "new_zeros", "new_full", "ones_like", "zeros_like", "full_like")
}
"""What takes a dtype, a device and perhaps a shape of its first operand, and no values."""
_UNFILLED = {
    getattr(torch.ops.aten, name)
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
}


class KnownValues(TorchDispatchMode):
    """Computes on real tensors whatever a run on fake ones computes of numbers alone."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._real: Any = WeakTensorKeyDictionary()
        self._unknown: dict[int, torch.Tensor] = {}  # by memory: what was written there is unknown

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def of(self, fake: torch.Tensor) -> torch.Tensor | None:
        """The values of a fake tensor; None where they are not known."""
        real: torch.Tensor | None = self._real.get(fake)
        return None if real is None or _memory(real) in self._unknown else real

    def number(self, fake: torch.Tensor) -> Any:
        """The number or truth that a tensor of one element is; None where it is not known."""
        real = self.of(fake)
        if real is None:
            return None
        with torch._C.DisableTorchFunction(), no_dispatch():
            return real.item()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        is_lift = func in _LIFTS and type(args[0]) is torch.Tensor and not args[0].is_meta
        known = tensors if is_lift else [self.of(tensor) for tensor in tensors]
        if func.overloadpacket in SHAPED and _is_small(args[0]):
            known[0] = _unread(args[0])
        computed = None
        if not any(real is None for real in known) and _is_certain(func, made):
            values = iter(known)
            leaves = [
                next(values) if isinstance(leaf, torch.Tensor) else _on_the_cpu(leaf)
                for leaf in leaves
            ]
            args, kwargs = tree_unflatten(leaves, structure)
            with no_dispatch(), torch.no_grad():
                computed = func(*args, **kwargs)
        if computed is not None:
            self._note(made, computed)
        elif func._schema.is_mutable:
            self._forget(tensors)
        return made

    def _note(self, made: Any, computed: Any) -> None:
        pairs = zip(tree_flatten(made)[0], tree_flatten(computed)[0], strict=True)
        for fake, real in pairs:
            if isinstance(fake, torch.Tensor) and fake.shape == real.shape:
                self._real[fake] = real

    def _forget(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            real = self._real.get(tensor)
            if real is not None:
                self._unknown[_memory(real)] = real


def _is_certain(func: Any, made: Any) -> bool:
    """Whether an operator gives the same wherever it runs, and not too much."""
    if torch.Tag.nondeterministic_seeded in func.tags or func.overloadpacket in _UNFILLED:
        return False
    return all(_is_small(leaf) for leaf in tree_flatten(made)[0] if isinstance(leaf, torch.Tensor))


def _is_small(tensor: torch.Tensor) -> bool:
    return tensor.numel() <= _MOST_ELEMENTS


def _unread(fake: torch.Tensor) -> torch.Tensor:
    """A real tensor of a fake one's shape and dtype."""
    with no_dispatch():
        return torch.zeros(tuple(fake.shape), dtype=fake.dtype)


def _on_the_cpu(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
