"""Calls of the model on fake tensors of fixed sizes: a first one, and later ones fed by it."""

from __future__ import annotations

import itertools
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cachefree.calls import Call, TensorSpec
from cachefree.counted import Count, is_a_count, numbers_in
from cachefree.dimensions import Dimension, resized
from cachefree.explaining import told
from cachefree.faithful import CallLog
from cachefree.fake_runs import run_on_fakes
from cachefree.first_only import without
from cachefree.inputs import CACHE_NAMES
from cachefree.places import Link, select
from cachefree.structure import Structure, flatten, leaf_paths

__all__ = ["FirstRuns", "Trials"]

log = logging.getLogger(__name__)

_LENGTHS = {"past": 5, "query": 3}


class FirstRuns:
    """First calls of a model with any number of tokens, each run when it is asked for.

    Args:
        trials: What runs them.
        call: The call.
        query: The dimensions that are the tokens.
    """

    def __init__(self, trials: Trials, call: Call, query: tuple[Dimension, ...]) -> None:
        self._trials = trials
        self._call = call
        self._query = query
        self._results: dict[int, Any] = {}

    @property
    def part(self) -> Any:
        """The result over the past's tokens."""
        return self.over(_LENGTHS["past"])

    def over(self, tokens: int) -> Any:
        """The result over some tokens; None where the call does not run."""
        if tokens not in self._results:
            call = resized(self._call, dict.fromkeys(self._query, tokens))
            self._results[tokens] = self._trials.attempt(call)
        return self._results[tokens]


