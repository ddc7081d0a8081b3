"""Which argument carries the cache, which outputs feed it, and what every size is.

The model is run on fake tensors at a few sizes. An argument carries the cache if a later call takes
there what an output of the first call is, and if what it then returns has the sizes that one first
call over all tokens returns.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import nn

from cachefree.capture import Call, Captured, SizeSpec, TensorSpec, capture, run_on_fakes
from cachefree.dimensions import Dimension, find_dimensions, resized
from cachefree.errors import CacheFreeError, CacheNotFoundError, Refusal
from cachefree.inputs import CACHE_NAMES, FirstCall, call_of, find_first_call
from cachefree.sizes import size_symbol, substitute
from cachefree.structure import Structure, flatten, leaf_paths

__all__ = ["Discovery", "Carry", "discover"]

log = logging.getLogger(__name__)
Carry = Callable[[Any, Any], Any]
_LENGTHS = {"past": 5, "query": 3}
_FLAGS = re.compile(r"cache|present|past|state|mem|incremental|return", re.IGNORECASE)


@dataclass(frozen=True)
class Place:
    """Where the call takes the cache: a parameter, or an entry inside a given container."""

    parameter: str
    position: int | None = None
    steps: tuple[Any, ...] = ()
    is_variadic: bool = False

    @property
    def path(self) -> str:
        """As Python writes it."""
        return self.parameter + "".join(f"[{step!r}]" for step in self.steps)

    def put(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call with ``value`` there."""
        if self.is_variadic:
            return (*args, *value), kwargs
        if self.position is not None and self.position < len(args):
            changed = self._inside(args[self.position], self.steps, value)
            return (*args[: self.position], changed, *args[self.position + 1 :]), kwargs
        return args, {
            **kwargs,
            self.parameter: self._inside(kwargs.get(self.parameter), self.steps, value),
        }

    def _inside(self, container: Any, steps: tuple[Any, ...], value: Any) -> Any:
        if not steps:
            return value
        if isinstance(container, tuple):
            parts = list(container)
            parts[steps[0]] = self._inside(parts[steps[0]], steps[1:], value)
            return tuple(parts)
        copied = container.copy() if hasattr(container, "copy") else container
        copied[steps[0]] = self._inside(
            container[steps[0]] if steps[1:] else None, steps[1:], value
        )
        return copied


@dataclass(frozen=True)
class _Carried:
    """The user's own way from a result to one argument of a later call."""

    carry: Carry
    inputs: Any
    key: Any

    def __call__(self, result: Any) -> Any:
        return dict(_items(self.carry(result, self.inputs)))[self.key]


def _items(inputs: Any) -> list[tuple[Any, Any]]:
    return list(inputs.items()) if isinstance(inputs, Mapping) else list(enumerate(inputs))


# Steps into the model's result; ("tail", n) is its n-th entry and all after it.
Selector = tuple[Any, ...]


@dataclass(frozen=True)
class Link:
    """One place of the cache and the part of the result that feeds it."""

    place: Place
    selector: Selector


@dataclass
class Discovery:
    """What was found.

    Attributes:
        first: How the model is called first, with symbolic sizes.
        first_path: The captured first path.
        later: How it is called later.
        links: The places of the cache, with what feeds them.
        cache_leaves: Places of the cache's tensors among the tensors of the later call.
        carried: For each of them, the place among the result's tensors that feeds it.
        hints: Example sizes.
        asked: Sizes by which the later path's own questions are answered, where it takes one token
            only.
        notes: What was assumed, in words.
        absent: Optional inputs that were not given.
    """

    first: Call
    first_path: Captured
    later: Call
    links: tuple[Link, ...]
    cache_leaves: tuple[int, ...]
    carried: tuple[int, ...]
    hints: dict[str, int]
    asked: dict[str, int]
    notes: tuple[str, ...]
    absent: tuple[str, ...] = ()


def discover(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    cache: str | Sequence[str] | None = None,
    carry: Carry | None = None,
) -> Discovery:
    """Finds how the model is called, first and later.

    Args:
        model: Any module.
        example_inputs: Inputs of a first call, or None.
        cache: Names of the cache's arguments, or None.
        carry: ``(outputs, inputs) → later inputs``, or None.

    Raises:
        CacheNotFoundError: no argument carries a cache, or several could.
        CaptureError: the model does not run or cannot be traced.
    """
    first = find_first_call(model, example_inputs)
    signature = inspect.signature(model.forward)
    names = {place: name for place, name in enumerate(signature.parameters)}
    search = _Search(model, first, signature, names, cache, carry)
    found = search.run()
    return _symbolic(model, search, found)


