"""What each law is tried on, and what it must leave alone; one entry a law, one file a family."""

from __future__ import annotations

from dataclasses import dataclass

from .equations import Instance


@dataclass(frozen=True)
class Tried:
    """The instances of a law: where it applies, and near misses where it must not."""

    applies: tuple[Instance, ...]
    near_misses: tuple[Instance, ...]


Family = dict[str, Tried]