class Trials:
    """Tries whether later calls take what first calls return.

    Args:
        model: Any module.
        names: Position → parameter name.
        is_told: Whether the user said which arguments carry the cache.

    Attributes:
        known: A call and the leaves and the structure of its result, where that is known.
        absent: Arguments of first calls that later ones leave out.
        failures: What did not run, in words.
        opaque: Names of classes in results in which no tensor was found.
        grown: Places and axes of the cache's tensors that grew by one in the last call that was
            accepted without an axis for tokens.
        counts: Arguments that later calls are given the number of past tokens at.
        grows: Whether a tensor of the cache grew in the last call that ran.
        takes_any_name: Whether what does not grow need not have a cache's name, if it is read.
    """

    def __init__(self, model: nn.Module, names: Mapping[int, str], *, is_told: bool) -> None:
        self.model = model
        self.names = names
        self.is_told = is_told
        self.known: tuple[Call, tuple[list[Any], Structure]] | None = None
        self.absent: tuple[str, ...] = ()
        self.failures: list[str] = []
        self.opaque: dict[str, None] = {}
        self.grown: frozenset[Dimension] = frozenset()
        self.counts: tuple[Count, ...] = ()
        self.takes_any_name = False
        self.grows = False
        self._first_runs: dict[Any, FirstRuns] = {}

    def first_runs(self, call: Call, query: Sequence[Dimension]) -> FirstRuns | None:
        """First calls with these dimensions as the tokens; None where none runs."""
        key = (id(call), tuple(query))
        if key not in self._first_runs:
            self._first_runs[key] = FirstRuns(self, call, tuple(query))
        runs = self._first_runs[key]
        return runs if runs.part is not None else None

    def attempt(self, call: Call) -> Any:
        """The result of a call; None where it does not run."""
        try:
            return self._result(call)
        except Exception as error:  # noqa: BLE001 - the model may raise anything
            self.failures.append(told(error))
            return None

    def _result(self, call: Call) -> Any:
        if self.known and _is_same_call(self.known[0], call):
            leaves, structure = self.known[1]
        else:
            leaves, structure = run_on_fakes(self.model, call, {})
        self.opaque.update(dict.fromkeys(_opaque(structure)))
        return structure.rebuild(leaves)

    def accepts(
        self,
        call: Call,
        query: list[Dimension],
        links: tuple[Link, ...],
        runs: FirstRuns,
    ) -> tuple[frozenset[Dimension], int] | None:
        """The dimensions that are past + query, and how many tokens run.

        None where no later call takes the cache there.
        """
        if not query:
            if self.absent:
                return None
            calls = CallLog()
            is_step = self._runs_later(call, links, runs.part, runs.part, calls, is_step=True)
            is_read = is_step and self._is_read(call, calls)
            return (frozenset(), _LENGTHS["query"]) if is_read else None
        for tokens in (_LENGTHS["query"], 1):
            expected = runs.over(_LENGTHS["past"] + tokens)
            if expected is None:
                continue
            for total in _total_choices(call, query):
                new = {dim: tokens + (_LENGTHS["past"] if dim in total else 0) for dim in query}
                calls = CallLog()
                if self._runs_later(resized(call, new), links, runs.part, expected, calls):
                    if total == frozenset(query) and not self._is_cut(call, new, calls):
                        continue
                    needs_reading = not (self.grows or self.is_told)
                    if needs_reading and not self._is_read(resized(call, new), calls):
                        self._note(links, True, "it computes nothing of what is past")
                        continue
                    if tokens == 1 and not total and self._wants_all(call, query, links, runs):
                        return frozenset(query), tokens
                    return total, tokens
        return None

    def counting(
        self,
        call: Call,
        query: list[Dimension],
        links: tuple[Link, ...],
        accepted: tuple[frozenset[Dimension], int],
        places: tuple[Count, ...],
    ) -> tuple[Count, ...]:
        """Which arguments of an accepted call count the past's tokens."""
        total, tokens = accepted
        past = _LENGTHS["past"] if query else 1
        runs = self.first_runs(call, query)
        assert runs is not None
        whole = runs.over(past + tokens) if query else runs.part
        new = {dim: tokens + (past if dim in total else 0) for dim in query}

        def numbers(counts: tuple[Count, ...]) -> Counter[int] | None:
            self.counts, calls = counts, CallLog()
            does_run = self._runs_later(
                resized(call, new), links, runs.part, whole, calls, is_step=not query
            )
            return numbers_in(calls.calls) if does_run else None

        kept = tuple(
            count
            for count in places
            if is_a_count(
                numbers(places),
                numbers(tuple(other for other in places if other != count)),
                (past, tokens),
                is_required=count.is_required,
            )
        )
        self.counts = kept
        return kept

    def _note(self, links: tuple[Link, ...], is_named: bool, what: str) -> None:
        if is_named or self.is_told:
            self.failures.insert(0, f"{links[0].place.path}: a later call runs, but {what}")

    def _is_read(self, call: Call, calls: CallLog) -> bool:
        """Whether a later call computes otherwise than a first call of the same sizes.

        Else it ignores what is past.
        """
        first = CallLog()
        try:
            run_on_fakes(self.model, call, {}, first)
        except Exception as error:  # noqa: BLE001 - the model may raise anything
            log.debug("no first call of the sizes of a later one runs: %s", error)
            return True
        return [(c.name, c.args) for c in first.calls] != [(c.name, c.args) for c in calls.calls]

    def _is_cut(self, call: Call, new: dict[Dimension, int], calls: CallLog) -> bool:
        """Whether a later call over all tokens computes something of fewer of them.

        A first call over them does not; a later call that does neither takes them for new ones.
        """
        first = CallLog()
        run_on_fakes(self.model, resized(call, new), {}, first)
        least: dict[str, int] = {}
        for done in first.calls:
            count = _elements(done.args)
            least[done.name] = min(count, least.get(done.name, count))
        return any(_elements(c.args) < least[c.name] for c in calls.calls if c.name in least)

    def _wants_all(
        self, call: Call, query: list[Dimension], links: tuple[Link, ...], runs: FirstRuns
    ) -> bool:
        """Whether a later call takes all tokens, and reads more of them than the last one.

        It does where other numbers occur in its code than if it is given the last one only, such as
        positions.
        """
        numbers = []
        for length in (1, _LENGTHS["past"] + 1):
            calls = CallLog()
            new = resized(call, dict.fromkeys(query, length))
            if not self._runs_later(new, links, runs.part, runs.over(_LENGTHS["past"] + 1), calls):
                return False
            numbers.append([_numbers(call.args) for call in calls.calls])
        return numbers[0] != numbers[1]

    def _runs_later(
        self,
        call: Call,
        links: tuple[Link, ...],
        part: Any,
        whole: Any,
        log_calls: CallLog | None = None,
        *,
        is_step: bool = False,
    ) -> bool:
        """Whether a later call runs and returns what one first call over all tokens does.

        It is given the first call's results. A step returns what a first call does, or one row
        more.
        """
        later_args, later_kwargs = _fakes(call.structure, list(call.leaves))
        later_args, later_kwargs = without(later_args, later_kwargs, self.names, self.absent)
        try:
            for link in links:
                later_args, later_kwargs = link.place.put(
                    later_args, later_kwargs, select(part, link.selector)
                )
            for count in self.counts:
                past = 1 if is_step else _LENGTHS["past"]
                later_args, later_kwargs = count.place.put(later_args, later_kwargs, past)
            later_leaves, later_structure = _run_values(
                self.model, later_args, later_kwargs, log_calls
            )
            result = later_structure.rebuild(later_leaves)
            named = all(CACHE_NAMES.search(link.place.path) for link in links)
            pairs = [
                (select(result, link.selector), select(whole, link.selector)) for link in links
            ]
            grown = _grown(pairs) if is_step else None
            if grown is None and not all(_same_sizes(one, other) for one, other in pairs):
                self._note(
                    links,
                    named,
                    "its cache has other tensors or sizes than that of one "
                    "first call over all tokens",
                )
                return False
            grows = bool(grown) or any(
                not _same_sizes(select(part, link.selector), select(whole, link.selector))
                for link in links
            )
            if log_calls is not None and not any(callable(s) for li in links for s in li.selector):
                given = [select(part, link.selector) for link in links]
                leaves = flatten((later_args, later_kwargs))[0]
                if _is_joined_elsewhere(
                    given, [now for now, _ in pairs], leaves, later_leaves, log_calls
                ):
                    self._note(links, named, "what it joins comes back at other places")
                    return False
            if not _is_alike(result, part):
                self._note(links, named, "its result has another structure than a first call's")
                return False
            if not (grows or named or self.is_told or self.takes_any_name):
                self.failures.insert(
                    0,
                    f"{links[0].place.path}: a later call runs, but nothing grows, and by its name "
                    f"it may be anything: if it is the cache, say cache={links[0].place.path!r}",
                )
                return False
            self.grown, self.grows = grown or frozenset(), grows
            return True
        except Exception as error:  # noqa: BLE001 - the model may raise anything
            self.failures.append(f"{links[0].place.path}: {told(error)}")
            return False


