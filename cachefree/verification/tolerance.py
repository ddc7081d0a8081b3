"""When two results are the same.

Bits, or what the dtype's own rounding explains. No number here was chosen to pass a test.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Comparison", "Spread", "compare", "distance"]

_TIMES_THE_ERROR = 4
"""How much larger than the original's own rounding error another order of operations may come out.

Each result is a sum of as many roundings, and the largest over a tensor of one such sum is within
this of another's, but by chance where the tensor is small. Then it is the largest of several such
sums that tells: the results of random rounding (`Spread`).
"""

Spread = Callable[[], float]
"""How far random rounding comes out from the exact result, or from the original without one."""


@dataclass(frozen=True)
class Comparison:
    """Of one output.

    Attributes:
        is_same: Whether it passes.
        has_same_bits: Whether nothing differs at all.
        difference: The largest absolute difference; ``nan`` where shapes or dtypes differ.
        why: What differs, in words.
    """

    is_same: bool
    has_same_bits: bool
    difference: float
    why: str = ""


def compare(
    actual: torch.Tensor,
    original: torch.Tensor,
    exact: torch.Tensor | None,
    *,
    skip_nan: bool = False,
    computed_in: torch.dtype | None = None,
    spread: Spread = float,
) -> Comparison:
    """Compares a result with the original's.

    Passes where the bits are equal; or by the defaults of ``torch.testing.assert_close`` for the
    dtype; or where its distance from the exact result is at most a few times the original's own, or
    what random rounding makes of it.

    Args:
        actual: The result.
        original: What the original model gives.
        exact: What the original gives in float64, where it can be had.
        skip_nan: Whether positions at which the original is not a number are left out.
        computed_in: The coarsest dtype of the computation, where it is not that of the result.
        spread: Asked for where nothing else lets the result pass.
    """
    if actual.shape != original.shape or actual.dtype != original.dtype:
        said = (
            f"{tuple(actual.shape)} {actual.dtype}, and {tuple(original.shape)} {original.dtype} in"
            " the original"
        )
        return Comparison(False, False, float("nan"), said)
    actual = actual.to(original.device)
    if skip_nan and original.dtype.is_floating_point:
        undefined = original.isnan()
        actual = torch.where(undefined, original, actual)
    if torch.equal(actual, original):
        return Comparison(True, True, 0.0)
    if not original.dtype.is_floating_point:
        places = int((actual != original).sum())
        return Comparison(
            False,
            False,
            float((actual.double() - original.double()).abs().max()),
            f"{places} of {actual.numel()} values differ",
        )
    difference = _distance(actual, original)
    try:
        torch.testing.assert_close(actual, original, equal_nan=True)
    except AssertionError:
        pass
    else:
        return Comparison(True, difference == 0, difference)
    return _against_exact(
        actual, original, exact, difference, computed_in or original.dtype, spread
    )


def _against_exact(
    actual: torch.Tensor,
    original: torch.Tensor,
    exact: torch.Tensor | None,
    difference: float,
    computed_in: torch.dtype,
    spread: Spread,
) -> Comparison:
    if exact is None:
        rounding = spread()
        why = f"the largest difference is {difference:.3g}; rounding makes {rounding:.3g}"
        return Comparison(difference <= _TIMES_THE_ERROR * rounding, False, difference, why)
    if exact.shape != original.shape or not _is_believable(exact, original, computed_in):
        return Comparison(False, False, difference, f"the largest difference is {difference:.3g}")
    own_error, error = _distance(original, exact), _distance(actual, exact)
    if error <= _TIMES_THE_ERROR * own_error:
        return Comparison(True, False, difference)
    rounding = spread()
    why = (
        f"it is {error:.3g} from the float64 result, the original {own_error:.3g}; rounding"
        f" makes {rounding:.3g}"
    )
    return Comparison(error <= _TIMES_THE_ERROR * rounding, False, difference, why)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest absolute difference; infinite where only one is a number, or shapes differ."""
    return _distance(one, other) if one.shape == other.shape else math.inf


def _is_believable(exact: torch.Tensor, original: torch.Tensor, computed_in: torch.dtype) -> bool:
    """Whether the float64 result is the same computation: half the digits of the dtype agree.

    Where code depends on the dtype, or on chance, it is not, and would excuse anything.
    """
    finite = exact[exact.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return _distance(original, exact) <= math.sqrt(torch.finfo(computed_in).eps) * scale


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest absolute difference.

    Infinite where only one is a number, or they are different infinities.
    """
    one, other = one.double(), other.double()
    same = (one == other) | (one.isnan() & other.isnan())
    gaps = torch.where(same, torch.zeros_like(one), (one - other).abs())
    return float(gaps.nan_to_num(nan=float("inf")).max()) if gaps.numel() else 0.0
