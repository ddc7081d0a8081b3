"""Inputs that a call may leave out: the graph is the model without them where they have no rows.

Before: ``if pictures is not None: x = x.masked_scatter(ids == PICTURE, see(pictures))``.

After: the same without the question; a call that leaves the pictures out is given none.

Why equal: the path that the model takes where the argument is None is compared with the one graph
where its rows are 0. A text with places for pictures that are not given is an error of the graph.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
from torch import nn

from cachefree.calls import Call, TensorSpec
from cachefree.capture import Captured, capture
from cachefree.certify import Certified, unfit_result
from cachefree.discover import Discovery
from cachefree.errors import CacheFreeError
from cachefree.first_only import absences
from cachefree.laws.scatter import SCATTER_LAWS
from cachefree.left_out import named_arguments, without_arguments
from cachefree.reading import read
from cachefree.regimes import Kind, survey
from cachefree.signatures import signature_of
from cachefree.spec import Region
from cachefree.structure import flatten
from cachefree.terms import Table
from cachefree.uniform_inputs import values_asked
from cachefree.write_once import OneCall

__all__ = ["inputs_without_rows"]

log = logging.getLogger(__name__)
_MOST = 3
RowlessInputs = tuple[tuple[str, ...], dict[str, int], tuple[Region, ...]]


@dataclass(frozen=True)
class _Search:
    model: nn.Module
    table: Table
    names: dict[int, str]
    discovery: Discovery
    certified: Certified
    given: Captured

    def regions(
        self, kind: Kind, call: Call, absent: tuple[str, ...], sizes: Mapping[sympy.Symbol, int]
    ) -> tuple[Region, ...]:
        """Where calls without some arguments are the graph without rows of them."""
        given = without_arguments(self.model, call, absent)
        hints = self.discovery.hints
        try:
            program = read(capture(self.model, given, hints), self.table, self.names)
        except CacheFreeError as error:
            log.debug("a call without %s: %s", absent, error)
            return ()
        here = Kind(kind.name, given, kind.zero, kind.inputs, {**kind.ties, **sizes})
        found = survey(
            self.model,
            self.table,
            self.names,
            self.certified.outputs,
            here,
            program,
            hints,
            more=SCATTER_LAWS,
            unfit=functools.partial(unfit_result, kind.name, self.given, self.discovery),
        )
        if values_asked([found]):
            return ()
        return tuple(regime.region for regime in found.served)


def inputs_without_rows(
    model: nn.Module,
    table: Table,
    names: dict[int, str],
    discovery: Discovery,
    one: OneCall,
    certified: Certified,
    later: Captured,
    check: str,
) -> RowlessInputs:
    """Arguments that calls may leave out, all or none of them.

    Args:
        model: Any module.
        table: Of all terms.
        names: ``id`` of a parameter or buffer → its name.
        discovery: How the model is called.
        one: What the one graph is made from.
        certified: What was shown of it.
        later: The later path, whose result the graph has.
        check: As `cachefree.rewrite` has it; without a proof there are none.

    Returns:
        The arguments, the sizes that they then have, and the regions of calls without them.
    """
    nothing: RowlessInputs = ((), {}, ())
    is_plain = one.encoder is None and not (one.absent or one.ties or one.present)
    candidates = _candidates(model, discovery) if check == "prove" and is_plain else ()
    if discovery.asked or discovery.first_only or not candidates:
        return nothing
    search = _Search(model, table, names, discovery, certified, later)
    (first, _), (second, _) = certified.shown
    for absent in dict.fromkeys((candidates, *((name,) for name in candidates))):
        for sizes in absences(discovery.later, absent, discovery.hints):
            if 0 not in sizes.values():
                continue
            regions = search.regions(second, discovery.later, absent, sizes)
            if regions:
                regions += search.regions(first, discovery.first, absent, sizes)
                return absent, {str(symbol): size for symbol, size in sizes.items()}, regions
    return nothing


def _candidates(model: nn.Module, discovery: Discovery) -> tuple[str, ...]:
    """Arguments of nothing but tensors that may be None, and are none of the cache."""
    caches = {link.place.parameter for link in discovery.links}
    parameters = signature_of(model).parameters
    found = [
        name
        for name, value in named_arguments(model, discovery.later).items()
        if name not in caches
        and parameters[name].kind is parameters[name].POSITIONAL_OR_KEYWORD
        and parameters[name].default is None
        and _is_of_tensors(value)
    ]
    return tuple(found[:_MOST])


def _is_of_tensors(value: Any) -> bool:
    leaves, _ = flatten(value, lambda part: isinstance(part, TensorSpec))
    return bool(leaves)
