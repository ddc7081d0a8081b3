"""Arguments that the first call alone reads, so that later calls may leave them out.

Before: ``if state is None: memory = encode(source)``, ``else: memory = state[0]``: later calls are
``model(token, state=state)``, or ``model(token, None, state)``.

After: the graph has the input ``source`` all the same; a later call that leaves it out gets zeros.

Why equal: the model's later path does not depend on the argument, and the path that the model takes
where it is None is the same path, value for value, with no other question about sizes. It returns
its values in the same containers, with the same numbers, and leaves nothing on the model.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

from torch import nn

from cachefree.calls import Call, SizeSpec, TensorSpec
from cachefree.capture import capture
from cachefree.discover import Discovery
from cachefree.errors import CacheFreeError
from cachefree.fake_runs import run_on_fakes
from cachefree.first_only import without
from cachefree.reading import Program, read
from cachefree.results import is_same_result
from cachefree.signatures import signature_of
from cachefree.structure import flatten
from cachefree.terms import Table, topological

__all__ = ["arguments_left_out", "flags_needed", "named_arguments", "without_arguments"]

log = logging.getLogger(__name__)


def arguments_left_out(
    model: nn.Module,
    table: Table,
    names: dict[int, str],
    discovery: Discovery,
    later: Program,
    regimes: int,
) -> tuple[str, ...]:
    """The arguments that later calls may leave out, all of them at once.

    Args:
        model: Any module.
        table: Of all terms.
        names: ``id`` of a parameter or buffer → its name.
        discovery: How the model is called.
        later: The later path.
        regimes: How many paths later calls take, by their sizes.
    """
    unread = _unread(model, discovery, later)
    if not unread or regimes != 1:
        return ()
    try:
        call = without_arguments(model, discovery.later, unread)
        program = read(capture(model, call, discovery.hints, discovery.asked), table, names)
    except CacheFreeError as error:
        log.debug("a later call without %s: %s", unread, error)
        return ()
    known = {question.fact for question in later.captured.questions}
    asks = any(question.fact not in known for question in program.captured.questions)
    asks = asks or bool(program.captured.values)  # what is asked here was not compared
    return () if asks or not is_same_result(later, program) else unread


def flags_needed(model: nn.Module, discovery: Discovery) -> tuple[str, ...]:
    """Flags of the example that a call may not leave out.

    A flag such as ``use_cache=True``, without which the model returns no cache, stands for itself
    where a call leaves it out. With another one that is no default the model would compute
    something else under the same names.

    Args:
        model: Any module.
        discovery: How the model is called.
    """
    parameters = signature_of(model).parameters
    names = dict(enumerate(parameters))
    args, kwargs = discovery.first.structure.rebuild(list(discovery.first.leaves))
    given = {names[place]: value for place, value in enumerate(args) if place in names} | kwargs
    needed = []
    for name, value in given.items():
        structure = flatten(value, _is_spec)[1]
        if structure.kind != "constant":
            continue
        if (
            name in parameters
            and structure.difference(flatten(parameters[name].default, _is_spec)[1]) is None
        ):
            continue
        leaves, rest = flatten(without(args, kwargs, names, (name,)), _is_spec)
        try:
            _, result = run_on_fakes(model, Call(rest, tuple(leaves)), discovery.hints)
        except Exception as error:  # noqa: BLE001 - the model may raise anything
            log.debug("a first call without %s: %s", name, error)
            needed.append(name)
            continue
        if result.difference(discovery.first_path.outputs) is None:
            needed.append(name)
    return tuple(needed)


def _unread(model: nn.Module, discovery: Discovery, later: Program) -> tuple[str, ...]:
    """Arguments of nothing but tensors that the later path does not read, and that may be None."""
    read_ = {str(term.args[0]) for term in topological(later.outputs) if term.op == "input"}
    caches = {link.place.parameter for link in discovery.links}
    parameters = signature_of(model).parameters
    return tuple(
        name
        for name, value in named_arguments(model, discovery.later).items()
        if name not in caches
        and parameters[name].kind is parameters[name].POSITIONAL_OR_KEYWORD
        and parameters[name].default in (None, inspect.Parameter.empty)
        and (leaves := flatten(value, _is_spec)[0])
        and all(isinstance(leaf, TensorSpec) and leaf.path not in read_ for leaf in leaves)
    )


def named_arguments(model: nn.Module, call: Call) -> dict[str, Any]:
    """The arguments of a call by name; none where some have none."""
    args, kwargs = call.structure.rebuild(list(call.leaves))
    signature = signature_of(model)
    bound = signature.bind_partial(*args, **kwargs).arguments
    kinds = {signature.parameters[name].kind for name in bound}
    has_all = not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return dict(bound) if has_all else {}


def without_arguments(model: nn.Module, call: Call, names: tuple[str, ...]) -> Call:
    """The call with None in the place of some arguments."""
    named = {**named_arguments(model, call), **dict.fromkeys(names)}
    leaves, structure = flatten(((), named), _is_spec)
    return Call(structure, tuple(leaves), call.fixed)


def _is_spec(value: Any) -> bool:
    return isinstance(value, (TensorSpec, SizeSpec))
