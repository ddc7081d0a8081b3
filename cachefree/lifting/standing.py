"""Where a model keeps its state, and what stands there when it is rewritten."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from cachefree.lifting.contents import ABSENT, Place, entries, lookup, put
from cachefree.lifting.lifted import Lifted
from cachefree.lifting.plan import describe
from cachefree.lifting.roots import roots_of

__all__ = ["Standing"]


class Standing:
    """What a rewrite starts from, which calls of the model itself change.

    Args:
        subject: What was rewritten: a lifted model, or any other.

    Attributes:
        paths: The places of the state, as Python writes them.
        holders: The objects that hold it and are no modules.
    """

    def __init__(self, subject: nn.Module) -> None:
        self._starts: dict[Place, Any] = {}
        self.paths: frozenset[str] = frozenset()
        self.holders: list[Any] = []
        if not isinstance(subject, Lifted):
            return
        roots, plan = roots_of(subject.model), subject.plan
        arguments = {argument.name for argument in plan.arguments}
        places = [*(slot.place for slot in plan.slots), *plan.idle]
        own = [place for place in places if place.root not in arguments]
        self.paths = frozenset(map(describe, places))
        held = [lookup(roots[place.root], place.steps[:-1]) for place in own]
        self.holders = [holder for holder in held if not isinstance(holder, nn.Module)]
        self._starts = {
            slot.place: lookup(roots[slot.place.root], slot.place.steps)
            for slot in plan.slots
            if slot.kind == "entry" and slot.place in own
        }

    @contextlib.contextmanager
    def again(self, model: nn.Module) -> Iterator[None]:
        """Puts what stood there back into the model for as long as the block lasts."""
        roots = roots_of(model)
        before = []
        for place, value in self._starts.items():
            holder = lookup(roots[place.root], place.steps[:-1]) if place.root in roots else ABSENT
            if holder is not ABSENT and entries(holder) is not None:
                before.append((holder, place.steps[-1], lookup(holder, place.steps[-1:])))
                put(holder, place.steps[-1], value)
        try:
            yield
        finally:
            for holder, key, value in reversed(before):
                put(holder, key, value)
