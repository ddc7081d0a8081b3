"""Whether a floating-point element is zero, for a solver that does not know the element.

``x.bool()`` is an unknown truth of the element, the same for the same element: so much is enough
to see that ``x.masked_fill(x.bool(), c)`` is ``c`` or zero.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["is_nonzero", "is_positive_zero"]

aten = torch.ops.aten
_WIDE = 2.0**-60  # no difference of such a number is so small that it is flushed to −0.0
_DIFFERENCES = (aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.rsub.Tensor)


def is_nonzero(elements: Any, leaf: Any) -> Any:
    """The truth, for the solver, that an element is not zero; of NaN it holds, as in torch.

    Args:
        elements: The elements that the solver is asked about.
        leaf: One case of a floating-point element.
    """
    z3 = elements.z3
    text: list[str] = []
    numbers: list[Any] = []
    _spell(elements, leaf, text, numbers)
    name = f"nonzero({' '.join(text)})"
    if not numbers:
        return z3.Bool(name)
    return z3.Function(name, *[z3.IntSort()] * len(numbers), z3.BoolSort())(*numbers)


def _spell(elements: Any, leaf: Any, text: list[str], numbers: list[Any]) -> None:
    """Writes an element's form, in which every integer of the solver is left open."""
    from cachefree.laws.elements import Applied, Constant, Element, Integer

    if isinstance(leaf, Constant):
        text.append(leaf.text)
    elif isinstance(leaf, Integer):
        text.append("#")
        numbers.append(leaf.value)
    elif isinstance(leaf, Element):
        text.append(f"t{elements.representative(leaf.term).number}:{len(leaf.index)}")
        numbers.extend(leaf.index)
    else:
        assert isinstance(leaf, Applied)
        text.append(f"{leaf.op}:{leaf.dtype}(")
        for operand in leaf.operands:
            _spell(elements, operand, text, numbers)
        text.append(")")


def is_positive_zero(leaf: Any) -> bool:
    """Whether an element that is zero is +0.0: a difference of numbers one of which is not zero."""
    from cachefree.laws.elements import Applied, Constant

    if not isinstance(leaf, Applied) or leaf.op not in _DIFFERENCES:
        return False
    return any(
        isinstance(operand, Constant) and abs(float(operand.text)) >= _WIDE
        for operand in leaf.operands
    )
