"""Running a model without leaving a trace on it, on torch or on the process.

A forward pass may write to its module: caches, counters, buffers. While a model is captured those
writes would put fake tensors there. `untouched` remembers every attribute of every module, and what
plain containers in them hold, puts all of it back, and tells what had changed.
"""

from __future__ import annotations

import contextlib
import functools
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch

from cachefree.memos import Additions
from cachefree.scripted import run_as_written
from cachefree.surroundings import Outside, surroundings

__all__ = ["NOTHING", "StateChange", "is_plain_object", "one_at_a_time", "untouched"]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_one_thread = threading.RLock()
_CONTAINERS = (list, dict, set, deque)
_FOREIGN = ("builtins", "torch", "collections", "threading", "functools")
NOTHING = object()


def one_at_a_time(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Lets one thread into ``function``: torch traces, warns and draws for the whole process.

    Inside, tensors have values, in a block of ``torch.device("meta")`` too, and scripted functions
    are run as they were written.
    """

    @functools.wraps(function)
    def alone(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with _one_thread, run_as_written(), contextlib.ExitStack() as stack:
            if torch.get_default_device().type == "meta":
                stack.enter_context(torch.device("cpu"))
            return function(*args, **kwargs)

    return alone


@dataclass(frozen=True)
class StateChange:
    """An attribute that a forward pass set.

    Attributes:
        module: The qualified name of the module, ``""`` for the model itself.
        attribute: The attribute's name.
        before: What it held.
        after: What the forward pass left there.
    """

    module: str
    attribute: str
    before: Any
    after: Any

    @property
    def path(self) -> str:
        """``module.attribute``."""
        return f"{self.module}.{self.attribute}" if self.module else self.attribute


@dataclass
class Trace:
    """What `untouched` found when the block was left."""

    changes: list[StateChange] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    additions: Additions | None = None
    drew_random: bool = False


@contextlib.contextmanager
def untouched(model: torch.nn.Module) -> Iterator[Trace]:
    """Puts the model's attributes and all random states back, whatever the block does.

    Yields:
        A `Trace` whose ``changes`` are filled in when the block ends.
    """
    trace = Trace()
    before = {name: _remember(module) for name, module in model.named_modules()}
    modules = dict(model.named_modules())
    random_states = (random.getstate(), torch.random.get_rng_state())
    tracked = [(tensor, tensor.requires_grad) for tensor in (*model.parameters(), *model.buffers())]
    outside = Outside()
    try:
        with surroundings(model) as outside, _casts_forgotten():
            yield trace
    finally:
        trace.outside, trace.additions = outside.changes, outside.additions
        for tensor, requires_grad in tracked:
            if tensor.requires_grad != requires_grad:  # it was written to, as autograd sees it
                tensor.detach_().requires_grad_(requires_grad)
        trace.drew_random = outside.drew_random or random.getstate() != random_states[0]
        random.setstate(random_states[0])
        torch.random.set_rng_state(random_states[1])
        for name, module in modules.items():
            trace.changes += _put_back(name, module, before[name])
        trace.changes = [change for change in trace.changes if not _is_memo(modules, change)]


@contextlib.contextmanager
def _casts_forgotten() -> Iterator[None]:
    """Keeps autocast from remembering a weight that was cast while it stood for a fake one."""
    is_enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(is_enabled)


def _is_memo(modules: dict[str, torch.nn.Module], change: StateChange) -> bool:
    """Whether a change is what a ``functools.cached_property`` remembers."""
    kind = type(modules[change.module])
    return isinstance(getattr(kind, change.attribute, None), functools.cached_property)


_COPIES: dict[type, Any] = {list: list, deque: list, dict: dict, set: set}
_ATOMS = frozenset((bool, int, float, str, torch.Tensor, torch.nn.Parameter, type(None)))


def _remember(module: torch.nn.Module) -> dict[str, tuple[Any, Any]]:
    return {name: (value, _contents(value)) for name, value in vars(module).items()}


def _contents(value: Any, above: tuple[int, ...] = ()) -> Any:
    """A copy of the containers and plain objects in ``value``; the rest by reference."""
    if type(value) in _ATOMS or id(value) in above:
        return None
    if type(value) in _CONTAINERS and not value:
        return _COPIES[type(value)]()
    above = (*above, id(value))
    if is_plain_object(value):
        return {key: (part, _contents(part, above)) for key, part in vars(value).items()}
    if isinstance(value, dict):
        return {key: (part, _contents(part, above)) for key, part in value.items()}
    if isinstance(value, (list, deque, tuple)):
        return [(part, _contents(part, above)) for part in value]
    if isinstance(value, set):
        return set(value)
    return None


def is_plain_object(value: Any) -> bool:
    """Whether a value is an object of the user's that holds its state in attributes."""
    kind: Any = type(value)
    return _may_be_plain(kind) and hasattr(value, "__dict__")


@functools.lru_cache(maxsize=4096)
def _may_be_plain(kind: Any) -> bool:
    is_other = issubclass(kind, (torch.nn.Module, torch.Tensor, type))
    return not is_other and kind.__module__.split(".")[0] not in _FOREIGN


def _put_back(
    name: str, module: torch.nn.Module, before: dict[str, tuple[Any, Any]]
) -> list[StateChange]:
    state = vars(module)
    added = [attribute for attribute in state if attribute not in before]
    changes = [StateChange(name, attribute, NOTHING, state.pop(attribute)) for attribute in added]
    for attribute, (value, contents) in before.items():
        now = state.get(attribute, NOTHING)
        if now is not value:
            changes.append(StateChange(name, attribute, value, now))
            state[attribute] = value
        elif _holds(value, contents):
            continue
        else:
            changes.append(StateChange(name, attribute, _shallow(contents), _copied(value)))
        _restore(value, contents)
    return changes


def _holds(value: Any, contents: Any) -> bool:
    if contents is None:
        return True
    if is_plain_object(value):
        value = vars(value)
    if isinstance(value, dict):
        return value.keys() == contents.keys() and all(
            value[key] is part and _holds(part, below) for key, (part, below) in contents.items()
        )
    if isinstance(value, (list, deque, tuple)):
        return len(value) == len(contents) and all(
            now is part and _holds(part, below)
            for now, (part, below) in zip(value, contents, strict=True)
        )
    if isinstance(value, set):
        return bool(value == contents)
    return True


def _restore(value: Any, contents: Any) -> None:
    if contents is None:
        return
    if is_plain_object(value):
        value = vars(value)
    if isinstance(value, dict):
        if not _holds(value, contents):
            for part, below in contents.values():
                _restore(part, below)
            value.clear()
            value.update({key: part for key, (part, _) in contents.items()})
    elif isinstance(value, (list, deque, tuple)):
        if not _holds(value, contents):
            for part, below in contents:
                _restore(part, below)
            if not isinstance(value, tuple):
                value.clear()
                value.extend(part for part, _ in contents)
    elif isinstance(value, set) and value != contents:
        value.clear()
        value.update(contents)


def _shallow(contents: Any) -> Any:
    if isinstance(contents, dict):
        return {key: part for key, (part, _) in contents.items()}
    if isinstance(contents, list):
        return [part for part, _ in contents]
    return contents


def _copied(value: Any) -> Any:
    if is_plain_object(value):
        return dict(vars(value))
    return value.copy() if isinstance(value, _CONTAINERS) else value
