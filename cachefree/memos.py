"""What code remembers outside of the model for its own convenience, and whether it matters.

A registry that is filled when a function first sees a type is state outside of the model, and yet
no call can tell whether it is filled. So entries that captures add to dicts, and that hold neither
tensors nor sizes, are accepted if every path is captured again with all of them in place, comes out
as the same graph, and adds nothing more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from cachefree.errors import CaptureError, Refusal

__all__ = ["MEMOS", "Additions", "Memos", "added", "outside_state"]

Additions = dict[int, tuple[dict[Any, Any], dict[Any, Any]]]
"""By the dict's identity: the dict, and the entries that it gained."""

_DEPTH = 4


def added(value: Any, contents: Any) -> dict[Any, Any] | None:
    """The entries that a dict gained; None where anything else happened to it."""
    if type(value) is not dict or any(
        value.get(key, contents) is not part for key, part in contents.items()
    ):
        return None
    gained = {key: part for key, part in value.items() if key not in contents}
    is_plain = all(_is_plain(key) and _is_plain(part) for key, part in gained.items())
    return gained if is_plain else None


def _is_plain(value: Any, depth: int = _DEPTH) -> bool:
    """Whether nothing that a call computes is in a value."""
    if isinstance(value, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return False
    if depth == 0 or isinstance(value, (type, torch.nn.Module)):
        return not isinstance(value, torch.nn.Module)
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(_is_plain(part, depth - 1) for part in value)
    if isinstance(value, Mapping):
        return all(_is_plain(part, depth - 1) for pair in value.items() for part in pair)
    held = getattr(value, "__dict__", {})
    return all(_is_plain(part, depth - 1) for part in held.values())


def outside_state(names: list[str]) -> CaptureError:
    """The refusal of state that a model keeps outside of itself."""
    return CaptureError(
        Refusal(
            "The model keeps state outside of itself: forward changes "
            f"{', '.join(sorted(set(names)))}.",
            why="What a call leaves there changes the next call; a graph has no memory.",
            remedy="Pass it in and return it, as an argument of forward.",
        )
    )


@dataclass
class Memos:
    """The additions of all captures of one rewrite, and how to capture each path again.

    Attributes:
        is_open: Whether additions are accepted now, to be confirmed in the end.
        names: What was added to, in words.
    """

    is_open: bool = False
    names: list[str] = field(default_factory=list)
    _additions: Additions = field(default_factory=dict)
    _again: list[Callable[[], bool]] = field(default_factory=list)

    @contextlib.contextmanager
    def confirmed(self) -> Iterator[None]:
        """Accepts additions in the block, and confirms in the end that they do not matter.

        Raises:
            CaptureError: they do.
        """
        self._clear(is_open=True)
        try:
            yield
            self._confirm()
        finally:
            self._clear(is_open=False)

    def _clear(self, *, is_open: bool) -> None:
        self.is_open = is_open
        self.names.clear()
        self._additions.clear()
        self._again.clear()

    def note(self, additions: Additions, names: list[str], again: Callable[[], bool]) -> None:
        """Writes one capture down.

        Args:
            additions: What it added.
            names: To what, in words.
            again: Captures the path again; whether the same came out and nothing was added.
        """
        for key, (container, entries) in additions.items():
            self._additions.setdefault(key, (container, {}))[1].update(entries)
        self.names += names
        self._again.append(again)

    def _confirm(self) -> None:
        if self._additions:
            with self._in_place():
                is_same = all(again() for again in self._again)
            if not is_same:
                raise outside_state(self.names)

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        for container, entries in self._additions.values():
            container.update(entries)
        try:
            yield
        finally:
            for container, entries in self._additions.values():
                for key in entries:
                    container.pop(key, None)


MEMOS = Memos()
