"""Calls with an input whose elements are all one number, where the model's code asks for that.

The one graph is made from the paths that the code takes where they are not, for any values. Where
they are, the code may take another path (no mask at all, say). It is captured, and compared with
the one graph in every region of sizes, with that number put in for the input on both sides.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch

from cachefree.calls import Call, TensorSpec
from cachefree.discover import Discovery
from cachefree.errors import Refusal, UnsupportedBranchError
from cachefree.reading import Program
from cachefree.regimes import Kind, Survey, captured_at
from cachefree.terms import Table, Term
from cachefree.value_questions import NONZERO, ValueQuestion

__all__ = ["combinations", "refuse_further_questions", "uniform_kinds", "uniforms", "values_asked"]

aten = torch.ops.aten
_MOST = 3


def values_asked(surveys: Sequence[Survey]) -> tuple[ValueQuestion, ...]:
    """What the code asks about values on any of the paths."""
    asked = [
        question
        for found in surveys
        for regime in (*found.served, *found.unequal)
        for question in regime.program.captured.values
    ]
    return tuple({(question.path, question.number): question for question in asked}.values())


def uniform_kinds(
    model: torch.nn.Module,
    table: Table,
    names: dict[int, str],
    kinds: Sequence[Kind],
    surveys: Sequence[Survey],
    discovery: Discovery,
    pinned: Mapping[sympy.Symbol, int] | None,
) -> list[tuple[Kind, Program]]:
    """Each call in which some inputs are one number throughout, with the path taken there.

    Args:
        model: The model.
        table: Of all terms.
        names: ``id`` of a parameter or buffer → its name.
        kinds: The calls.
        surveys: What was found of each.
        discovery: How the model is called.
        pinned: Sizes that the later path stands for alone.

    Raises:
        UnsupportedBranchError: there are too many such questions, or they differ.
        CaptureError: the model does not run there.
    """
    found = []
    for kind, survey in zip(kinds, surveys, strict=True):
        asked = values_asked([survey])
        if not asked:
            continue
        if len({question.path for question in asked}) < len(asked) or len(asked) > _MOST or pinned:
            raise _too_many(asked)
        full = uniforms(table, kind.call, asked)
        for some in combinations(full):
            here = replace(kind, uniform={path: full[path] for path in some})
            found.append(
                (here, captured_at(model, table, names, here, _sizes(kind, discovery), {}))
            )
    return found


def uniforms(table: Table, call: Call, asked: Sequence[ValueQuestion]) -> dict[str, Term]:
    """Each input that is asked about as a tensor whose elements are all as asked for."""
    specs = {spec.path: spec for spec in call.tensors}
    return {question.path: _uniform(table, specs[question.path], question) for question in asked}


def _uniform(table: Table, spec: TensorSpec, question: ValueQuestion) -> Term:
    """A tensor whose elements are all the number asked for; or the input with ones for zeros."""
    shape, where = tuple(spec.shape), question.where

    def full(number: Any) -> Term:
        args = (shape, number, spec.dtype, spec.device)
        return table.make("full", args, shape, spec.dtype, spec.device, where)

    if question.number != NONZERO:
        return full(bool(question.number) if spec.dtype == torch.bool else question.number)
    own = table.input(f"{spec.path} anywhere", shape, spec.dtype, spec.device)
    is_zero = table.make(aten.eq.Scalar, (own, 0), shape, torch.bool, spec.device, where)
    return table.like(own, aten.where.self, (is_zero, full(1), own))


def combinations(paths: Mapping[str, Term]) -> Iterator[tuple[str, ...]]:
    """Every choice of one or more of some inputs."""
    for count in range(1, len(paths) + 1):
        yield from itertools.combinations(paths, count)


def refuse_further_questions(surveys: Sequence[Survey], kinds: Sequence[Kind]) -> None:
    """Refuses questions that are asked only where another one was answered with yes.

    Raises:
        UnsupportedBranchError: there are such.
    """
    general: dict[str, set[tuple[str, int | str]]] = {}
    for found, kind in zip(surveys, kinds, strict=True):
        asked = {(question.path, question.number) for question in values_asked([found])}
        known = general.setdefault(kind.name, asked)
        if asked - known:
            raise _too_many(values_asked([found]))


def _sizes(kind: Kind, discovery: Discovery) -> dict[str, int]:
    """Example sizes of the call's symbols."""
    return {str(symbol): discovery.hints.get(str(symbol), 5) for symbol in kind.symbols}


def _too_many(asked: Sequence[ValueQuestion]) -> UnsupportedBranchError:
    first = asked[0]
    what = ", ".join(f"whether {q.path} is {q.number} throughout" for q in asked)
    return UnsupportedBranchError(
        Refusal(
            "The model's Python code asks too much about the values of its inputs.",
            why=f"It asks {what}; each answer may choose another path.",
            remedy="Compute it with tensor operators (torch.where, masks), or ask once.",
            where=first.where,
        )
    )
