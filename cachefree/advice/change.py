"""A change of a user's file, shown as a diff."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cachefree.report.source import short

__all__ = ["Change", "apply"]


@dataclass(frozen=True)
class Change:
    """Lines of a file, and what should stand there.

    Attributes:
        why: In a sentence: what it is good for, and what it changes.
        file: The file; empty for the call of cachefree itself.
        line: The number of the first line.
        before: The lines as they are.
        after: The lines as they should be; none where they go.
    """

    why: str
    file: str
    line: int
    before: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def diff(self) -> str:
        """The change as a unified diff."""
        name = short(self.file) if self.file else "the call"
        lines = list(
            difflib.unified_diff(
                self.before, self.after, name, name, lineterm="", n=len(self.before)
            )
        )
        if self.file and len(lines) > 2:
            counts = ",".join(str(len(side)) for side in (self.before, self.after))
            old, new = counts.split(",")
            lines[2] = f"@@ -{self.line},{old} +{self.line},{new} @@"
        return "\n".join(lines)


def apply(changes: Iterable[Change], source: str) -> str:
    r"""A file's text with the changes made.

    Raises:
        ValueError: the lines are others now.

    Example:
        >>> change = Change("A new tensor.", "model.py", 2, ("k.mul_(2)",), ("k = k.mul(2)",))
        >>> print(change.diff)
        --- model.py
        +++ model.py
        @@ -2,1 +2,1 @@
        -k.mul_(2)
        +k = k.mul(2)
        >>> apply([change], "k = x\nk.mul_(2)\n")
        'k = x\nk = k.mul(2)\n'
    """
    lines: list[str] = source.splitlines()
    for change in sorted(changes, key=lambda change: change.line, reverse=True):
        start = change.line - 1
        end = start + len(change.before)
        if tuple(lines[start:end]) != change.before:
            raise ValueError(f"line {change.line} is not what the change was made for")
        lines[start:end] = _kept(change.after)
    return "\n".join(lines) + "\n"


def _kept(lines: Sequence[str]) -> list[str]:
    return list(lines)
