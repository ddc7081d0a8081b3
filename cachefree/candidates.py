"""Which places of a call could carry the cache, and which parts of a result could feed them."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from cachefree.inputs import CACHE_NAMES
from cachefree.places import (
    Link,
    Place,
    Selector,
    empty_entries,
    is_empty,
    regrouped,
    select,
    selectors,
)
from cachefree.structure import flatten

__all__ = ["BY_ORDER", "candidates", "namesakes"]

BY_ORDER = -9.0
"""How likely links are that nothing but their order tells."""


def candidates(
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    result: Any,
    wanted: tuple[str, ...],
    named: Sequence[tuple[str, Selector]] = (),
) -> Iterator[tuple[float, tuple[Link, ...]]]:
    """Places that could carry the cache, with what could feed them, likeliest first.

    Args:
        signature: The signature of the model's forward.
        args: Positional arguments of the first call.
        kwargs: Keyword arguments of the first call.
        result: What the first call returns.
        wanted: Names of the cache's arguments; empty where they are not known.
        named: Parts of the result with the names that they have in it.

    Returns:
        How likely the links are (3 and more: by name; `BY_ORDER`: by that alone), and the links.
    """
    places = _places(signature, args, kwargs, wanted)
    places += _absent_entries(signature, args, kwargs, result)
    parts = list(selectors(result))
    if wanted and len(wanted) > 1:
        chosen = [
            place
            for name in wanted
            for place in places
            if place.path == name or place.parameter == name
        ]
        yield from _by_name(chosen, named)
        yield from _joint(chosen, parts)
        return
    ranked: list[tuple[float, tuple[Link, ...]]] = []
    for place in places:
        for selector in parts:
            score = 3.0 if CACHE_NAMES.search(place.path) else 0.0
            closeness = _closeness(place, selector, result)
            ranked.append((score + closeness, (Link(place, selector),)))
        if CACHE_NAMES.search(place.path) or wanted:
            ranked += [(2.5, (Link(place, selector),)) for selector in regrouped(result)]
    ranked += _throughout(places, parts, result)
    yield from sorted(ranked, key=lambda pair: -pair[0])
    if not wanted:
        of_cache = [place for place in places if CACHE_NAMES.search(place.path)]
        yield from _by_name(of_cache, named)
        yield from _joint(of_cache, parts)
        yield from _by_name(places, named, score=0.0)
        yield from _behind(places, parts)


def namesakes(model: nn.Module, result: Any) -> Iterator[tuple[str, Selector]]:
    """The parts of a result that hold tensors, by the names that they have in it.

    Those of a tuple are the names of the variables that the code returns.
    """
    names: list[tuple[str, Selector]] = []
    if type(result) is tuple:
        for returned in _returned(model):
            if len(returned) == len(result):
                names += [(name, (place,)) for place, name in enumerate(returned) if name]
    elif isinstance(result, Mapping):
        names = [(key, (key,)) for key in result if isinstance(key, str)]
    else:
        names = [(name, (name,)) for name in getattr(result, "_fields", _attributes_of(result))]
    for name, selector in dict.fromkeys(names):
        if flatten(select(result, selector))[0]:
            yield name, selector


def _attributes_of(value: Any) -> tuple[str, ...]:
    """The names of an object's attributes."""
    return tuple(getattr(value, "__dict__", ()))


