"""What the first call sees or hears before its text, through an encoder of its own.

An input of a fixed size cannot be empty on the calls that leave it out. What is computed of it can:
the value through which it reaches the rest of the model becomes an input of the one graph, with any
number of rows, and none on later calls.

Before: ``x = cat([project(see(pictures)), x], 1) if pictures is not None else x``.

After: ``x = cat([seen, x], 1)``, ``seen`` being ``project(see(pictures))``, or no rows.

Why equal: the one graph is captured while that value is replaced, which is no more than a proposal.
With ``project(see(pictures))`` there it is compared with the model's own first path, and with no
rows there with the path that later calls take.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cachefree.calls import Call, SizeSpec, TensorSpec
from cachefree.capture import capture
from cachefree.discover import Discovery
from cachefree.encoder import Encoder
from cachefree.errors import CacheFreeError
from cachefree.fake_runs import run_on_fakes
from cachefree.first_only import argument_of
from cachefree.lifting.facade import Facade
from cachefree.prefix_joins import Join, Joined, Place, Places, join_of, without_rows
from cachefree.reading import Program, read
from cachefree.sizes import size_symbol
from cachefree.starts import past_symbols
from cachefree.structure import flatten
from cachefree.terms import Table, Term
from cachefree.write_once import OneCall

__all__ = ["given_too", "tensors_in", "with_prefixes"]

log = logging.getLogger(__name__)
_MOST_AXES = 3


def with_prefixes(
    model: nn.Module, table: Table, names: dict[int, str], discovery: Discovery
) -> Iterator[tuple[OneCall, Program]]:
    """Proposals: the path that is given the cache and what was computed of the first call's inputs.

    Args:
        model: Any module.
        table: Of all terms.
        names: ``id`` of a parameter or buffer → its name.
        discovery: How the model is called; some inputs are of first calls only.
    """
    meetings = _Meetings(discovery.first_only)
    try:
        run_on_fakes(model, discovery.first, discovery.hints, meetings)  # type: ignore[arg-type]
        number = meetings.last_before()
        if number is None:
            return
        first = capture(_Seen(model, number), discovery.first, discovery.hints)
    except CacheFreeError as error:
        log.debug("no value stands between the first call's own inputs and the rest: %s", error)
        return
    *own, output = read(first, table, names).outputs
    for join in meetings.joins.get(number, ()):
        try:
            yield _proposal(model, table, names, discovery, join, output, join.axis, own)
        except CacheFreeError as error:
            log.debug("no later path with %s: %s", join, error)
    batch = size_symbol("batch")
    axes = [axis for axis, size in enumerate(output.sizes) if size != batch]
    for axis in axes[:_MOST_AXES]:
        try:
            yield _proposal(model, table, names, discovery, number, output, axis)
        except CacheFreeError as error:
            log.debug("no path with any number of rows on axis %s: %s", axis, error)


def _proposal(
    model: nn.Module,
    table: Table,
    names: dict[int, str],
    discovery: Discovery,
    place: int | Join,
    output: Term,
    axis: int,
    results: Sequence[Term] = (),
) -> tuple[OneCall, Program]:
    whole = discovery.both
    assert whole is not None
    assert output.dtype is not None
    assert output.device is not None
    name = f"{discovery.first_only[0]}_states"
    rows = size_symbol(f"{name}_rows")
    shape = (*output.sizes[:axis], rows, *output.sizes[axis + 1 :])
    spec = TensorSpec(name, shape, output.dtype, output.device)
    call, hints = given_too(discovery, spec, rows)
    subject = (
        Joined(model, place, spec.path)
        if isinstance(place, Join)
        else _Replaced(model, place, spec, discovery)
    )
    path = capture(subject, call, hints, is_watched=True)
    program = read(path, table, names)
    states = table.input(spec.path, spec.shape, spec.dtype, spec.device)
    own = tuple(
        table.input(leaf.path, leaf.shape, leaf.dtype, leaf.device)
        for leaf in whole.tensors
        if argument_of(leaf.path) in discovery.first_only
    )
    inputs = tuple(
        table.input(leaf.path, leaf.shape, leaf.dtype, leaf.device) for leaf in whole.tensors
    )
    outputs = program.outputs
    if isinstance(place, Join) and len(results) == len(outputs):
        past = past_symbols(discovery, OneCall(discovery.later, (), (), {}))
        outputs = tuple(
            term
            if at in discovery.carried
            else without_rows(table, term, due, rows, output.sizes[axis], past, place)
            for at, (term, due) in enumerate(zip(outputs, results, strict=True))
        )
    encoder = Encoder(own, output, states, own, is_needed_whole=False)
    present = {rows: output.sizes[axis]}
    one = OneCall(whole, inputs, outputs, {}, encoder=encoder, absent={rows: 0}, present=present)
    return one, program


def given_too(
    discovery: Discovery, spec: TensorSpec, rows: sympy.Symbol
) -> tuple[Call, dict[str, int]]:
    """A later call with one keyword argument more, and its example sizes.

    Args:
        discovery: How the model is called.
        spec: The argument.
        rows: Its number of rows, which may be any.
    """
    args, kwargs = discovery.later.structure.rebuild(list(discovery.later.leaves))
    leaves, structure = flatten((args, {**kwargs, spec.path: spec}), _is_spec)
    used = set(discovery.hints.values())
    hint = next(size for size in itertools.count(11) if size not in used)
    call = Call(structure, tuple(leaves), discovery.later.fixed)
    return call, {**discovery.hints, str(rows): hint}


class _Meetings(TorchFunctionMode):
    """Where values that are computed of some arguments alone meet others.

    Args:
        own: The arguments.
    """

    def __init__(self, own: Iterable[str]) -> None:
        super().__init__()
        self.own = frozenset(own)
        self.count = 0
        self.parents: dict[int, set[int]] = {}  # number of a call → those of its own operands
        self.met: set[int] = set()
        self.joins: dict[int, list[Join]] = {}  # an own value's call → where it is joined
        self._calls = Places()
        self._places: dict[int, Place] = {}  # a tensor → where it was computed
        self._held: dict[int, tuple[Any, int | None]] = {}  # a tensor → the call that made it

    def given(self, inputs: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Says what the model is called with: path and tensor."""
        for path, tensor in inputs:
            self._held[id(tensor)] = tensor, -1 if argument_of(path) in self.own else None

    def returned(self, leaves: Iterable[Any]) -> None:
        """Own values that are returned as they are meet the result."""
        self.met |= self._own_of(leaves)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        number, self.count = self.count, self.count + 1
        place = self._calls.next(func)
        tensors = tensors_in((args, kwargs))
        result = func(*args, **(kwargs or {}))
        self._places |= {id(tensor): place for tensor in tensors_in(result)}
        held = [self._held[id(tensor)][1] for tensor in tensors if id(tensor) in self._held]
        if held:
            own = {made for made in held if made is not None}
            is_own = len(own) > 0 and None not in held
            if is_own:
                self.parents[number] = own
            elif tensors_in(result):
                self.met |= own
                self._note_joins(func, args, kwargs, tensors)
            for tensor in tensors_in(result):
                self._held[id(tensor)] = tensor, number if is_own else None
        return result

    def _note_joins(self, func: Any, args: Any, kwargs: Any, tensors: Iterable[Any]) -> None:
        for tensor in tensors:
            made = self._held.get(id(tensor), (None, None))[1]
            join = join_of(func, args, kwargs, tensor, self._places) if made is not None else None
            if made is not None and join is not None:
                self.joins.setdefault(made, []).append(join)

    def _own_of(self, values: Iterable[Any]) -> set[int]:
        held = [self._held.get(id(value)) for value in values]
        return {pair[1] for pair in held if pair is not None and pair[1] is not None}

    def last_before(self) -> int | None:
        """The last call through whose result every own value goes before it meets others."""
        for number in sorted(self.parents, reverse=True):
            if self.met and all(self._goes_through(met, number) for met in self.met):
                return number
        return None

    def _goes_through(self, value: int, number: int) -> bool:
        pending, seen = [value], {value}
        while pending:
            at = pending.pop()
            if at == number:
                continue
            if at not in self.parents:
                return False  # an argument itself
            fresh = self.parents[at] - seen
            seen |= fresh
            pending += fresh
        return True


