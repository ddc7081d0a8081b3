"""How the next tokens are chosen in a file that generates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cachefree.errors import CacheFreeError, Refusal

__all__ = ["Beam", "Greedy"]


@dataclass(frozen=True)
class Greedy:
    """The likeliest token at each step.

    Attributes:
        eos_token_id: What ends a row, one id or several; None: nothing but the number of tokens.
        pad_token_id: What stands behind the end of a row; None: the (first) id that ends one.
    """

    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end a row."""
        if self.eos_token_id is None:
            return ()
        return (
            (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)
        )

    @property
    def fill(self) -> int:
        """What stands behind the end of a row."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        return self.ends[0] if self.ends else 0


@dataclass(frozen=True)
class Beam(Greedy):
    """Beam search by the rules of transformers.

    Attributes:
        num_beams: K, 2 or more.
        length_penalty: The power of its length that a beam's log probability is divided by.
        early_stopping: Whether a search ends as soon as K beams have ended.
    """

    num_beams: int = 4
    length_penalty: float = 1.0
    early_stopping: bool = False

    def __post_init__(self) -> None:
        if self.num_beams < 2:
            raise CacheFreeError(
                Refusal(
                    f"A search with {self.num_beams} beams is none.",
                    remedy="Use cachefree.Greedy, or num_beams=2 or more.",
                )
            )
