"""Which argument carries the cache, which outputs feed it, and what every size is.

The model is run on fake tensors at a few sizes. An argument carries the cache if a later call takes
there what an output of the first call is, and if what it then returns has the sizes that one first
call over all tokens returns.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch import nn
from torch.overrides import TorchFunctionMode

from cachefree.calls import Call, SizeSpec
from cachefree.capture import Captured
from cachefree.dimensions import DECODERS, Dimension, resized
from cachefree.errors import CacheNotFoundError, CaptureError, Refusal
from cachefree.example_sizes import PAST, capture_where_it_runs, hints_for, unlike
from cachefree.facts import Facts
from cachefree.fake_runs import run_on_fakes
from cachefree.first_only import argument_of, together
from cachefree.fixed import constants_of, without_fixed
from cachefree.inputs import FirstCall, find_first_call
from cachefree.later_call import LaterCall, Mark, is_mark, later_call
from cachefree.places import Carry, Link, select
from cachefree.search import Found, Search
from cachefree.sizes import size_symbol, symbols_of
from cachefree.structure import flatten, leaf_paths

__all__ = ["Carry", "Discovery", "cache_arguments", "discover"]

log = logging.getLogger(__name__)


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
        other: The same call with another reading of the cache's sizes: a last row that is always
            there (a state of fixed size) may also be one that is not there yet (a memory of at most
            one row, empty at first).
        both: A later call with the inputs that it may leave out, in the same order and with these
            behind the others; None where there are none.
        first_only: These arguments of the first call.
        unowned: The same call where rows before those of the tokens are not the cache's own from
            the start, but come of the first call; None where there are none.
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
    other: Discovery | None = None
    both: Call | None = None
    first_only: tuple[str, ...] = ()
    unowned: Discovery | None = None


def cache_arguments(discovery: Discovery) -> frozenset[str]:
    """The names of the arguments that carry the cache."""
    return frozenset(argument_of(link.place.path) for link in discovery.links)


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
    try:
        return _discovered(model, first, cache, carry)
    except (CacheNotFoundError, CaptureError):
        if first.plainer is None:
            raise
        try:
            return _discovered(model, first.plainer, cache, carry)
        except (CacheNotFoundError, CaptureError) as error:
            log.debug("nor without the inputs that were added: %s", error)
        raise


def _discovered(
    model: nn.Module,
    first: FirstCall,
    cache: str | Sequence[str] | None,
    carry: Carry | None,
) -> Discovery:
    search = Search(model, first, cache, carry)
    return _symbolic(model, search, search.run())


def _symbolic(model: nn.Module, search: Search, found: Found) -> Discovery:
    symbols = _named_groups(found)
    sizes = {dim: size_symbol(name) for name, group in symbols.items() for dim in group}
    first = resized(found.call, sizes)
    path, hints = capture_where_it_runs(model, first, hints_for(symbols))
    path = _without_constants(model, search, found, path, hints)
    first = path.call
    none = Facts(())
    ones = Facts(sympy.Ge(symbol, 1) for symbol in symbols_of(_sizes_of(first)))
    fixed, other, unowned = (
        _discovery(
            search,
            found,
            first,
            path,
            hints,
            later_call(search.names, found, first, path, facts, has_own_rows=has_own_rows),
        )
        for facts, has_own_rows in ((ones, True), (none, True), (ones, False))
    )
    if unowned.later.leaves != fixed.later.leaves:
        fixed.unowned = unowned
    if other.later.leaves != fixed.later.leaves:
        fixed.other = other
    elif found.absent:  # what the first call alone is given may make rows before the first token
        fixed.other = fixed.unowned
    return fixed


def _discovery(
    search: Search,
    found: Found,
    first: Call,
    path: Captured,
    hints: dict[str, int],
    given: LaterCall,
) -> Discovery:
    later = given.call
    hints = _with_past(hints, given.lengths)
    past = size_symbol("past")
    if past in symbols_of(_sizes_of(later)) and "past" not in hints:  # an input alone tells it
        hints["past"] = unlike(PAST, hints)
    _refuse_counters(later)
    asked = {"query": 1} if found.tokens == 1 else {}
    return Discovery(
        first,
        path,
        later,
        found.links,
        given.cache_leaves,
        given.carried,
        hints,
        asked,
        found.notes,
        _absent(search, found),
        both=together(first, later, search.names, found.absent) if found.absent else None,
        first_only=found.absent,
    )


def _without_constants(
    model: nn.Module, search: Search, found: Found, path: Captured, hints: dict[str, int]
) -> Captured:
    """The path without what the cache holds of the code's own constants."""
    constants = {
        name: value for name, value in constants_of(path).items() if _is_carried(found, path, name)
    }
    if not constants:
        return path
    copied = dataclasses.replace(path, graph=copy.deepcopy(path.graph))
    fixed = without_fixed(copied, frozenset(constants))
    given = later_call(search.names, found, fixed.call, fixed, Facts(()))
    sizes = {**_with_past(hints, given.lengths), "query": 1}
    return fixed if _hands_on(model, given.call, sizes, constants) else path


