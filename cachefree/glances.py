"""What stands in many places, read at every call: with few steps in Python, and few in memory.

A decode step leaves nothing of a model's dicts in the processor's caches, so that every object that
is touched on the way to an answer costs as much as hundreds of steps.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

__all__ = ["Identities", "Readings"]

_all = itertools.chain.from_iterable


class Readings:
    """Entries of dicts and attributes of objects; those of the same names are read in one go."""

    def __init__(self) -> None:
        self._groups: dict[Any, tuple[Callable[[Any], Iterable[Any]], list[Any]]] = {}

    def items(self, namespace: Mapping[str, Any], names: Iterable[str]) -> None:
        """Adds what a dict has under some names."""
        self._add(operator.itemgetter, namespace, tuple(names))

    def attributes(self, value: Any, *names: str) -> None:
        """Adds attributes of an object."""
        self._add(operator.attrgetter, value, names)

    def calls(self, function: Callable[[Any], Iterable[Any]], value: Any) -> None:
        """Adds what a function gives for a value."""
        self._groups.setdefault(function, (function, []))[1].append(value)

    def _add(self, getter: Callable[..., Any], namespace: Any, names: tuple[str, ...]) -> None:
        if not names:
            return
        key = getter, names
        if key not in self._groups:
            # one name alone would be read as itself, not as a tuple of one
            self._groups[key] = getter(*names, names[0]), []
        self._groups[key][1].append(namespace)

    def now(self) -> Iterator[Any]:
        """What stands there, always in one order.

        Raises:
            KeyError: a name is gone.
            ValueError: a closure's cell is empty.
        """
        return _all(_all(map(read, namespaces)) for read, namespaces in self._groups.values())


class Identities:
    """Notices when dicts hold other objects.

    Args:
        namespaces: The dicts.
        is_kept: Whether what they hold is kept alive, so that no other object gets its identity.
        are_named: Whether another name of the same object counts.
    """

    def __init__(
        self,
        namespaces: Iterable[Mapping[Any, Any]],
        *,
        is_kept: bool = True,
        are_named: bool = False,
    ) -> None:
        every = list(namespaces)
        self._named = [namespace for namespace in every if namespace] if are_named else []
        self._names = list(_all(self._named))
        self._empty = [namespace for namespace in every if not namespace]
        self._views = [namespace.values() for namespace in every if namespace]
        held = list(_all(self._views))
        self._known = list(map(id, held))
        self._is_there = [value is not None for value in held]
        self._kept = held if is_kept else []

    def have_changed(self) -> bool:
        """Whether any of them does."""
        if any(self._empty) or list(map(id, _all(self._views))) != self._known:
            return True
        return list(_all(self._named)) != self._names

    def held(self) -> Iterator[Any]:
        """What they hold and is not None, while nothing has changed."""
        return itertools.compress(_all(self._views), self._is_there)
