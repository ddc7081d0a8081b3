"""The laws, in the order in which they are tried."""

from cachefree.laws.attention import ATTENTION_LAWS
from cachefree.laws.hiding import HIDING_LAWS
from cachefree.laws.identity import COMMUTATIVE, IDENTITY_LAWS
from cachefree.laws.join import JOIN_LAWS
from cachefree.laws.law import Law, Rewriter
from cachefree.laws.linear import LINEAR_LAWS
from cachefree.laws.masks import MASK_LAWS
from cachefree.laws.ones import ONES_LAWS
from cachefree.laws.overwrites import OVERWRITE_LAWS
from cachefree.laws.padding import PADDING_LAWS
from cachefree.laws.scan import SCAN_LAWS
from cachefree.laws.sequence import SEQUENCE_LAWS
from cachefree.laws.shape import NO_ELEMENTS, SHAPE_LAWS, slice_extent
from cachefree.laws.tables import TABLE_LAWS
from cachefree.laws.zeros import ZERO_LAWS

__all__ = [
    "COMMUTATIVE",
    "EXACT_LAWS",
    "LAWS",
    "NO_ELEMENTS",
    "ONES_LAWS",
    "TABLE_LAWS",
    "Law",
    "Rewriter",
    "slice_extent",
]

LAWS: tuple[Law, ...] = (
    *IDENTITY_LAWS,
    *SHAPE_LAWS,
    *JOIN_LAWS,
    *SEQUENCE_LAWS,
    *MASK_LAWS,
    *HIDING_LAWS,
    *ATTENTION_LAWS,
    *LINEAR_LAWS,
    *PADDING_LAWS,
    *ZERO_LAWS,
    *SCAN_LAWS,
    *OVERWRITE_LAWS,
)
"""All laws. They are tried after the exact ones alone did not suffice."""

EXACT_LAWS: tuple[Law, ...] = tuple(
    law for law in LAWS if law.kind == "exact" and law not in LINEAR_LAWS
)