def _is_carried(found: Found, path: Captured, name: str) -> bool:
    """Whether a tensor of the result is a part of the cache."""
    marks = [leaf.path for leaf in path.output_leaves]
    result = path.outputs.rebuild([Mark(leaf) for leaf in path.output_leaves])
    assert name in marks
    return any(
        mark.spec.path == name
        for link in found.links
        for mark in flatten(select(result, link.selector), is_mark)[0]
    )


def _hands_on(
    model: nn.Module, later: Call, sizes: dict[str, int], constants: dict[str, Any]
) -> bool:
    """Whether a later call returns the constants that it is given, the tensors themselves."""
    writes = _Writes(constants.values())
    try:
        with writes:
            leaves, structure = run_on_fakes(model, later, sizes)
    except Exception:  # noqa: BLE001 - the model may raise anything
        return False
    if writes.were_made:
        return False
    returned = dict(zip(leaf_paths(structure), leaves, strict=True))
    return all(returned.get(name) is value for name, value in constants.items())


class _Writes(TorchFunctionMode):
    """Sees whether some tensors are written to."""

    def __init__(self, tensors: Iterable[Any]) -> None:
        super().__init__()
        self.own = {id(tensor) for tensor in tensors}
        self.were_made = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        is_write = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
        if is_write and args and id(args[0]) in self.own:
            self.were_made = True
        return func(*args, **(kwargs or {}))


def _with_past(hints: dict[str, int], more: dict[str, Any]) -> dict[str, int]:
    """The example sizes with those of the past."""
    hints = dict(hints)
    for name, expr in more.items():
        known = {size_symbol(other): size for other, size in hints.items()}
        length = int(sympy.sympify(expr).subs({**known, size_symbol("query"): PAST}))
        hints[name] = unlike(max(2, length), hints)
    return hints


def _absent(search: Search, found: Found) -> tuple[str, ...]:
    given = {search.names.get(place) for place in range(len(found.args))} | set(found.kwargs)
    given |= {link.place.parameter for link in found.links}
    given |= {count.name for count in found.counts}
    return tuple(
        name
        for name, parameter in search.signature.parameters.items()
        if name not in given
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    )


def _named_groups(found: Found) -> dict[str, list[Dimension]]:
    named: dict[str, list[Dimension]] = {}
    # time-major models have the batch behind the tokens
    batch_axis = 1 if min((axis for _, axis in found.query), default=1) == 0 else 0
    token_paths = " ".join(found.call.leaves[place].path for place, _ in found.query)
    has_encoder = DECODERS.search(token_paths) is not None
    for group in found.groups:
        path = found.call.leaves[group[0][0]].path
        if group == found.query:
            name = "query"
        elif "batch" not in named and min(axis for _, axis in group) == batch_axis:
            name = "batch"
        elif has_encoder or re.search(r"enc|memory|context|source|src|cross", path):
            name = "encoder"
        else:
            name = re.sub(r"\W+", "_", f"{path}_{group[0][1]}").strip("_")
        while name in named:
            name += "_"
        named[name] = group
    return named


def _refuse_counters(later: Call) -> None:
    """Refuses a Python number in the cache that no size of a tensor tells.

    Raises:
        CaptureError: there is one.
    """
    read = symbols_of(size for spec in later.tensors for size in spec.shape)
    refusals = [
        Refusal(
            f"The cache counts in Python: {spec.path} is a number that no tensor's size tells.",
            why="A graph takes tensors; a number that changes from call to call would be frozen.",
            remedy="Keep the count as a tensor, or read it from the size of a cached tensor.",
        )
        for spec in later.leaves
        if isinstance(spec, SizeSpec) and not symbols_of([spec.expr]) <= read
    ]
    if refusals:
        raise CaptureError(*refusals)


def _sizes_of(call: Call) -> list[Any]:
    return [size for spec in call.tensors for size in spec.shape]