def _returned(model: nn.Module) -> Iterator[list[str]]:
    """The names in each tuple that the model's code returns; empty for what is no name."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(model.forward)))
        tree = ast.parse(source)
    except (OSError, TypeError, SyntaxError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
            yield [part.id if isinstance(part, ast.Name) else "" for part in node.value.elts]


def _throughout(
    places: list[Place], parts: list[Selector], result: Any
) -> Iterator[tuple[float, tuple[Link, ...]]]:
    """All empty entries of one argument at once, fed by the same entries of a part of the result.

    ``[(None, zeros), (None, zeros)]`` takes ``[(state, window), (state, window)]``.
    """
    for name in dict.fromkeys(place.parameter for place in places):
        inside = [place for place in places if place.parameter == name and place.steps]
        for selector in parts if len(inside) > 1 else ():
            try:
                for place in inside:
                    select(result, (*selector, *place.steps))
            except (TypeError, KeyError, IndexError, AttributeError):
                continue
            links = tuple(Link(place, (*selector, *place.steps)) for place in inside)
            score = 3.5 if CACHE_NAMES.search(name) else 0.5
            yield score - 0.02 * len(selector), links


_SAYS_WHEN = re.compile(
    r"^(new|next|updated|last|cur|current|out|present)_|_(new|next|updated|last|out|t|n|1)$"
)


def _by_name(
    places: list[Place], named: Sequence[tuple[str, Selector]], score: float = 3.0
) -> Iterator[tuple[float, tuple[Link, ...]]]:
    """Several arguments at once, fed by the entries of the result that are named as they are.

    ``return y, new_c, new_h`` feeds ``h`` and ``c``, whichever comes first.
    """
    by_name = {_SAYS_WHEN.sub("", name): selector for name, selector in named}
    links = tuple(
        Link(place, by_name[name])
        for place in places
        if (name := _SAYS_WHEN.sub("", place.path)) in by_name
    )
    if len(links) > 1 and len({link.selector for link in links}) == len(links):
        yield score, links


def _joint(places: list[Place], parts: list[Selector]) -> Iterator[tuple[float, tuple[Link, ...]]]:
    """Several arguments at once, fed by as many neighbouring entries of the result."""
    entries = [
        selector for selector in parts if len(selector) == 1 and not isinstance(selector[0], tuple)
    ]
    for count in range(len(places), 1, -1):
        for start in range(len(entries) - count + 1):
            links = tuple(
                Link(place, entry)
                for place, entry in zip(places[:count], entries[start : start + count], strict=True)
            )
            yield 3.0, links


def _behind(places: list[Place], parts: list[Selector]) -> Iterator[tuple[float, tuple[Link, ...]]]:
    """The last arguments, fed by what stands behind the first results: ``return y, *new``."""
    entries = [selector for selector in parts if len(selector) == 1 and type(selector[0]) is int]
    for count in range(min(len(places), len(entries) - 1), 1, -1):
        pairs = zip(places[-count:], entries[-count:], strict=True)
        yield BY_ORDER, tuple(Link(place, entry) for place, entry in pairs)


def _places(
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    wanted: tuple[str, ...],
) -> list[Place]:
    """Arguments, and entries inside given ones, that may still take something."""
    found: list[Place] = []
    for position, (name, parameter) in enumerate(signature.parameters.items()):
        if wanted and not any(w == name or w.startswith((name + ".", name + "[")) for w in wanted):
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            if len(args) <= position:
                found.append(Place(name, is_variadic=True))
            continue
        if parameter.kind is parameter.VAR_KEYWORD or (_is_flag(parameter) and not wanted):
            continue
        is_given = position < len(args) or name in kwargs
        value = args[position] if position < len(args) else kwargs.get(name, parameter.default)
        at = position if position < len(args) else None
        if is_given and isinstance(value, (dict, list, tuple)) and value:
            found += [Place(name, at, steps) for steps in empty_entries(value)]
        elif (
            is_empty(value)
            or (not is_given and parameter.default is parameter.empty)
            or (value is False and CACHE_NAMES.search(name) and not _SAYS_WHETHER.match(name))
        ):
            found.append(Place(name, at))
    return found


def _is_named_as_cache(name: str) -> bool:
    """Whether a name is that of a cache, and not of a flag that is about one."""
    return CACHE_NAMES.search(name) is not None and _SAYS_WHETHER.match(name) is None


_SAYS_WHETHER = re.compile(r"(use|return|output|is|has|with|need|do|enable|update|reset|keep)s?_")
_FLAG = re.compile(r"^(typing\.)?(Optional\[)?bool\b")


def _is_flag(parameter: inspect.Parameter) -> bool:
    """Whether an argument is annotated as a flag: any object is true there."""
    annotation = parameter.annotation
    if annotation is parameter.empty:
        return False
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return _FLAG.match(text) is not None


def _absent_entries(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> list[Place]:
    """Entries that a dict argument lacks and that the result, a dict too, has."""
    if not isinstance(result, Mapping):
        return []
    found = []
    for position, name in enumerate(signature.parameters):
        value = args[position] if position < len(args) else kwargs.get(name)
        if isinstance(value, dict):
            at = position if position < len(args) else None
            found += [Place(name, at, (key,)) for key in result if key not in value]
    return found


def _closeness(place: Place, selector: Selector, result: Any) -> float:
    """How likely this part of the result feeds this place, from names and shape alone.

    It sets the order of the attempts and decides nothing.
    """
    leaves, _ = flatten(select(result, selector))
    words = set(re.split(r"\W|_", place.path.lower()))
    named = [step for step in selector if isinstance(step, str)]
    overlap = max((len(words & set(step.lower().split("_"))) for step in named), default=0)
    tail = any(isinstance(step, tuple) for step in selector)
    return (
        0.2 * min(overlap, 2)
        + (0.1 if named and named[-1] == place.path else 0)
        + (0.15 if len(leaves) > 1 else 0)
        + (0.2 if tail and place.is_variadic else -0.1 if tail else 0)
        - (0.12 if not selector else 0)
        - (0.02 * len(selector))
        - (0.15 if selector and selector[0] == 0 else 0)
    )