@dataclass
class _Found:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    call: Call
    groups: list[list[Dimension]]
    query: list[Dimension]
    links: tuple[Link, ...]
    total: frozenset[Dimension]  # dimensions that are past + query on later calls
    tokens: int  # how many new tokens a later call takes: any number, or one only
    notes: tuple[str, ...]


class _Search:
    """The search for the cache on fake tensors of fixed sizes."""

    def __init__(
        self,
        model: nn.Module,
        first: FirstCall,
        signature: inspect.Signature,
        names: dict[int, str],
        cache: str | Sequence[str] | None,
        carry: Carry | None,
    ) -> None:
        self.model = model
        self.first = first
        self.signature = signature
        self.names = names
        self.wanted = (cache,) if isinstance(cache, str) else tuple(cache or ())
        self.carry = carry
        self.failures: list[str] = []

    def run(self) -> _Found:
        unknown = [
            name
            for name in self.wanted
            if name.split(".")[0].split("[")[0] not in self.signature.parameters
        ]
        if unknown:
            raise CacheNotFoundError(
                Refusal(
                    f"The model's forward has no argument {unknown[0]!r}.",
                    why=f"cache={self.wanted!r} was given; the arguments are {', '.join(self.signature.parameters)}.",
                    remedy="Name one of them.",
                )
            )
        if self.carry is not None:
            return self._carried(self.carry)
        for flags in self._flag_choices():
            args, kwargs = self.first.args, {**self.first.kwargs, **flags}
            call = call_of(args, kwargs, self.names)
            try:
                call, groups = find_dimensions(self.model, call)
            except Exception:
                continue
            found = self._with(args, kwargs, call, groups, flags)
            if found is not None:
                return found
        raise self._not_found()

    def _carried(self, carry: Carry) -> _Found:
        """The places that ``carry`` feeds."""
        args, kwargs = self.first.args, self.first.kwargs
        call, groups = find_dimensions(self.model, call_of(args, kwargs, self.names))
        for query in sorted(groups, key=lambda group: min(axis for _, axis in group) == 0):
            runs = self._first_runs(call, query)
            if runs is None:
                continue
            part, *whole = runs
            own = {id(leaf) for leaf in flatten(part)[0]}
            inputs = args if args else dict(kwargs)
            links = []
            for key, value in _items(carry(part, inputs)):
                if any(id(leaf) in own for leaf in flatten(value)[0]):
                    is_name = isinstance(key, str)
                    place = Place(key if is_name else self.names[key], None if is_name else key)
                    links.append(Link(place, (_Carried(carry, inputs, key),)))
            accepted = links and self._accepts(args, kwargs, call, query, tuple(links), part, whole)
            if accepted:
                total, tokens = accepted
                notes = (*self.first.assumed,)
                return _Found(args, kwargs, call, groups, query, tuple(links), total, tokens, notes)
        attempts = "".join(f"\n         tried {attempt}" for attempt in self.failures[-3:])
        raise CacheNotFoundError(
            Refusal(
                "The later inputs that carry= gives do not run, or hold no output of the call.",
                why=f"No output of the first call was found in them as it is.{attempts}",
                remedy="carry takes (outputs, inputs) and puts outputs, unchanged, into later inputs.",
            )
        )

    def _flag_choices(self) -> Iterator[dict[str, Any]]:
        yield {}
        given = set(self.first.kwargs) | {
            self.names[i] for i in range(len(self.first.args)) if i in self.names
        }
        flags = [
            name
            for name, parameter in self.signature.parameters.items()
            if name not in given
            and (parameter.default is False or (parameter.default is None and _FLAGS.search(name)))
            and _FLAGS.search(name)
            and not re.search(r"past|values", name)
        ]
        flags.sort(key=lambda name: "cache" not in name)
        for flag in flags:
            yield {flag: True}
        for pair in itertools.combinations(flags, 2):
            yield dict.fromkeys(pair, True)

    def _with(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        call: Call,
        groups: list[list[Dimension]],
        flags: dict[str, Any],
    ) -> _Found | None:
        accepted: list[tuple[float, _Found]] = []
        for query in sorted(groups, key=lambda group: min(axis for _, axis in group) == 0):
            runs = self._first_runs(call, query)
            if runs is None:
                continue
            part, *whole = runs
            for score, links in self._candidates(args, kwargs, part):
                accepted_by = self._accepts(args, kwargs, call, query, links, part, whole)
                if accepted_by is None:
                    continue
                total, tokens = accepted_by
                notes = [
                    *self.first.assumed,
                    *(
                        f"{flag}={value} so that the model returns its cache"
                        for flag, value in flags.items()
                    ),
                ]
                found = _Found(
                    args, kwargs, call, groups, query, links, total, tokens, tuple(notes)
                )
                if score >= 3 or self.wanted or self.carry:
                    return found
                accepted.append((score, found))
            if accepted:
                break
        if not accepted:
            return None
        places = {tuple(link.place.path for link in found.links) for _, found in accepted}
        if len(places) > 1:
            several = ", ".join(sorted(" and ".join(place) for place in places))
            raise CacheNotFoundError(
                Refusal(
                    f"Several arguments could carry the cache: {several}.",
                    why="A later call takes an output of the first call at each of them, and the sizes grow as a cache's do.",
                    remedy="Name the one with cache=.",
                )
            )
        return max(accepted, key=lambda pair: pair[0])[1]

    def _first_runs(self, call: Call, query: list[Dimension]) -> tuple[Any, ...] | None:
        """The results of first calls over the past's tokens, and over all tokens.

        All tokens are counted twice: with several new ones, and with one.
        """
        try:
            past = _LENGTHS["past"]
            return tuple(
                self._result(resized(call, dict.fromkeys(query, past + new)))
                for new in (0, _LENGTHS["query"], 1)
            )
        except Exception as error:
            self.failures.append(f"{type(error).__name__}: {_first_line(error)}")
            return None

    def _result(self, call: Call) -> Any:
        leaves, structure = run_on_fakes(self.model, call, {})
        return structure.rebuild(leaves)

    def _candidates(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> Iterator[tuple[float, tuple[Link, ...]]]:
        places = self._places(args, kwargs)
        places += self._absent_entries(args, kwargs, result)
        selectors = list(_selectors(result))
        if self.wanted and len(self.wanted) > 1:
            chosen = [
                place
                for name in self.wanted
                for place in places
                if place.path == name or place.parameter == name
            ]
            yield from self._joint(chosen, selectors)
            return
        ranked: list[tuple[float, tuple[Link, ...]]] = []
        for place in places:
            for selector in selectors:
                score = 3.0 if CACHE_NAMES.search(place.path) else 0.0
                closeness = _closeness(place, selector, result)
                ranked.append((score + closeness, (Link(place, selector),)))
        yield from sorted(ranked, key=lambda pair: -pair[0])
        if not self.wanted:
            yield from self._joint(
                [place for place in places if CACHE_NAMES.search(place.path)], selectors
            )

    def _joint(
        self, places: list[Place], selectors: list[Selector]
    ) -> Iterator[tuple[float, tuple[Link, ...]]]:
        """Several arguments at once, fed by as many neighbouring entries of the result."""
        entries = [
            selector
            for selector in selectors
            if len(selector) == 1 and not isinstance(selector[0], tuple)
        ]
        for count in range(len(places), 1, -1):
            for start in range(len(entries) - count + 1):
                links = tuple(
                    Link(place, entry)
                    for place, entry in zip(
                        places[:count], entries[start : start + count], strict=True
                    )
                )
                yield 3.0, links

    def _places(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Place]:
        found: list[Place] = []
        for position, (name, parameter) in enumerate(self.signature.parameters.items()):
            if self.wanted and not any(
                w == name or w.startswith((name + ".", name + "[")) for w in self.wanted
            ):
                continue
            if parameter.kind is parameter.VAR_POSITIONAL:
                if len(args) <= position:
                    found.append(Place(name, is_variadic=True))
                continue
            if parameter.kind is parameter.VAR_KEYWORD:
                continue
            is_given = position < len(args) or name in kwargs
            value = args[position] if position < len(args) else kwargs.get(name, parameter.default)
            at = position if position < len(args) else None
            if is_given and isinstance(value, (dict, list, tuple)) and value:
                found += [Place(name, at, steps) for steps in _empty_entries(value)]
            elif _is_empty(value) or (not is_given and parameter.default is parameter.empty):
                found.append(Place(name, at))
        return found

    def _absent_entries(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> list[Place]:
        """Entries that a dict argument lacks and that the result, a dict too, has."""
        if not isinstance(result, Mapping):
            return []
        found = []
        for position, name in self.names.items():
            value = args[position] if position < len(args) else kwargs.get(name)
            if isinstance(value, dict):
                at = position if position < len(args) else None
                found += [Place(name, at, (key,)) for key in result if key not in value]
        return found

    def _accepts(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        call: Call,
        query: list[Dimension],
        links: tuple[Link, ...],
        part: Any,
        whole: Sequence[Any],
    ) -> tuple[frozenset[Dimension], int] | None:
        """The dimensions that are past + query, and how many tokens run.

        None where no later call takes the cache there.
        """
        for tokens, expected in zip((_LENGTHS["query"], 1), whole, strict=True):
            for total in _total_choices(call, query):
                new = {dim: tokens + (_LENGTHS["past"] if dim in total else 0) for dim in query}
                if self._runs_later(args, kwargs, resized(call, new), links, part, expected):
                    return total, tokens
        return None

    def _runs_later(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        call: Call,
        links: tuple[Link, ...],
        part: Any,
        whole: Any,
    ) -> bool:
        """Whether a later call runs and returns what one first call over all tokens does.

        It is given the first call's results.
        """
        later_args, later_kwargs = _fakes(call.structure, list(call.leaves))
        try:
            for link in links:
                later_args, later_kwargs = link.place.put(
                    later_args, later_kwargs, _select(part, link.selector)
                )
            later_leaves, later_structure = _run_values(self.model, later_args, later_kwargs)
            result = later_structure.rebuild(later_leaves)
            if not all(
                _same_sizes(_select(result, link.selector), _select(whole, link.selector))
                for link in links
            ):
                return False
            grows = any(
                not _same_sizes(_select(part, link.selector), _select(whole, link.selector))
                for link in links
            )
            named = all(CACHE_NAMES.search(link.place.path) for link in links)
            return bool((grows or named or self.wanted or self.carry) and _is_alike(result, part))
        except Exception as error:
            self.failures.append(
                f"{links[0].place.path}: {type(error).__name__}: {_first_line(error)}"
            )
            return False

    def _not_found(self) -> CacheFreeError:
        if self.wanted:
            what = f"The argument {', '.join(self.wanted)!s} does not take what the first call returns."
        else:
            what = f"No argument of {type(self.model).__name__}.forward carries a cache."
        attempts = list(dict.fromkeys(self.failures))[-3:]
        return CacheNotFoundError(
            Refusal(
                what,
                why="No output of the first call fits into an argument that may be left out, so that the sizes then grow as a cache's do."
                + f" The arguments are {', '.join(self.signature.parameters)}."
                + "".join(f"\n         tried {attempt}" for attempt in attempts),
                remedy="Name the argument with cache=; where the outputs do not feed it directly, give carry=; where the model keeps its cache "
                "on itself, return it from forward.",
            )
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else ""


def _is_empty(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 0
    if value is None:
        return True
    if isinstance(value, (tuple, list)):
        return all(_is_empty(part) for part in value)
    return isinstance(value, dict) and not value


def _empty_entries(value: Any, steps: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to the empty entries inside a container; the container itself where all are empty."""
    if _is_empty(value):
        return [steps]
    if isinstance(value, dict):
        return [
            found for key, part in value.items() for found in _empty_entries(part, (*steps, key))
        ]
    if isinstance(value, (tuple, list)):
        return [
            found for key, part in enumerate(value) for found in _empty_entries(part, (*steps, key))
        ]
    return []


def _selectors(result: Any, steps: Selector = (), depth: int = 3) -> Iterator[Selector]:
    """Paths to the parts of a result that hold tensors."""
    leaves, structure = flatten(result)
    if not leaves:
        return
    yield steps
    if depth == 0 or not structure.children:
        return
    for key, child in zip(structure.keys, structure.children, strict=True):
        if child.leaf_count:
            yield from _selectors(_step(result, structure, key), (*steps, key), depth - 1)
    if structure.kind == "tuple" and not steps:
        for start in range(1, len(structure.children)):
            yield (("tail", start),)


def _step(value: Any, structure: Structure, key: Any) -> Any:
    return getattr(value, str(key)) if structure.kind in ("object", "namedtuple") else value[key]


def _select(result: Any, selector: Selector) -> Any:
    value = result
    for step in selector:
        if isinstance(step, _Carried):
            value = step(value)
        elif isinstance(step, tuple) and step[:1] == ("tail",):
            value = tuple(value[step[1] :])
        elif isinstance(value, (Mapping, list)) or type(value) is tuple:
            value = value[step]
        else:
            value = getattr(value, str(step))
    return value


def _closeness(place: Place, selector: Selector, result: Any) -> float:
    """How likely this part of the result feeds this place, from names and shape alone.

    It sets the order of the attempts and decides nothing.
    """
    leaves, _ = flatten(_select(result, selector))
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


def _total_choices(call: Call, query: list[Dimension]) -> Iterator[frozenset[Dimension]]:
    """Which input dimensions are past + query on a later call, likeliest first."""
    yield frozenset()
    paths = {dim: call.leaves[dim[0]].path for dim in query}
    masks = frozenset(dim for dim in query if "mask" in paths[dim])
    first = min(query)
    if masks:
        yield masks
        last_axes = frozenset(
            dim for dim in masks if dim[1] == max(axis for place, axis in masks if place == dim[0])
        )
        if last_axes != masks:
            yield last_axes
    others = [dim for dim in query if dim != first]
    for count in (1, 2):
        for chosen in itertools.combinations(others, count):
            if frozenset(chosen) != masks:
                yield frozenset(chosen)


def _fakes(structure: Structure, leaves: Sequence[Any]) -> tuple[Any, Any]:
    """The call's arguments with a meta tensor for each spec."""
    values = [
        torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
        if isinstance(leaf, TensorSpec)
        else leaf.expr
        for leaf in leaves
    ]
    for value, leaf in zip(values, leaves, strict=True):
        if isinstance(value, torch.Tensor):
            value.cachefree_device = leaf.device
    args, kwargs = structure.rebuild(values)
    return args, kwargs


def _run_values(model: nn.Module, args: Any, kwargs: Any) -> tuple[list[Any], Structure]:
    leaves, structure = flatten((args, kwargs))
    specs = tuple(
        TensorSpec(
            "", tuple(leaf.shape), leaf.dtype, getattr(leaf, "cachefree_device", leaf.device)
        )
        for leaf in leaves
    )
    return run_on_fakes(model, Call(structure, specs), {})


def _same_sizes(one: Any, other: Any) -> bool:
    first, structure = flatten(one)
    second, other_structure = flatten(other)
    return structure.leaf_count == other_structure.leaf_count and all(
        a.shape == b.shape and a.dtype == b.dtype for a, b in zip(first, second, strict=True)
    )


def _is_alike(one: Any, other: Any) -> bool:
    """Whether two results have the same tensors at the same places, of the same ranks."""
    first, structure = flatten(one)
    second, other_structure = flatten(other)
    return leaf_paths(structure) == leaf_paths(other_structure) and all(
        a.dim() == b.dim() and a.dtype == b.dtype for a, b in zip(first, second, strict=True)
    )


# From fixed sizes to symbols.


@dataclass(frozen=True)
class _Mark:
    spec: TensorSpec | SizeSpec
    output: int | None = None


def _symbolic(model: nn.Module, search: _Search, found: _Found) -> Discovery:
    symbols = _named_groups(found)
    sizes = {dim: size_symbol(name) for name, group in symbols.items() for dim in group}
    first = resized(found.call, sizes)
    hints = _hints(symbols)
    path = capture(model, first, hints)
    later, cache_leaves, carried, more = _later_call(search, found, first, path)
    for name, expr in more.items():
        length = sympy.sympify(expr).subs(
            {size_symbol("query"): 7, **{size_symbol(n): h for n, h in hints.items()}}
        )
        hints[name] = max(2, int(length)) if name != "past" or expr != size_symbol("query") else 7
    asked = {"query": 1} if found.tokens == 1 else {}
    return Discovery(
        first,
        path,
        later,
        found.links,
        cache_leaves,
        carried,
        hints,
        asked,
        found.notes,
        _absent(search, found),
    )


def _absent(search: _Search, found: _Found) -> tuple[str, ...]:
    given = {search.names.get(place) for place in range(len(found.args))} | set(found.kwargs)
    given |= {link.place.parameter for link in found.links}
    return tuple(
        name
        for name, parameter in search.signature.parameters.items()
        if name not in given
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    )


def _named_groups(found: _Found) -> dict[str, list[Dimension]]:
    named: dict[str, list[Dimension]] = {}
    for group in found.groups:
        path = found.call.leaves[group[0][0]].path
        if group == found.query:
            name = "query"
        elif min(axis for _, axis in group) == 0 and "batch" not in named:
            name = "batch"
        elif re.search(r"enc|memory|context|source|src|cross", path):
            name = "encoder"
        else:
            name = re.sub(r"\W+", "_", f"{path}_{group[0][1]}").strip("_")
        while name in named:
            name += "_"
        named[name] = group
    return named


def _hints(symbols: dict[str, Any]) -> dict[str, int]:
    """Example sizes: distinct, at least 2, and unlikely to be a constant of the model."""
    usual = {"batch": 3, "query": 5, "encoder": 9}
    spare = iter((11, 13, 17, 19, 23, 29))
    return {name: usual[name] if name in usual else next(spare) for name in symbols}


def _later_call(
    search: _Search, found: _Found, first: Call, path: Captured
) -> tuple[Call, tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    marks: list[Any] = []
    tensors = itertools.count()
    for leaf in path.output_leaves:
        marks.append(_Mark(leaf, next(tensors) if isinstance(leaf, TensorSpec) else None))
    result = path.outputs.rebuild(marks)
    query, past = size_symbol("query"), size_symbol("past")
    total = {(place, axis): sympy.sympify(past + query) for place, axis in found.total}
    inputs = [_Mark(leaf) for leaf in resized(first, total).leaves]
    args, kwargs = first.structure.rebuild(inputs)
    lengths: dict[Any, Any] = {}
    for link in found.links:
        value = _select(result, link.selector)
        leaves, structure = flatten(value, _is_mark)
        paths = leaf_paths(structure, link.place.path)
        renamed = [
            _Mark(_as_past(mark.spec, path_, lengths), mark.output)
            for mark, path_ in zip(leaves, paths, strict=True)
        ]
        args, kwargs = link.place.put(args, kwargs, structure.rebuild(renamed))
    later_marks, structure = flatten((args, kwargs), _is_mark)
    call = Call(structure, tuple(mark.spec for mark in later_marks))
    tensor_marks = [mark for mark in later_marks if isinstance(mark.spec, TensorSpec)]
    cache_leaves = tuple(
        place for place, mark in enumerate(tensor_marks) if mark.output is not None
    )
    carried = tuple(mark.output for mark in tensor_marks if mark.output is not None)
    return call, cache_leaves, carried, {str(symbol): expr for expr, symbol in lengths.items()}


def _is_mark(value: Any) -> bool:
    return isinstance(value, _Mark)


def _as_past(
    spec: TensorSpec | SizeSpec, path: str, lengths: dict[Any, Any]
) -> TensorSpec | SizeSpec:
    """A tensor of the result as the input of a later call.

    What grew with the call's sizes gets a size of its own.
    """
    if isinstance(spec, SizeSpec):
        return SizeSpec(path, _past_size(spec.expr, lengths))
    query = size_symbol("query")
    grows = any(isinstance(size, sympy.Basic) and query in size.free_symbols for size in spec.shape)
    return TensorSpec(
        path,
        tuple(
            size
            if grows and isinstance(size, sympy.Basic) and query not in size.free_symbols
            else _past_size(size, lengths)
            for size in spec.shape
        ),
        spec.dtype,
        spec.device,
    )


def _past_size(size: Any, lengths: dict[Any, Any]) -> Any:
    if not isinstance(size, sympy.Basic) or size.free_symbols <= {size_symbol("batch")}:
        return size
    if size in lengths:
        return lengths[size]
    if size.is_Symbol:
        name = "past" if str(size) == "query" else f"past_{size}"
    elif size.has(size_symbol("batch")):
        # a product with the batch, such as B·E rows: rename inside
        inner = size.free_symbols - {size_symbol("batch")}
        return (
            substitute(size, {symbol: _past_size(symbol, lengths) for symbol in inner})
            if inner
            else size
        )
    else:
        name = "past" if not any(str(s) == "past" for s in lengths.values()) else "past_window"
    while any(str(symbol) == name for symbol in lengths.values()):
        name += "_"
    lengths[size] = size_symbol(name)
    return lengths[size]
