"""The search for the argument that carries the cache, by calls on fake tensors of fixed sizes."""

from __future__ import annotations

import inspect
import itertools
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from cachefree.calls import Call, TensorSpec
from cachefree.candidates import BY_ORDER, candidates, namesakes
from cachefree.counted import Count, counts_of
from cachefree.dimensions import DECODERS, Dimension, find_dimensions
from cachefree.errors import (
    CacheFreeError,
    CacheNotFoundError,
    CaptureError,
    Refusal,
    SourceLine,
)
from cachefree.explaining import line_of
from cachefree.first_only import choices, is_apart
from cachefree.inputs import BUFFER_NAMES, CACHE_NAMES, HELD_BY_CALLER, FirstCall, call_of
from cachefree.places import Carried, Carry, Link, Place, items_of, select
from cachefree.signatures import signature_of
from cachefree.structure import flatten
from cachefree.trials import FirstRuns, Trials
from cachefree.units import with_units

__all__ = ["Found", "Search"]

log = logging.getLogger(__name__)
# Scores of places that are a cache's by name and by form, by name, and by neither.
_TIERS = ((3.0, math.inf), (2.0, 3.0), (-math.inf, 2.0))
_SURE = re.compile(r"past|cache|(^|_)kvs?(_|$)|^mems?$", re.IGNORECASE)
_FLAGS = re.compile(r"cache|present|past|state|mem|incremental|return", re.IGNORECASE)


