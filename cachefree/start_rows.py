"""Rows that the first call alone puts beside its own: a learned prompt, a blank, silence.

Before: ``if past is None: x = cat([start, x], 1)``.

After: ``x = cat([start[:, len(start) * min(past, 1):], x], 1)``.

Why equal: nothing is past on the first call, so that all rows are there, and on later calls
something is, so that none is. A state of fixed size does not tell whether a call is the first; one
that is empty on the first call does, and what it starts from is then computed. The later path is
captured while rows of any number are joined at the same place, which is no more than a proposal:
the outcome is compared with both of the model's paths.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._sympy.functions import Min

from cachefree.calls import TensorSpec
from cachefree.capture import capture
from cachefree.common_sizes import resized
from cachefree.discover import Discovery
from cachefree.errors import CacheFreeError
from cachefree.facts import Facts
from cachefree.fake_runs import run_on_fakes
from cachefree.lifting.facade import Facade
from cachefree.prefix import given_too, tensors_in
from cachefree.prefix_joins import (
    INPUT,
    Join,
    Joined,
    Place,
    Places,
    join_of,
    padding_of,
    rows_of,
    without_rows,
)
from cachefree.reading import Program, read
from cachefree.rules import replaced
from cachefree.sizes import size_symbol, symbols_of
from cachefree.starts import past_symbols, telling_slot, with_slot_emptied
from cachefree.terms import Table, Term
from cachefree.write_once import OneCall

__all__ = ["with_start_rows"]

log = logging.getLogger(__name__)
_MOST_JOINS = 3
_NAME = "start_rows"
_T = torch.Tensor
# what is made like a tensor, and of none of its values
_ALIKE = {
    *(torch.ones_like, torch.zeros_like, torch.full_like),
    *(_T.new_ones, _T.new_zeros, _T.new_full, _T.new_tensor),
}


def with_start_rows(
    model: nn.Module, table: Table, names: dict[int, str], discovery: Discovery, first: Program
) -> Iterator[OneCall]:
    """Proposals: the later path with rows joined that are all there where nothing is past.

    Args:
        model: Any module.
        table: Of all terms.
        names: ``id`` of a parameter or buffer → its name.
        discovery: How the model is called.
        first: The first path.
    """
    inputs = tuple(
        table.input(leaf.path, leaf.shape, leaf.dtype, leaf.device)
        for leaf in discovery.later.tensors
    )
    one = OneCall(discovery.later, inputs, (), {})
    past = past_symbols(discovery, one)
    told = None if past else telling_slot(discovery, one)
    if told is not None:
        past = (told.length,)
    if not past:
        return
    joins = _Joins()
    try:
        run_on_fakes(model, discovery.first, discovery.hints, joins)  # type: ignore[arg-type]
    except CacheFreeError as error:
        log.debug("no rows are looked for on the first call: %s", error)
        return
    for place, join in joins.found[:_MOST_JOINS]:
        try:
            outputs = _outputs(model, table, names, discovery, first, place, join, past)
            if outputs is None:
                continue
            found = replace(one, outputs=outputs)
            if told is not None:
                found = with_slot_emptied(table, discovery, first, found, told)
        except CacheFreeError as error:
            log.debug("no later path with rows at %s: %s", join, error)
            continue
        yield found


def _outputs(
    model: nn.Module,
    table: Table,
    names: dict[int, str],
    discovery: Discovery,
    first: Program,
    place: Place,
    join: Join,
    past: Sequence[sympy.Symbol],
) -> tuple[Term, ...] | None:
    """What the later path gives with the rows; None where they are no fixed number of rows."""
    seen = capture(_SeenPart(model, place, join), discovery.first, discovery.hints)
    start = read(seen, table, names).outputs[-1]
    least = Facts(sympy.Ge(symbol, 1) for symbol in symbols_of(start.sizes))
    count = sympy.sympify(least.simplified(start.sizes[join.axis]))
    if not count.is_Integer or start.dtype is None or start.device is None:
        return None
    rows = size_symbol(f"{_NAME}_count")
    shape = (*start.sizes[: join.axis], rows, *start.sizes[join.axis + 1 :])
    spec = TensorSpec(_NAME, shape, start.dtype, start.device)
    call, hints = given_too(discovery, spec, rows)
    path = read(capture(Joined(model, join, spec.path), call, hints), table, names)
    if not path.outputs or len(path.outputs) != len(first.outputs):
        return None
    left = count - count * Min(past[0], sympy.Integer(1))
    part = table.make(
        "slice",
        (start, join.axis, count - rows, count, 1),
        shape,
        start.dtype,
        start.device,
        start.line,
    )
    given = table.input(spec.path, spec.shape, spec.dtype, spec.device)
    outputs = replaced(table, path.outputs, {given: part})
    outputs = tuple(
        term
        if place in discovery.carried
        else without_rows(table, term, own, rows, count, past, join)
        for place, (term, own) in enumerate(zip(outputs, first.outputs, strict=True))
    )
    return resized(table, outputs, {rows: left})


class _Joins(TorchFunctionMode):
    """Where values that are made of no input are joined with others that are."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Place, Join]] = []
        self._calls = Places()
        self._places: dict[int, Place] = {}
        self._of_inputs: dict[int, torch.Tensor] = {}

    def given(self, inputs: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Says what the model is called with: path and tensor."""
        for path, tensor in inputs:
            self._of_inputs[id(tensor)] = tensor
            self._places[id(tensor)] = (INPUT, path, 0)

    def returned(self, leaves: Iterable[Any]) -> None:
        """Nothing is asked of the result."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        place = self._calls.next(func)
        tensors = tensors_in((args, kwargs))
        result = func(*args, **(kwargs or {}))
        made = tensors_in(result)
        if func not in _ALIKE and any(id(tensor) in self._of_inputs for tensor in tensors):
            joins = [
                join_of(func, args, kwargs, tensor, self._places)
                for tensor in tensors
                if id(tensor) not in self._of_inputs
            ]
            joins.append(padding_of(func, args, kwargs, self._places))
            self.found += [(place, join) for join in joins if join is not None]
            self._of_inputs |= {id(tensor): tensor for tensor in made}
            self._places |= {id(tensor): place for tensor in made}
        return result


class _SeenPart(Facade):
    """The model with what one call joins beside its result."""

    def __init__(self, model: nn.Module, place: Place, join: Join) -> None:
        super().__init__(model)

        def forward(*args: Any, **kwargs: Any) -> Any:
            with _Seeing(place, join) as seeing:
                result = model(*args, **kwargs)
            return result, seeing.part

        self.__dict__["forward"] = forward


class _Seeing(TorchFunctionMode):
    def __init__(self, place: Place, join: Join) -> None:
        super().__init__()
        self.part: torch.Tensor | None = None
        self._place, self._join = place, join
        self._calls = Places()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        is_it = self._calls.next(func) == self._place
        result = func(*args, **(kwargs or {}))
        if is_it:
            self.part = rows_of(self._join, args, kwargs, result)
        return result
