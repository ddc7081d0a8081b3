"""The model's own argument for what its encoder gives, found by what the model does with it."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cachefree.align import compare
from cachefree.calls import Call, SizeSpec, TensorSpec
from cachefree.capture import capture
from cachefree.discover import Discovery
from cachefree.encoder import Encoder
from cachefree.errors import CacheFreeError
from cachefree.facts import Facts
from cachefree.reading import Program, read
from cachefree.results import other_result
from cachefree.sizes import symbols_of
from cachefree.structure import flatten, leaf_paths
from cachefree.terms import Table, Term
from cachefree.uniform_inputs import combinations, uniforms
from cachefree.value_questions import ANSWERS, ValueQuestion

__all__ = ["states_argument"]

log = logging.getLogger(__name__)
_NAMES = re.compile(r"enc|memory|context|states")


def states_argument(
    model: nn.Module,
    table: Table,
    names: dict[int, str],
    discovery: Discovery,
    paths: tuple[Program, Program],
    encoder: Encoder,
    dropped: Sequence[str],
) -> str:
    """The argument with which the model skips its encoder; empty where none is shown to do so.

    With the encoder's output given there, in a tuple or as it is, and without the arguments that
    only the encoder reads, both of the model's paths have to be those that it takes with them, and
    to ask no other questions about sizes.
    """
    calls = (discovery.first, discovery.later)
    for name in discovery.absent:
        for is_tuple in (True, False) if _NAMES.search(name) else ():
            if all(
                _is_same_at_all(model, table, names, discovery, path, encoder, (*given, call))
                for call, path in zip(calls, paths, strict=True)
                if (given := _with(model, call, encoder, dropped, name, is_tuple=is_tuple))
            ):
                return name
    return ""


def _is_same_at_all(
    model: nn.Module,
    table: Table,
    names: dict[int, str],
    discovery: Discovery,
    path: Program,
    encoder: Encoder,
    given: tuple[Call, str, Call],
) -> bool:
    """The same, whatever the values are that the code asks for."""
    call, where, own = given
    asked = path.captured.values
    if not _is_same(model, table, names, discovery, path, encoder, (call, where), asked, {}):
        return False
    full = uniforms(table, own, asked)
    for some in combinations(full):
        with ANSWERS.of(frozenset(some)):
            try:
                captured = capture(model, own, discovery.hints, discovery.asked)
                there = read(captured, table, names)
            except CacheFreeError as error:
                log.debug("the model does not run with %s uniform: %s", some, error)
                return False
            here = {name: full[name] for name in some}
            if not _is_same(
                model, table, names, discovery, there, encoder, (call, where), asked, here
            ):
                return False
    return True


def _is_same(
    model: nn.Module,
    table: Table,
    names: dict[int, str],
    discovery: Discovery,
    path: Program,
    encoder: Encoder,
    given: tuple[Call, str],
    asked: Sequence[ValueQuestion],
    uniform: Mapping[str, Term],
) -> bool:
    """Whether a call that is given the encoder's output takes a path of the model."""
    call, where = given
    try:
        program = read(capture(model, call, discovery.hints, discovery.asked), table, names)
    except CacheFreeError as error:
        log.debug("the model does not take its encoder's output at %s: %s", where, error)
        return False
    known = {question.fact for question in path.captured.questions}
    if len(program.outputs) != len(path.outputs) or any(
        question.fact not in known for question in program.captured.questions
    ):
        return False
    sizes = symbols_of(size for leaf in call.tensors for size in leaf.shape)
    facts = Facts(tuple(size >= 1 for size in sizes))
    if other_result(path.captured, program.captured, facts, {}) is not None:
        return False
    if program.captured.changes or program.written.keys() - path.written.keys():
        return False
    numbers = {(question.path, question.number) for question in asked}
    if any((question.path, question.number) not in numbers for question in program.captured.values):
        return False
    inputs = {where: encoder.output}
    return compare(table, program.outputs, path.outputs, facts, {}, inputs, given=uniform).is_equal


def _with(
    model: nn.Module,
    call: Call,
    encoder: Encoder,
    dropped: Sequence[str],
    name: str,
    *,
    is_tuple: bool,
) -> tuple[Call, str]:
    """A call with the encoder's output at an argument, and its path there."""
    args, kwargs = call.structure.rebuild(list(call.leaves))
    signature = inspect.signature(model.forward)
    named: dict[str, Any] = {}
    for key, value in signature.bind_partial(*args, **kwargs).arguments.items():
        if signature.parameters[key].kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        else:
            named[key] = value
    kept = {key: value for key, value in named.items() if key not in dropped}
    states = encoder.states
    assert states.dtype is not None
    spec = TensorSpec(name, states.sizes, states.dtype, states.device or torch.device("cpu"))
    leaves, structure = flatten(((), {**kept, name: (spec,) if is_tuple else spec}), _is_spec)
    place = next(place for place, leaf in enumerate(leaves) if leaf is spec)
    where = leaf_paths(structure, "")[place]
    leaves[place] = TensorSpec(where, spec.shape, spec.dtype, spec.device)
    return Call(structure, tuple(leaves)), where


def _is_spec(value: Any) -> bool:
    return isinstance(value, (TensorSpec, SizeSpec))