def _opaque(structure: Structure) -> Iterator[str]:
    """Objects of other classes than Python's own that hold no tensor that is seen."""
    if structure.kind == "constant":
        cls = type(structure.value)
        if cls.__module__ != "builtins" and not cls.__module__.startswith("torch"):
            yield cls.__qualname__
    for child in structure.children:
        yield from _opaque(child)


def _total_choices(call: Call, query: list[Dimension]) -> Iterator[frozenset[Dimension]]:
    """Which input dimensions are past + query on a later call, likeliest first."""
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
    yield frozenset()
    others = [dim for dim in query if dim != first]
    for count in (1, 2):
        for chosen in itertools.combinations(others, count):
            if frozenset(chosen) != masks:
                yield frozenset(chosen)
    yield frozenset(query)  # the model is given all tokens, and cuts off those that are past


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
            value.cachefree_device = leaf.device  # type: ignore[attr-defined]
    args, kwargs = structure.rebuild(values)
    return args, kwargs


def _elements(value: Any) -> int:
    """How many elements the tensors among the arguments of a call have."""
    if not isinstance(value, tuple):
        return 0
    if value[:1] == ("tensor",):
        return math.prod(value[1])
    return sum(map(_elements, value))


def _numbers(value: Any) -> Any:
    """The numbers among the arguments of a call, those of slices too; no sizes of tensors."""
    if isinstance(value, tuple):
        return () if value[:1] == ("tensor",) else tuple(map(_numbers, value))
    return value if isinstance(value, int) else None


def _run_values(
    model: nn.Module, args: Any, kwargs: Any, log_calls: CallLog | None = None
) -> tuple[list[Any], Structure]:
    leaves, structure = flatten((args, kwargs))
    specs = tuple(
        TensorSpec(
            str(place),
            tuple(leaf.shape),
            leaf.dtype,
            getattr(leaf, "cachefree_device", leaf.device),
        )
        for place, leaf in enumerate(leaves)
    )
    return run_on_fakes(model, Call(structure, specs), {}, log_calls)


def _is_joined_elsewhere(
    given: Any, returned: Any, leaves: Sequence[Any], results: Sequence[Any], log_calls: CallLog
) -> bool:
    """Whether what is joined to a tensor of the cache is returned in the place of another one.

    ``keys, values`` of two layers have the form of two layers' ``(key, value)``.
    """
    if log_calls.result is None:
        return False
    inputs = {id(leaf): ("input", str(place)) for place, leaf in enumerate(leaves)}
    tensors = [value for value in results if isinstance(value, torch.Tensor)]
    sources = dict(zip(map(id, tensors), log_calls.result.sources, strict=False))
    own = [inputs.get(id(leaf)) for leaf in flatten(given)[0]]
    for at, value in enumerate(flatten(returned)[0]):
        source = sources.get(id(value), ())
        if source[:1] != ("call",):
            continue
        call = log_calls.calls[source[1]]
        if call.name not in ("cat", "concat", "concatenate") or not call.sources:
            continue
        joined = [part for part in call.sources[0] or () if part in own]
        if joined and own[at] not in joined:
            return True
    return False


def _is_same_call(one: Call, other: Call) -> bool:
    return one.structure is other.structure and one.leaves == other.leaves


def _same_sizes(one: Any, other: Any) -> bool:
    first, structure = flatten(one)
    second, other_structure = flatten(other)
    return structure.leaf_count == other_structure.leaf_count and all(
        a.shape == b.shape and a.dtype == b.dtype for a, b in zip(first, second, strict=True)
    )


def _grown(pairs: Sequence[tuple[Any, Any]]) -> frozenset[Dimension] | None:
    """Where tensors of one row have two after one step more; None where sizes differ otherwise."""
    later, before = (flatten([pair[side] for pair in pairs])[0] for side in (0, 1))
    grown = set()
    if len(later) != len(before):
        return None
    for place, (one, other) in enumerate(zip(later, before, strict=True)):
        if one.dtype != other.dtype or one.dim() != other.dim():
            return None
        for axis, (now, first) in enumerate(zip(one.shape, other.shape, strict=True)):
            if (now, first) == (2, 1):
                grown.add((place, axis))
            elif now != first:
                return None
    return frozenset(grown)


def _is_alike(one: Any, other: Any) -> bool:
    """Whether two results have the same tensors at the same places, of the same ranks."""
    first, structure = flatten(one)
    second, other_structure = flatten(other)
    return leaf_paths(structure) == leaf_paths(other_structure) and all(
        a.dim() == b.dim() and a.dtype == b.dtype for a, b in zip(first, second, strict=True)
    )