class _Replacing(TorchFunctionMode):
    """Sees the result of one call of a torch function, and puts another value in its place.

    Args:
        number: The call's.
        value: What takes its place; None to leave it.
    """

    def __init__(self, number: int, value: torch.Tensor | None) -> None:
        super().__init__()
        self.number = number
        self.value = value
        self.count = 0
        self.seen: Any = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        number, self.count = self.count, self.count + 1
        result = func(*args, **(kwargs or {}))
        if number != self.number:
            return result
        self.seen = result
        return result if self.value is None else self.value


class _Seen(Facade):
    """The model with one of its values beside its result."""

    def __init__(self, model: nn.Module, number: int) -> None:
        super().__init__(model)

        def forward(*args: Any, **kwargs: Any) -> Any:
            with _Replacing(number, None) as replacing:
                result = model(*args, **kwargs)
            return result, replacing.seen

        self.__dict__["forward"] = forward


class _Replaced(Facade):
    """The model with one of its values as an argument."""

    def __init__(
        self, model: nn.Module, number: int, spec: TensorSpec, discovery: Discovery
    ) -> None:
        super().__init__(model)

        def forward(*args: Any, **kwargs: Any) -> Any:
            value = kwargs.pop(spec.path)
            own = _stand_ins(discovery, spec, value)
            with _Replacing(number, value):
                return model(*args, **kwargs, **own)

        self.__dict__["forward"] = forward


def _stand_ins(discovery: Discovery, spec: TensorSpec, value: torch.Tensor) -> dict[str, Any]:
    """Arguments of first calls whose values nothing reads: what is computed of them is replaced."""
    known = {size: value.shape[axis] for axis, size in enumerate(spec.shape)}

    def size(expr: Any) -> Any:
        if isinstance(expr, sympy.Symbol) and expr in known:
            return known[expr]
        hints = {size_symbol(name): hint for name, hint in discovery.hints.items()}
        return int(sympy.sympify(expr).subs(hints))

    assert discovery.both is not None
    leaves = [
        torch.zeros([size(s) for s in leaf.shape], dtype=leaf.dtype, device=leaf.device)
        if isinstance(leaf, TensorSpec) and argument_of(leaf.path) in discovery.first_only
        else None
        for leaf in discovery.both.leaves
    ]
    _, kwargs = discovery.both.structure.rebuild(leaves)
    return {name: kwargs[name] for name in discovery.first_only}


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in tensors_in(part)]
    if isinstance(value, dict):
        return [tensor for part in value.values() for tensor in tensors_in(part)]
    return []


def _is_spec(value: Any) -> bool:
    return isinstance(value, (TensorSpec, SizeSpec))
