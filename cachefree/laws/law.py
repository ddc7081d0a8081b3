"""What a law is: an identity of terms, its side condition, and whether it holds bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from cachefree.facts import Facts
from cachefree.terms import Term

__all__ = ["Law", "Rewriter", "dtype_of", "shape_of"]


class Rewriter(Protocol):
    """What a law may use: facts about sizes, and new terms in normal form."""

    facts: Facts

    def build(
        self, op: Any, args: tuple[Any, ...], shape: Any, like: Term, dtype: Any = None
    ) -> Term:
        """A term in normal form with the device, line and (unless given) the dtype of ``like``."""
        ...


@dataclass(frozen=True)
class Law:
    """An identity, applied from left to right.

    Attributes:
        name: Its name in reports and certificates.
        statement: The equation, with its side condition.
        kind: ``"exact"`` where both sides agree bit for bit, for −0.0, infinities, NaN and zero
            sizes too; ``"real"`` where they agree over the real numbers only.
        ops: The operators at the head of the left side.
        apply: The right side for a term that the left side matches and whose side condition holds;
            else None.
    """

    name: str
    statement: str
    kind: str
    ops: tuple[Any, ...]
    apply: Callable[[Term, Rewriter], Term | None]


def shape_of(term: Term) -> tuple[Any, ...]:
    """The term's sizes."""
    return term.sizes


def dtype_of(term: Term) -> Any:
    """The term's dtype."""
    return term.dtype
