"""Weights as fake tensors: what is computed of weights alone is not computed either."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["WeightsAsFakes"]


class WeightsAsFakes(TorchDispatchMode):
    """Gives an operator whose operands are all real their fake twins.

    ``FakeTensorMode`` runs such an operator for real: it would scale a weight, or write to a
    buffer. One tensor has one twin, so that what is written to it is read from it.

    Args:
        mode: The mode below.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mode = mode

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _LIFTS:
            return func(*args, **(kwargs or {}))
        leaves, structure = tree_flatten((args, kwargs or {}))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            leaves = [
                self._twin(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves
            ]
            args, kwargs = tree_unflatten(leaves, structure)
        return func(*args, **(kwargs or {}))

    def _twin(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.mode.from_tensor(tensor, static_shapes=True)


_LIFTS = (  # a tensor of numbers in the code: torch keeps the numbers beside its fake twin
    torch.ops.aten.lift_fresh.default,
    torch.ops.aten.lift_fresh_copy.default,
    torch.ops.aten.lift.default,
)
