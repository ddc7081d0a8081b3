"""Operators that torch cannot trace, or that no exporter knows, as ordinary ones.

Each stand-in computes the same over the real numbers, for every input; but for those that only put
values elsewhere, what its rounding is differs from the operator's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["StandIns"]


class StandIns(TorchFunctionMode):
    """Calls ordinary operators in the place of those that cannot be traced.

    Attributes:
        used: The names of the operators that were replaced by others that round otherwise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.used: dict[str, None] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        stand_in = _STAND_INS.get(name)
        result = stand_in(*args, **(kwargs or {})) if stand_in else None
        if result is None:
            return func(*args, **(kwargs or {}))
        if name not in _EXACT:
            self.used[name] = None
        return result


def _grouped_product(
    rows: torch.Tensor, weights: torch.Tensor, offs: Any = None, **others: Any
) -> torch.Tensor | None:
    """Each row times the weight of its group: ``offs[g]`` is where group g of the rows ends.

    torch traces ``grouped_mm`` in bfloat16 only, and runs it in every dtype.
    """
    if (
        offs is None
        or rows.dim() != 2
        or weights.dim() != 3
        or any(map(_is_given, others.values()))
    ):
        return None
    place = torch.arange(rows.shape[0], device=rows.device)
    ended = place.unsqueeze(1) >= offs.unsqueeze(0)
    group = ended.sum(1).clamp(max=weights.shape[0] - 1)
    products: torch.Tensor = torch.bmm(rows.unsqueeze(1), weights[group]).squeeze(1)
    return products


def _counts(values: torch.Tensor, bins: int = 100, **interval: Any) -> torch.Tensor | None:
    """How many values lie in each of so many equal intervals; others are not counted."""
    low, high = interval.pop("min", 0), interval.pop("max", 0)
    if low == high or values.dim() != 1 or interval:
        return None
    place = ((values - low) * bins / (high - low)).floor().clamp(max=bins - 1)  # as torch rounds
    is_inside = (values >= low) & (values <= high)
    each = torch.arange(bins, device=values.device, dtype=values.dtype)
    is_there = (place.unsqueeze(1) == each.unsqueeze(0)) & is_inside.unsqueeze(1)
    counts: torch.Tensor = is_there.sum(0).to(values.dtype)
    return counts


def _one_hot(classes: torch.Tensor, num_classes: Any = -1) -> torch.Tensor | None:
    """A row of zeros with a one for each class. torch takes no symbolic number of them."""
    if not isinstance(num_classes, torch.SymInt):
        return None
    rows = torch.zeros((*classes.shape, num_classes), dtype=torch.int64, device=classes.device)
    return rows.scatter(-1, classes.unsqueeze(-1), 1)  # a class that is none of them is an error


def _filled(size: Any, fill_value: Any, **options: Any) -> torch.Tensor | None:
    """A tensor full of what another one of no axes holds; torch asks that for its value."""
    if not isinstance(fill_value, torch.Tensor) or options.keys() - {"dtype", "device"}:
        return None
    constant = getattr(fill_value, "constant", None)
    if constant is not None:
        return torch.full(size, constant.item(), **options)
    dtype, device = options.get("dtype"), options.get("device") or torch.get_default_device()
    return fill_value.to(device, dtype or _dtype_of_number(fill_value)).expand(size).clone()


def _filled_like(like: torch.Tensor, fill_value: Any, **options: Any) -> torch.Tensor | None:
    """As `torch.full`, with the shape and the type of another tensor."""
    own: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
    return _filled(like.shape, fill_value, **{**own, **options})


def _filled_anew(like: torch.Tensor, size: Any, fill_value: Any, **options: Any) -> Any:
    """As `torch.full`, with the type of another tensor."""
    own: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
    return _filled(size, fill_value, **{**own, **options})


_FACTORS = ("batch1", "mat1", "batch2", "mat2")


def _scaled_product(add: Any, *factors: Any, **named: Any) -> torch.Tensor | None:
    """``beta * add + alpha * (one @ other)``, for scales that are tensors."""
    alpha, beta = named.pop("alpha", 1), named.pop("beta", 1)
    named_factors = [named.pop(name) for name in _FACTORS if name in named]
    given = (*factors, *named_factors)
    is_scaled = any(isinstance(scale, torch.Tensor) for scale in (alpha, beta))
    if named or len(given) != 2 or not is_scaled:
        return None
    one, other = given
    product: torch.Tensor = alpha * (one @ other)
    if not isinstance(beta, torch.Tensor) and beta == 0:  # what is added is then not looked at
        return product.expand(torch.broadcast_shapes(product.shape, add.shape))
    scaled: torch.Tensor = beta * add
    if isinstance(beta, torch.Tensor):  # a zero hides infinities, too
        scaled = torch.where(beta == 0, torch.zeros_like(scaled), scaled)
    return scaled + product


def _dtype_of_number(value: torch.Tensor) -> torch.dtype:
    """What ``torch.full`` makes of a Python number of this kind."""
    if value.dtype.is_complex:
        return torch.complex(torch.empty(()), torch.empty(())).dtype
    if value.dtype.is_floating_point:
        return torch.get_default_dtype()
    return torch.bool if value.dtype == torch.bool else torch.int64


def _is_given(value: Any) -> bool:
    return value is not None


_STAND_INS: dict[str, Callable[..., torch.Tensor | None]] = {
    "_grouped_mm": _grouped_product,
    "histc": _counts,
    "one_hot": _one_hot,
    "addmm": _scaled_product,
    "baddbmm": _scaled_product,
    "full": _filled,
    "full_like": _filled_like,
    "new_full": _filled_anew,
}
_EXACT = frozenset(("full", "full_like", "new_full"))
