"""What a model's code holds outside of the model: globals, class attributes, default arguments.

A forward pass may count there, remember there, or draw from a generator that is there. While the
model is captured such writes would put fake tensors where the next call finds them, and what they
change is no part of a graph. `surroundings` puts all of it back, and tells what had changed.
Functions that are memoised by `functools` run as they are, so that they remember nothing.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from cachefree.memos import Additions, added
from cachefree.reach import (
    ABSENT,
    CONTAINERS,
    PLAIN,
    Memoised,
    Place,
    get,
    is_generator,
    put,
    reached,
)

__all__ = ["Outside", "forget", "surroundings"]


@dataclass
class Outside:
    """What `surroundings` found when the block was left.

    Attributes:
        changes: The names that hold something else, or other contents.
        drew_random: Whether a generator of random numbers has moved on.
        additions: What dicts gained; None where a change was more than that.
    """

    changes: list[str] = field(default_factory=list)
    additions: Additions | None = field(default_factory=dict)
    drew_random: bool = False


@contextlib.contextmanager
def surroundings(model: torch.nn.Module) -> Iterator[Outside]:
    """Puts what the model's code reaches outside of the model back, whatever the block does."""
    found = Outside()
    classes = tuple(dict.fromkeys(type(module) for module in model.modules()))
    found_there = reached(classes)
    before = [(place, get(place), _contents(get(place))) for place in found_there.places]
    own = [(cls, set(vars(cls))) for cls in found_there.classes]
    generators = [*_generators(model, before), *_numpy()]
    states = [(generator, pickle.dumps(_state(generator))) for generator in generators]
    for place, value, _ in before:
        plain = _unmemoised(value)
        if plain is not value:
            put(place, plain)
    try:
        yield found
    finally:
        for cls, names in own:
            for name in set(vars(cls)) - names:
                if name.startswith("__"):
                    continue  # Python's own, such as what copying remembers
                found.changes.append(f"{cls.__name__}.{name}")
                found.additions = None
                delattr(cls, name)
        for place, value, contents in before:
            gained = added(get(place), contents) if get(place) is value else None
            if _put_back(place, value, contents) and not found_there.is_only_written(place):
                found.changes.append(place[2])
                if gained is None or found.additions is None:
                    found.additions = None
                else:
                    found.additions[id(value)] = (value, gained)
        for generator, state in states:
            if pickle.dumps(_state(generator)) != state:
                found.drew_random = True
                _restore_state(generator, pickle.loads(state))


def forget() -> None:
    """Looks again at what code reaches: globals may hold other objects by now."""
    reached.cache_clear()


def _put_back(place: Place, value: Any, contents: Any) -> bool:
    """Puts one name back; whether it had changed."""
    now = get(place)
    if _unmemoised(value) is not value:
        put(place, value)
        return False
    is_same = now is value or (isinstance(value, PLAIN) and type(now) is type(value))
    changed = not (is_same and (now is value or now == value))
    if changed:
        put(place, value)
    if contents is not None and not _holds(value, contents):
        changed = True
        value.clear()
        if isinstance(value, (dict, set)):
            value.update(contents)
        else:
            value.extend(contents)
    return changed


def _unmemoised(value: Any) -> Any:
    if isinstance(value, Memoised):
        return value.__wrapped__
    if isinstance(value, staticmethod) and isinstance(value.__func__, Memoised):
        return staticmethod(value.__func__.__wrapped__)
    return value


def _contents(value: Any) -> Any:
    return value.copy() if type(value) in CONTAINERS else None


def _holds(value: Any, contents: Any) -> bool:
    if len(value) != len(contents):
        return False
    if isinstance(value, dict):
        return all(value.get(key, ABSENT) is part for key, part in contents.items())
    if isinstance(value, set):
        return bool(value == contents)
    return all(one is other for one, other in zip(value, contents, strict=True))


# Generators of random numbers, told by what they can do: no package is imported for them.


def _generators(model: torch.nn.Module, places: list[tuple[Place, Any, Any]]) -> list[Any]:
    held = [part for module in model.modules() for part in vars(module).values()]
    found = {id(v): v for v in (*(value for _, value, _ in places), *held) if is_generator(v)}
    return [value for value in found.values() if _state(value) is not None]


def _numpy() -> list[Any]:
    numpy = sys.modules.get("numpy.random")
    shared = getattr(getattr(numpy, "mtrand", None), "_rand", None)
    return [shared] if shared is not None else []


def _state(generator: Any) -> Any:
    try:
        if hasattr(generator, "bit_generator"):
            return generator.bit_generator.state
        if hasattr(generator, "getstate"):
            return generator.getstate()
        return generator.get_state()
    except Exception:  # noqa: BLE001 - an object of the user's that has such a method by chance
        return None


def _restore_state(generator: Any, state: Any) -> None:
    if hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    elif hasattr(generator, "setstate"):
        generator.setstate(state)
    elif hasattr(generator, "set_state"):
        generator.set_state(state)
