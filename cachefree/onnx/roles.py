"""What an input besides the tokens and the cache is for the next token, where that is known.

Shapes alone do not tell: types of tokens have the shape of a mask, and a mask of padding says the
opposite of a mask of tokens. So the name has to say it too; what is not known is refused.
"""

from __future__ import annotations

import re

import sympy

from cachefree.sizes import size_symbol
from cachefree.spec import InputSpec

__all__ = ["is_mask", "is_position"]

_QUERY = size_symbol("query")
_POSITIONS = frozenset(("pos", "position", "positions", "posids"))
_BESIDE = frozenset(
    ("", "cache", "decoder", "id", "ids", "index", "indices", "input", "start", "text", "token")
)


def is_mask(spec: InputSpec) -> bool:
    """Whether it says of each past and new token that it counts: whole numbers (B, P + S).

    Numbers of floating point may be ones for what counts, or be added to scores; and a mask of
    padding usually is true for what does not count.
    """
    return (
        len(spec.shape) == 2
        and isinstance(spec.shape[1], sympy.Add)
        and _QUERY in spec.shape[1].free_symbols
        and not spec.dtype.is_floating_point
        and "mask" in _name(spec)
        and "pad" not in _name(spec)
    )


def is_position(spec: InputSpec) -> bool:
    """Whether it is the place of each new token: ``position_ids``, ``input_pos``."""
    words = set(_name(spec).split("_"))
    is_named_so = bool(words & _POSITIONS) and words <= _POSITIONS | _BESIDE
    return is_named_so and not spec.dtype.is_floating_point and _QUERY in spec.shape


def _name(spec: InputSpec) -> str:
    """The last name in its path."""
    names = re.findall(r"[A-Za-z_]\w*", spec.path)
    return str(names[-1]).lower() if names else ""
