"""What a model's code holds outside of the model: globals, class attributes, default arguments.

A forward pass may count there, remember there, or draw from a generator that is there. While the
model is captured such writes would put fake tensors where the next call finds them, and what they
change is no part of a graph. `surroundings` puts all of it back, and tells what had changed.
Functions that are memoised by `functools` run as they are, so that they remember nothing.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import os
import pickle
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from cachefree.held_code import HeldCode, held_code
from cachefree.memos import Additions, added, outside_state
from cachefree.reach import (
    ABSENT,
    CONTAINERS,
    PLAIN,
    Memoised,
    Place,
    Reached,
    get,
    is_generator,
    is_iterator,
    put,
    reached_by,
)
from cachefree.recorders import only_written
from cachefree.remembered import memory_of
from cachefree.structure import flatten

__all__ = ["Outside", "surroundings", "unmoved"]


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
    code = held_code(model)
    found_there = reached_by(model)
    before = [(place, get(place), _contents(get(place))) for place in found_there.places]
    own = [(cls, set(vars(cls))) for cls in found_there.classes]
    generators = [*_generators(model, before), *_numpy()]
    states = [(generator, pickle.dumps(_state(generator))) for generator in generators]
    written = only_written(model)
    remembering = _remembering(model, found_there, code, written)
    memories = memory_of(value for _, value in remembering)
    environment = dict(os.environ)
    results: list[tuple[str, Any, Any]] = []
    for place, value, _ in before:
        plain = _unmemoised(value, place[2], results)
        if plain is not value:
            put(place, plain)
    iterators = [*_iterators(model, before)]
    for place, _, twin in iterators:
        put(place, twin)
    try:
        yield found
    finally:
        others = [*_put_iterators_back(iterators)]
        others += [name for name, value, was in results if not _holds(value, was)]
        others += _new_names(own)
        for place, value, contents in before:
            gained = added(get(place), contents) if get(place) is value else None
            if _put_back(place, value, contents) and id(value) not in written:
                found.changes.append(place[2])
                if gained is None or found.additions is None:
                    found.additions = None
                else:
                    found.additions[id(value)] = (value, gained)
        for generator, state in states:
            if pickle.dumps(_state(generator)) != state:
                found.drew_random = True
                _restore_state(generator, pickle.loads(state))
        now = memory_of(value for _, value in remembering)
        others += [
            name
            for (name, _), was, told in zip(remembering, memories, now, strict=True)
            if told != was
        ]
        if dict(os.environ) != environment:
            others.append("os.environ")
            os.environ.clear()
            os.environ.update(environment)
        if others:
            found.changes += others
            found.additions = None


@contextlib.contextmanager
def unmoved(model: torch.nn.Module) -> Iterator[None]:
    """Sees to it that nothing that cannot be put back has changed when the block ends.

    Raises:
        CaptureError: something has, in a run whose outcome was not looked at.
    """
    code = held_code(model)
    remembering = [*code.opaque, *((part.__qualname__, part) for part in code.functions)]
    before = memory_of(value for _, value in remembering)
    yield
    now = memory_of(value for _, value in remembering)
    names = [
        name for (name, _), was, told in zip(remembering, before, now, strict=True) if told != was
    ]
    if names:
        raise outside_state(names)


def _remembering(
    model: torch.nn.Module, found_there: Reached, code: HeldCode, written: Collection[int]
) -> list[tuple[str, Any]]:
    """All that is reached or held and has no place that could be put back."""
    skipped = {*map(id, model.modules()), *written}
    return [
        *((name, value) for name, value in found_there.others if id(value) not in skipped),
        *code.opaque,
    ]


def _new_names(own: list[tuple[type, set[str]]]) -> Iterator[str]:
    """Takes what was added to classes away again."""
    for cls, names in own:
        for name in set(vars(cls)) - names:
            if not name.startswith("__"):  # Python's own, such as what copying remembers
                delattr(cls, name)
                yield f"{cls.__name__}.{name}"


def _put_iterators_back(iterators: list[tuple[Place, Any, Any]]) -> Iterator[str]:
    """The names of the iterators whose twins were moved on."""
    for place, value, twin in iterators:
        put(place, value)
        if _told(twin) != _told(value) or _told(value) is None:
            yield place[2]


def _put_back(place: Place, value: Any, contents: Any) -> bool:
    """Puts one name back; whether it had changed."""
    now = get(place)
    if is_memoised(value):
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


def is_memoised(value: Any) -> bool:
    """Whether a value is a function that ``functools`` memoises."""
    return isinstance(getattr(value, "__func__", value), Memoised)


def _unmemoised(value: Any, name: str, results: list[tuple[str, Any, Any]]) -> Any:
    """A memoised function as it is without; what it gives that can be changed is kept."""
    if isinstance(value, (staticmethod, classmethod)) and is_memoised(value):
        memoised: Any = value.__func__
        return type(value)(_recorded(memoised, name, results))
    if isinstance(value, Memoised):
        return _recorded(value, name, results)
    return value


def _recorded(memoised: Any, name: str, results: list[tuple[str, Any, Any]]) -> Callable[..., Any]:
    function = memoised.__wrapped__

    @functools.wraps(function)
    def plain(*args: Any, **kwargs: Any) -> Any:
        value = function(*args, **kwargs)
        if _is_stale(memoised, args):
            raise outside_state([f"what {name} remembers, which it would not give any more"])
        contents = _contents(value)
        if contents is not None:
            results.append((f"what {name} remembers", value, contents))
        return value

    return plain


def _is_stale(memoised: Any, args: tuple[Any, ...]) -> bool:
    """Whether a memoised function remembers another value than it would give now.

    It reads something else that has changed since, such as a global. A call of it is safe where it
    remembers, and changes nothing then.
    """
    key = args[0] if len(args) == 1 and type(args[0]) in (int, str) else args
    try:
        if not any(type(held) is dict and key in held for held in gc.get_referents(memoised)):
            return False
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            was, now = flatten(memoised(*args)), flatten(memoised.__wrapped__(*args))
            is_other = was[1].difference(now[1]) is not None
            return is_other or not all(map(_is_equal, was[0], now[0]))
    except Exception:  # noqa: BLE001 - sizes are no keys, and fake tensors have no values
        return False


def _is_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    is_alike = one.dtype == other.dtype and one.shape == other.shape
    return is_alike and torch.equal(one.nan_to_num(), other.nan_to_num())


def _iterators(
    model: torch.nn.Module, places: list[tuple[Place, Any, Any]]
) -> Iterator[tuple[Place, Any, Any]]:
    """The places of iterators, each with a twin that may be moved on in its stead."""
    held: list[Place] = [
        (vars(module), name, f"{type(module).__name__}.{name}")
        for module in model.modules()
        for name in vars(module)
    ]
    for place in (*(place for place, _, _ in places), *held):
        value = get(place)
        if is_iterator(value):
            try:
                yield place, value, copy.copy(value)
            except TypeError:
                yield place, value, value


def _told(iterator: Any) -> bytes | None:
    """How far an iterator has come; None where it does not tell."""
    try:
        return pickle.dumps(iterator)
    except Exception:  # noqa: BLE001 - a generator, or one over objects that cannot be pickled
        return None


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
