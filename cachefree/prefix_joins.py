"""Where a value of the first call's own inputs is joined with one that later calls compute, too.

Before: ``if past is None: x = cat([see(picture), x], 1)``, and no such join later.

After: ``x = cat([seen, x], 1)`` at every call, ``seen`` having no rows on later ones.

The place is known by the function that computes ``x`` and by the line of the user's code that calls
it. That the later path computes the same value there is a proposal, which only a proof tells from
the model.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cachefree.facts import Facts
from cachefree.lifting.facade import Facade
from cachefree.rules.rule import at_first_call
from cachefree.sizes import symbols_of, user_line
from cachefree.terms import Table, Term

__all__ = ["INPUT", "Join", "Joined", "Places", "join_of", "padding_of", "rows_of", "without_rows"]

_CATS = (torch.cat, torch.concat, torch.concatenate)
Place = tuple[Any, Any, int]
"""A torch function, the user's line that calls it, and how often it did so before.

Or `INPUT` and the argument that is joined as it is given.
"""
INPUT = "input"


@dataclass(frozen=True)
class Join:
    """What is joined with the rows of first calls.

    Attributes:
        place: Where it is computed.
        axis: The axis of the join.
        is_behind: Whether it stands behind these rows.
    """

    place: Place
    axis: int
    is_behind: bool

    def of(self, value: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """A value joined with rows."""
        return torch.cat((rows, value) if self.is_behind else (value, rows), self.axis)


class Places:
    """Counts the calls of torch functions by the user's lines."""

    def __init__(self) -> None:
        self._count: Counter[tuple[Any, Any]] = Counter()

    def next(self, func: Any) -> Place:
        """The place of a call that is being made, two frames above."""
        key = (func, user_line(sys._getframe(2)))
        self._count[key] += 1
        return (*key, self._count[key])


def join_of(
    func: Any, args: Sequence[Any], kwargs: Any, own: torch.Tensor, places: dict[int, Place]
) -> Join | None:
    """The join that a call of a torch function is; None where it is another one.

    Args:
        func: The function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        own: The rows of first calls.
        places: Where each tensor was computed, by its identity.
    """
    parts = args[0] if func in _CATS and args else None
    if not isinstance(parts, (tuple, list)) or len(parts) != 2:
        return None
    other = parts[1] if parts[0] is own else parts[0]
    if other is own or not any(part is own for part in parts) or id(other) not in places:
        return None
    named = kwargs or {}
    axis = args[1] if len(args) > 1 else named.get("dim", named.get("axis", 0))
    return Join(places[id(other)], axis % own.dim(), parts[1] is other)


def padding_of(func: Any, args: Sequence[Any], kwargs: Any, places: dict[int, Place]) -> Any:
    """The join that a call of a torch function is, with rows of one number; None for another one.

    Args:
        func: The function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        places: Where each tensor was computed, by its identity.
    """
    if func is not nn.functional.pad:
        return None
    given = dict(zip(("input", "pad", "mode"), args, strict=False)) | (kwargs or {})
    source, pad = given["input"], tuple(given["pad"])
    padded = [at for at, rows in enumerate(pad) if type(rows) is not int or rows != 0]
    if len(padded) != 1 or given.get("mode", "constant") != "constant" or id(source) not in places:
        return None
    (at,) = padded
    if type(pad[at]) is not int or pad[at] < 0:
        return None
    return Join(places[id(source)], source.dim() - 1 - at // 2, is_behind=at % 2 == 0)


def rows_of(join: Join, args: Sequence[Any], kwargs: Any, result: torch.Tensor) -> torch.Tensor:
    """The rows of first calls that a call joins, see `join_of` and `padding_of`.

    Args:
        join: What the call is.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        result: What it gave.
    """
    if isinstance(args[0], (tuple, list)):
        part: torch.Tensor = args[0][0 if join.is_behind else 1]
        return part
    shape = list(result.shape)
    shape[join.axis] -= args[0].shape[join.axis]
    value = (kwargs or {}).get("value", args[3] if len(args) > 3 else None)
    return result.new_full(shape, value or 0)


class _Joining(TorchFunctionMode):
    """Joins some rows with what is computed at one place."""

    def __init__(self, join: Join, rows: torch.Tensor) -> None:
        super().__init__()
        self.join = join
        self.rows = rows
        self.places = Places()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        place = self.places.next(func)
        result = func(*args, **(kwargs or {}))
        if place != self.join.place:
            return result
        return self.join.of(result, self.rows)


class Joined(Facade):
    """The model with rows as an argument that it joins with one of its values.

    Args:
        model: Any module.
        join: Which value.
        name: The argument's name.
    """

    def __init__(self, model: nn.Module, join: Join, name: str) -> None:
        super().__init__(model)

        def forward(*args: Any, **kwargs: Any) -> Any:
            rows = kwargs.pop(name)
            if join.place[0] == INPUT:
                given = inspect.signature(model.forward).bind(*args, **kwargs)
                given.arguments[join.place[1]] = join.of(given.arguments[join.place[1]], rows)
                return model(*given.args, **given.kwargs)
            with _Joining(join, rows):
                return model(*args, **kwargs)

        self.__dict__["forward"] = forward


def without_rows(
    table: Table,
    term: Term,
    own: Term,
    rows: sympy.Symbol,
    count: Any,
    past: Sequence[sympy.Symbol],
    join: Join,
) -> Term:
    """A result without what comes of rows that are joined, where the first path cuts that off.

    Args:
        table: Of all terms.
        term: The result.
        own: What the first path gives.
        rows: How many rows are joined.
        count: As many are on the first call.
        past: The symbols of the past's lengths.
        join: Where they are joined.
    """
    if len(term.sizes) != len(own.sizes):
        return term
    facts = Facts(sympy.Ge(symbol, 0) for symbol in symbols_of(own.sizes))
    for axis, (size, due) in enumerate(zip(term.sizes, own.sizes, strict=True)):
        whole = at_first_call(sympy.sympify(size).subs(rows, count), past)
        if rows not in symbols_of([size]) or not facts.equal(whole, due + count):
            continue
        ends = (rows, size) if join.is_behind else (0, size - rows)
        shape = (*term.sizes[:axis], sympy.expand(size - rows), *term.sizes[axis + 1 :])
        return table.make(
            "slice", (term, axis, *ends, 1), shape, term.dtype, term.device, term.line
        )
    return term
