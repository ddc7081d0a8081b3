"""The branches of the user's code that the one graph does not have any more."""

from __future__ import annotations

from typing import Any

from cachefree.report import Branch

__all__ = ["removed_branches"]


def removed_branches(model: Any, discovery: Any, certified: Any) -> tuple[Branch, ...]:
    """The branches that the two paths took differently."""
    return ()
