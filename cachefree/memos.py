"""What code remembers outside of the model for its own convenience, and whether it matters.

A registry that is filled when a function first sees a type is state outside of the model, and yet
no call can tell whether it is filled. So entries that captures add to dicts, and that hold neither
tensors nor sizes, are accepted if every path that adds any adds the same ones, so that they are all
there or none, and every path is captured again with all of them in place, comes out as the same
graph, and adds nothing more.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from cachefree.errors import CaptureError, Refusal

__all__ = ["MEMOS", "Additions", "Memos", "added", "outside_state"]

Additions = dict[int, tuple[dict[Any, Any], dict[Any, Any]]]
"""By the dict's identity: the dict, and the entries that it gained."""

_DEPTH = 4
log = logging.getLogger(__name__)


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
    if isinstance(value, (type, bool, int, float, str, bytes, type(None))):
        return True
    if isinstance(value, ModuleType):  # an imported one is there for all, whatever it holds
        return sys.modules.get(value.__name__) is value
    sizes = (torch.SymInt, torch.SymFloat, torch.SymBool)
    if depth == 0 or isinstance(value, (torch.Tensor, torch.nn.Module, *sizes)):
        return False
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
        may_keep: Whether calls may leave something on the model for now, to be confirmed as what
            no result depends on.
        numbers_only: Whether only numbers may be left, since the paths ask for values of inputs:
            that no result depends on a tensor is not shown for such paths.
        kept: What they left, as the changes of the model's attributes.
        names: What was added to, in words.
    """

    is_open: bool = False
    may_keep: bool = False
    numbers_only: bool = False
    kept: list[Any] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    _additions: Additions = field(default_factory=dict)
    _keys: set[frozenset[tuple[int, Any]]] = field(default_factory=set)
    _idle: dict[tuple[int, Any], tuple[Any, Any, Any]] = field(default_factory=dict)
    _again: list[Callable[[], bool]] = field(default_factory=list)
    _shown: tuple[Any, ...] = ()

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
        self.may_keep = self.numbers_only = False
        self.kept.clear()
        self.names.clear()
        self._additions.clear()
        self._keys.clear()
        self._idle.clear()
        self._again.clear()
        self._shown = ()

    def note(self, additions: Additions, names: list[str], again: Callable[[], bool]) -> None:
        """Writes one capture down.

        Args:
            additions: What it added.
            names: To what, in words.
            again: Captures the path again; whether the same came out and nothing was added.
        """
        if additions:
            pairs = ((place, key) for place, (_, part) in additions.items() for key in part)
            self._keys.add(frozenset(pairs))
        for key, (container, entries) in additions.items():
            self._additions.setdefault(key, (container, {}))[1].update(entries)
        self.names += names
        self._again.append(again)

    def set_idle(self, settings: Iterable[tuple[Any, Any, Any]]) -> None:
        """Takes places of the model for such that no call reads.

        Args:
            settings: Each place's container and key, and what raises when it is read.
        """
        if self.is_open:
            self._idle |= {(id(part[0]), part[1]): part for part in settings}

    def is_idle(self, container: Any, key: Any) -> bool:
        """Whether a place is taken for one that no call reads."""
        return (id(container), key) in self._idle

    def idle_in(self, model: torch.nn.Module) -> Iterator[str]:
        """The names of a model's places that no call reads."""
        paths = {id(module): path for path, module in model.named_modules()}
        for container, key, _ in self._idle.values():
            if id(container) in paths:
                yield f"{paths[id(container)]}.{key}".lstrip(".")

    def set_idle_if_unread(self, settings: Iterable[tuple[Any, Any, Any]]) -> bool:
        """Takes places for such that no call reads, if no captured path reads them.

        Args:
            settings: As `set_idle` has it.
        """
        before = dict(self._idle)
        self.set_idle(settings)
        if self._is_same_with_all():
            return True
        self._idle = before
        return False

    def _is_same_with_all(self) -> bool:
        """Whether every path comes out as it was with all additions and idle places in place."""
        state = (len(self._again), *map(id, self._idle.values()), *self._additions)
        if state != self._shown:
            with self._in_place():
                if not all(map(_is_same, self._again)):
                    return False
            self._shown = state
        return True

    def _confirm(self) -> None:
        if len(self._keys) > 1:  # a call may then find some of them there and others not
            raise outside_state(self.names)
        if (self._additions or self._idle) and not self._is_same_with_all():
            read = [str(key) for _, key in self._idle]
            raise outside_state(self.names) if self.names else _kept_state(read)

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        for container, entries in self._additions.values():
            container.update(entries)
        idle = [(vars(container), key, value) for container, key, value in self._idle.values()]
        before = [held.get(key, self) for held, key, _ in idle]
        for held, key, value in idle:
            held[key] = value
        try:
            yield
        finally:
            for (held, key, _), value in zip(idle, before, strict=True):
                if value is self:
                    del held[key]
                else:
                    held[key] = value
            for container, entries in self._additions.values():
                for key in entries:
                    container.pop(key, None)


def _is_same(again: Callable[[], bool]) -> bool:
    try:
        return again()
    except Exception as error:  # noqa: BLE001 - what cannot be read was read
        log.debug("captured again: %s", error)
        return False


def _kept_state(names: list[str]) -> CaptureError:
    return CaptureError(
        Refusal(
            f"The model keeps state on itself: forward sets {', '.join(sorted(set(names))[:3])}.",
            why="What a call leaves on the module changes the next call, at some sizes only.",
            remedy="Pass it in and return it, as an argument of forward; or do not read it.",
        )
    )


MEMOS = Memos()