@dataclass
class Found:
    """A first call, and where a later call takes its cache.

    Attributes:
        args: Positional arguments of the first call.
        kwargs: Its keyword arguments.
        call: It, taken apart.
        groups: The dimensions of its inputs that vary together.
        query: The group whose size is the number of new tokens.
        links: The places of the cache, with what feeds them.
        total: Dimensions that are past + query on later calls.
        tokens: How many new tokens a later call takes: any number, or one only.
        notes: What was assumed, in words.
        grown: Places and axes of the cache's tensors, in order, that have one row after a first
            call and one more after each later one, where a call takes one token and no dimension
            of its inputs says so.
        absent: Arguments of the first call that later calls leave out.
        counts: Arguments that are the number of past tokens on later calls.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    call: Call
    groups: list[list[Dimension]]
    query: list[Dimension]
    links: tuple[Link, ...]
    total: frozenset[Dimension]
    tokens: int
    notes: tuple[str, ...]
    grown: frozenset[Dimension] = frozenset()
    absent: tuple[str, ...] = ()
    counts: tuple[Count, ...] = ()


class Search:
    """The search for the cache on fake tensors of fixed sizes.

    Args:
        model: Any module.
        first: How it is called first.
        cache: Names of the cache's arguments, or None.
        carry: ``(outputs, inputs) → later inputs``, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        first: FirstCall,
        cache: str | Sequence[str] | None,
        carry: Carry | None,
    ) -> None:
        self.model = model
        self.first = first
        self.signature = signature_of(model)
        self.names = dict(enumerate(self.signature.parameters))
        self.wanted = (cache,) if isinstance(cache, str) else tuple(cache or ())
        self.carry = None if carry is None else _heard(carry)
        self.trials = Trials(model, self.names, is_told=bool(self.wanted or carry))
        self._finds_units = False

    def run(self) -> Found:
        """The first place that a later call takes the cache at.

        Raises:
            CacheNotFoundError: no argument carries a cache, or several could.
            CaptureError: the model does not run.
        """
        unknown = [
            name
            for name in self.wanted
            if name.split(".")[0].split("[")[0] not in self.signature.parameters
        ]
        if unknown:
            raise CacheNotFoundError(
                Refusal(
                    f"The model's forward has no argument {unknown[0]!r}.",
                    why=f"cache={self.wanted!r} was given; the arguments are "
                    f"{', '.join(self.signature.parameters)}.",
                    remedy="Name one of them.",
                )
            )
        if self.carry is not None:
            return self._carried(self.carry)
        found = self._found()
        if found is not None:
            return found
        failures = list(self.trials.failures)
        for absent in self._absent_choices():
            self.trials.absent = absent
            found = self._found()
            if found is not None:
                note = f"{' and '.join(absent)} given on the first call alone"
                return replace(found, absent=absent, notes=(*found.notes, note))
        self.trials.absent, self.trials.failures = (), failures
        found = self._of_any_name()
        if found is not None:
            return found
        self.trials.failures = failures
        found = self._in_units()
        if found is not None:
            return found
        self.trials.failures = failures
        raise self._not_found()

    def _of_any_name(self) -> Found | None:
        """An argument that takes a state of fixed size, whatever it is called.

        Nothing grows, so that only what later calls compute of it tells that it is a state.
        """
        self.trials.takes_any_name = True
        try:
            found = None if self.wanted else self._found()
        finally:
            self.trials.takes_any_name = False
        if found is None:
            return None
        places = " and ".join(link.place.path for link in found.links)
        note = f"{places} taken for the cache: a later call computes something of what it returned"
        return replace(found, notes=(*found.notes, note))

    def _in_units(self) -> Found | None:
        """The place of the cache where several rows of an input are one of the cache's."""
        self._finds_units = True
        try:
            found = self._found() or self._of_any_name()
        finally:
            self._finds_units = False
        if found is None:
            return None
        units = {found.call.leaves[dim[0]].path: unit for dim, unit in found.call.units.items()}
        told = (f"{path} has a multiple of {unit} rows" for path, unit in units.items())
        return replace(found, notes=(*found.notes, *told))

    def _absent_choices(self) -> Iterator[tuple[str, ...]]:
        """Arguments that later calls may leave out, where the user gave them to the first one."""
        if self.first.is_given:
            yield from choices(self.signature, self.first.args, self.first.kwargs)

    def _found(self) -> Found | None:
        """The first place that a later call takes the cache at."""
        for flags in self._flag_choices():
            args, kwargs = self.first.args, {**self.first.kwargs, **flags}
            call = call_of(self.model, args, kwargs, self.names)
            if self.first.result is not None and not flags:
                self.trials.known = (call, self.first.result)
            try:
                call, groups = find_dimensions(self.model, call)
                if self._finds_units:
                    call, groups = with_units(self.model, call, groups)
            except Exception as error:  # noqa: BLE001 - the model may raise anything
                log.debug("the model does not run with %s: %s", flags, error)
                continue
            if self._finds_units and not call.units:
                continue
            counts = counts_of(self.signature, args, kwargs)
            for self.trials.counts in (counts, ()) if counts else ((),):
                found = self._with(args, kwargs, call, groups, flags)
                if found is not None:
                    found = self._counted(found)
                    return found if self.wanted else self._with_namesakes(found)
        return None

    def _carried(self, carry: Carry) -> Found:
        """The places that ``carry`` feeds."""
        args, kwargs = self.first.args, self.first.kwargs
        call, groups = find_dimensions(self.model, call_of(self.model, args, kwargs, self.names))
        for query in sorted(groups, key=lambda group: _unlikely_tokens(call, group)):
            runs = self.trials.first_runs(call, query)
            if runs is None:
                continue
            part = runs.part
            own = {id(leaf) for leaf in flatten(part)[0]}
            inputs = args if args else dict(kwargs)
            links = []
            later = items_of(carry(part, inputs))
            self._refuse_computed(carry, part, inputs, later, own)
            for key, value in later:
                if any(id(leaf) in own for leaf in flatten(value)[0]):
                    is_name = isinstance(key, str)
                    place = Place(key if is_name else self.names[key], None if is_name else key)
                    links.append(Link(place, (Carried(carry, inputs, key),)))
            accepted = links and self.trials.accepts(call, query, tuple(links), runs)
            if accepted:
                total, tokens = accepted
                notes = (*self.first.assumed,)
                return Found(args, kwargs, call, groups, query, tuple(links), total, tokens, notes)
        attempts = "".join(
            f"\n         tried {attempt}" for attempt in _likeliest_failures(self.trials.failures)
        )
        raise CacheNotFoundError(
            Refusal(
                "The later inputs that carry= gives do not run, or hold no output of the call.",
                why=f"No output of the first call was found in them as it is.{attempts}",
                remedy="carry takes (outputs, inputs) and puts outputs, unchanged, into later "
                "inputs.",
            )
        )

    def _refuse_computed(
        self, carry: Carry, part: Any, inputs: Any, later: list[tuple[Any, Any]], own: set[int]
    ) -> None:
        """Refuses a carry that hands on outputs as they are after the first call alone.

        Raises:
            CacheNotFoundError: after a later call it gives something else.
        """
        fed = [key for key, value in later if any(id(x) in own for x in flatten(value)[0])]
        given = dict(items_of(inputs)) | dict(later)
        then = carry(part, given if isinstance(inputs, dict) else tuple(given.values()))
        after = dict(items_of(then))
        for key in fed:
            if not any(id(leaf) in own for leaf in flatten(after.get(key))[0]):
                name = key if isinstance(key, str) else self.names[key]
                raise CacheNotFoundError(
                    Refusal(
                        f"carry= computes {name} after a later call.",
                        why="The one graph hands its outputs on as they are: what is computed "
                        "between two calls is no part of it.",
                        remedy="Let the model return the whole cache, joined.",
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
    ) -> Found | None:
        """The links that a later call accepts; None where it accepts none."""
        accepted: list[tuple[float, Found]] = []
        queries = sorted(groups, key=lambda group: _unlikely_tokens(call, group))
        if (self.first.is_given or len(groups) == 1) and _has_single_token(call, groups):
            queries.append([])  # a step: a call takes one token, and has no axis for tokens
        for least, most in _TIERS:  # no other argument is tried where one by name will do
            is_sure, is_last = math.isinf(most), math.isinf(least)
            if accepted or (is_last and self._has_sure_name(args, kwargs)):
                break
            for query in queries:
                if not is_apart(call, self.trials.absent, query):
                    continue
                runs = self.trials.first_runs(call, query)
                if runs is None:
                    continue
                named = tuple(namesakes(self.model, runs.part))
                offered = candidates(self.signature, args, kwargs, runs.part, self.wanted, named)
                for score, links in offered:
                    told = self.wanted or self.carry
                    if not (is_sure if told else least <= score < most):
                        continue
                    accepted_by = self.trials.accepts(call, query, links, runs)
                    is_told = score != BY_ORDER or _is_told_by_order(links, runs)
                    if accepted_by is None or not is_told:
                        continue
                    total, tokens = accepted_by
                    notes = (
                        *self.first.assumed,
                        *(
                            f"{flag}={value} so that the model returns its cache"
                            for flag, value in flags.items()
                        ),
                    )
                    grown = frozenset() if query else self.trials.grown
                    found = Found(
                        args, kwargs, call, groups, query, links, total, tokens, notes, grown
                    )
                    if is_sure:
                        return found
                    accepted.append((score, found))
                if accepted:
                    break
        return _likeliest(accepted) if accepted else None

    def _counted(self, found: Found) -> Found:
        """With the arguments that count what is past."""
        if not self.trials.counts:
            return found
        accepted = found.total, found.tokens
        counts = self.trials.counting(
            found.call, found.query, found.links, accepted, self.trials.counts
        )
        told = tuple(f"{count.name} is the number of tokens that are past" for count in counts)
        return replace(found, counts=counts, notes=(*found.notes, *told))

    def _with_namesakes(self, found: Found) -> Found:
        """With every other argument that comes back in the result under its own name, or as found.

        ``return logits, hidden, coverage`` feeds ``coverage=None`` as well as ``hidden=None``.
        """
        runs = self.trials.first_runs(found.call, found.query)
        assert runs is not None
        taken = {link.place.parameter for link in found.links}
        fed = [link.selector for link in found.links]
        more = []
        for name, selector in namesakes(self.model, runs.part):
            parameter = self.signature.parameters.get(name)
            is_free = parameter is not None and parameter.default is None and name not in taken
            if not is_free or name in found.kwargs or any(selector == own[:1] for own in fed):
                continue
            if list(self.signature.parameters).index(name) >= len(found.args):
                more.append(Link(Place(name), selector))
        more += self._beside(found, {link.place.parameter for link in more} | taken)
        links = (*found.links, *more)
        if not more or () in fed:
            return found
        failures, self.trials.is_told = list(self.trials.failures), True
        try:
            # what is of fixed size alone fits with any dimension as the tokens
            for query in (found.query, *(g for g in found.groups if g != found.query), []):
                runs = self.trials.first_runs(found.call, query)
                accepted = runs and self.trials.accepts(found.call, query, links, runs)
                if accepted:
                    total, tokens = accepted
                    grown = frozenset() if query else self.trials.grown
                    return replace(
                        found, query=query, links=links, total=total, tokens=tokens, grown=grown
                    )
        finally:
            self.trials.failures, self.trials.is_told = failures, bool(self.carry)
        return found

    def _beside(self, found: Found, taken: set[str]) -> list[Link]:
        """The arguments behind the cache's, fed by what stands behind the cache in the result.

        ``forward(x, state=None, history=None)`` that gives ``y, state, hist``.
        """
        if (
            len(found.links) != 1
            or len(found.links[0].selector) != 1
            or taken != {found.links[0].place.parameter}
        ):
            return []
        names = list(self.signature.parameters)
        runs = self.trials.first_runs(found.call, found.query)
        assert runs is not None
        entry, at = found.links[0].selector[0], names.index(found.links[0].place.parameter) + 1
        behind = names[at:]
        if type(runs.part) is not tuple or type(entry) is not int or not behind:
            return []
        rest = runs.part[entry + 1 :]
        is_free = len(rest) == len(behind) and all(
            self.signature.parameters[name].default is None and name not in found.kwargs
            for name in behind
        )
        if not is_free or at < len(found.args) or not all(flatten(part)[0] for part in rest):
            return []
        return [Link(Place(name), (entry + 1 + i,)) for i, name in enumerate(behind)]

    def _has_sure_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether an argument that may take the cache is surely named so.

        Where it takes none, no other argument does.
        """
        return any(
            _SURE.search(name)
            and name not in kwargs
            and place >= len(args)
            and parameter.default is None
            for place, (name, parameter) in enumerate(self.signature.parameters.items())
        )

    def _not_found(self) -> CacheFreeError:
        if self.wanted:
            what = (
                f"The argument {', '.join(self.wanted)!s} does not take what the first call "
                "returns."
            )
        else:
            what = f"No argument of {type(self.model).__name__}.forward carries a cache."
        given = self._given_cache()
        if given:
            return CacheNotFoundError(
                Refusal(
                    f"The example inputs hold a cache already: {', '.join(given)}.",
                    why="Examples are those of a first call; what later calls take is found by "
                    "running it.",
                    remedy=f"Leave {', '.join(given)} out of example_inputs.",
                )
            )
        required = self._given_cache(is_required=True)
        if required:
            told = " and ".join(required)
            return CacheNotFoundError(
                Refusal(
                    f"The first call has to be given {told}: buffers for the whole sequence, by "
                    "their names.",
                    why="The cache that one graph takes is as long as what is past; how much of a "
                    "caller's buffer that is, no size tells.",
                    remedy=HELD_BY_CALLER.format(told),
                )
            )
        attempts = _likeliest_failures(self.trials.failures)
        tried = "".join(f"\n         tried {attempt}" for attempt in attempts)
        tried += "".join(
            f"\n         the result holds an object of class {name}, in which no tensor is "
            "found: a cache's class has to keep its tensors in attributes, tuples, lists or dicts"
            for name in self.trials.opaque
        )
        return CacheNotFoundError(
            Refusal(
                what,
                why="No output of the first call fits into an argument that may be left out, so "
                "that the sizes then grow as a cache's do. The arguments are "
                f"{', '.join(self.signature.parameters)}.{tried}",
                remedy="Name the argument with cache=; where the outputs do not feed it directly, "
                "give carry=; where the model keeps its cache on itself, return it from forward.",
            )
        )

    def _given_cache(self, *, is_required: bool = False) -> list[str]:
        """Arguments with a cache's name that the example gives and that could be left out.

        Or those that could not.
        """
        default = inspect.Parameter.empty if is_required else None
        names = BUFFER_NAMES if is_required else CACHE_NAMES
        given = {self.names[place]: value for place, value in enumerate(self.first.args)}
        given |= self.first.kwargs
        return [
            name
            for name, value in given.items()
            if names.search(name)
            and name in self.signature.parameters
            and self.signature.parameters[name].default is default
            and flatten(value)[0]
        ]


def _is_told_by_order(links: Sequence[Link], runs: FirstRuns) -> bool:
    """Whether order alone tells what feeds what: of states of one size it tells nothing."""
    parts = [flatten(select(runs.part, link.selector))[0] for link in links]
    leaves = [leaf for part in parts for leaf in part]
    whole = runs.over(1)
    if whole is None:
        return False
    others = [leaf for link in links for leaf in flatten(select(whole, link.selector))[0]]
    fixed = [
        leaf.shape for leaf, other in zip(leaves, others, strict=True) if leaf.shape == other.shape
    ]
    return len(set(fixed)) == len(fixed) < len(leaves)


def _likeliest_failures(failures: Sequence[str]) -> list[str]:
    """A few of them: calls that ran come first, and then those that were tried last."""
    distinct = list(dict.fromkeys(failures))
    ran = [failure for failure in distinct if "a later call runs" in failure]
    return [*ran, *[failure for failure in distinct if failure not in ran][-3:]][:3]


def _unlikely_tokens(call: Call, group: Sequence[Dimension]) -> tuple[bool, bool]:
    """The order in which dimensions are tried as the one of the new tokens."""
    paths = " ".join(call.leaves[place].path for place, _ in group)
    return DECODERS.search(paths) is None, min(axis for _, axis in group) == 0


def _likeliest(accepted: list[tuple[float, Found]]) -> Found:
    """The likeliest find, where all are at the same places; else a refusal."""
    places = {tuple(link.place.path for link in found.links) for _, found in accepted}
    largest = max(places, key=len)
    if all(set(largest).issuperset(place) for place in places):
        accepted = [
            (score, found)
            for score, found in accepted
            if tuple(link.place.path for link in found.links) == largest
        ]
    elif len(places) > 1:
        several = ", ".join(sorted(" and ".join(place) for place in places))
        raise CacheNotFoundError(
            Refusal(
                f"Several arguments could carry the cache: {several}.",
                why="A later call takes an output of the first call at each of them, and the sizes "
                "grow as a cache's do.",
                remedy="Name the one with cache=.",
            )
        )
    return max(accepted, key=lambda pair: pair[0])[1]


def _has_single_token(call: Call, groups: list[list[Dimension]]) -> bool:
    """Whether some input varies with the batch alone, as one token of each row does."""
    free = Counter(place for group in groups for place, _ in group)
    return any(
        free[place] <= 1 for place, leaf in enumerate(call.leaves) if isinstance(leaf, TensorSpec)
    )


def _heard(carry: Carry) -> Carry:
    """The user's own carry, with an error of its own where it gives no inputs."""

    def called(outputs: Any, inputs: Any) -> Any:
        try:
            later = carry(outputs, inputs)
        except Exception as error:
            what, why = "carry= raised an error.", f"{type(error).__name__}: {error}"
            raise _refused(what, why, line_of(error)) from error
        if not isinstance(later, (Mapping, tuple, list)):
            kind = "None" if later is None else type(later).__name__
            raise _refused(f"carry= gave {kind}, which is no inputs of a call.", "", None)
        return later

    def _refused(what: str, why: str, where: SourceLine | None) -> CaptureError:
        code = getattr(carry, "__code__", None)
        if where is None and code is not None:
            where = SourceLine(code.co_filename, code.co_firstlineno, code.co_name)
        remedy = (
            "carry takes (outputs, inputs): what a call gave, and its arguments as in "
            "example_inputs. It gives those of the next call, as a dict or a tuple, each output "
            "unchanged."
        )
        return CaptureError(Refusal(what, why=why, remedy=remedy, where=where))

    return called
