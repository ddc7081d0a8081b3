"""The laws, in the order in which they are tried."""

from cachefree.laws.identity import COMMUTATIVE, IDENTITY_LAWS
from cachefree.laws.join import JOIN_LAWS
from cachefree.laws.law import Law, Rewriter
from cachefree.laws.masks import MASK_LAWS
from cachefree.laws.sequence import SEQUENCE_LAWS
from cachefree.laws.shape import NO_ELEMENTS, SHAPE_LAWS

__all__ = ["COMMUTATIVE", "LAWS", "NO_ELEMENTS", "Law", "Rewriter"]

LAWS: tuple[Law, ...] = (
    *IDENTITY_LAWS,
    *SHAPE_LAWS,
    *JOIN_LAWS,
    *SEQUENCE_LAWS,
    *MASK_LAWS,
)
