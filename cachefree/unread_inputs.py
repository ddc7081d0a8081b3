"""Inputs of the first call that its later path does not read, though later calls may be given them.

``if past is None: x = cat([see(picture), x], 1)``: whatever a later call passes for the picture is
ignored. It is then an input of first calls alone, as one that later calls leave out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from cachefree.calls import Call, SizeSpec, TensorSpec
from cachefree.discover import Discovery
from cachefree.first_only import argument_of, together, without
from cachefree.inputs import CACHE_NAMES
from cachefree.reading import Program
from cachefree.signatures import signature_of
from cachefree.structure import flatten
from cachefree.terms import Term, topological

__all__ = ["with_unread_left_out"]

log = logging.getLogger(__name__)


def with_unread_left_out(
    model: nn.Module, discovery: Discovery, first: Program, later: Program
) -> Discovery | None:
    """How the model is called where later calls leave out what they do not read; None if nothing.

    Args:
        model: Any module.
        discovery: How the model is called; later calls are given all inputs.
        first: The first path.
        later: The later path.
    """
    given = {argument_of(leaf.path) for leaf in discovery.first.tensors}
    optional = {
        name
        for name, parameter in signature_of(model).parameters.items()
        if parameter.default is None and not CACHE_NAMES.search(name)
    }
    read = _arguments(first.outputs) - _arguments((*later.outputs, *later.written))
    absent = tuple(sorted(read & given & optional))
    if not absent or discovery.both is not None:
        return None
    log.debug("later calls do not read %s", ", ".join(absent))
    names = dict(enumerate(signature_of(model).parameters))
    args, kwargs = discovery.later.structure.rebuild(list(discovery.later.leaves))
    leaves, structure = flatten(without(args, kwargs, names, absent), _is_spec)
    call = Call(structure, tuple(leaves), discovery.later.fixed)
    places = {spec.path: place for place, spec in enumerate(call.tensors)}
    own = [discovery.later.tensors[place].path for place in discovery.cache_leaves]
    if any(path not in places for path in own):
        return None
    note = f"{' and '.join(absent)} given on the first call alone"
    return replace(
        discovery,
        later=call,
        cache_leaves=tuple(places[path] for path in own),
        notes=(*discovery.notes, note),
        other=None,
        both=together(discovery.first, call, names, absent),
        first_only=absent,
    )


def _arguments(terms: Iterable[Term]) -> set[str]:
    """The arguments that some values are computed of."""
    return {argument_of(str(term.args[0])) for term in topological(terms) if term.op == "input"}


def _is_spec(value: object) -> bool:
    return isinstance(value, (TensorSpec, SizeSpec))
