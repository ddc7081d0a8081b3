"""What a rule is: one family of cache branches, closed by an edit of the later path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cachefree.laws import Law
from cachefree.terms import Table, Term

__all__ = ["Closing", "close"]


@dataclass(frozen=True)
class Closing:
    """An edit of the later path that closes a divergence.

    Attributes:
        rule: The rule's name.
        outputs: The edited outputs.
        term: The first path's value that was met.
        laws: Laws that the edit itself needs.
    """

    rule: str
    outputs: tuple[Term, ...]
    term: Term
    laws: tuple[Law, ...] = ()


def close(table: Table, outputs: Sequence[Term], kinds: Any, surveys: Any) -> Closing | None:
    """The first edit that a rule offers for a divergence; None where no rule matches."""
    return None
