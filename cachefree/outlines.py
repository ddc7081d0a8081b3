"""Which operators each line of the user's code runs, in both paths and in the one graph."""

from __future__ import annotations

import linecache
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from cachefree.capture import Captured
from cachefree.errors import SourceLine
from cachefree.provenance import LINE
from cachefree.report import Outline, Row
from cachefree.report.outline import blocks_of
from cachefree.terms import Term, operands, topological

__all__ = ["outline"]

_Key = tuple[str, str, int]
_Steps = dict[_Key, tuple[list[str], bool]]
_UNSEEN = ("detach", "alias", "lift_fresh_copy", "item", "input", "attribute", "constant")


def outline(
    first: Captured, later: Captured, one: Iterable[Term], cache_paths: Iterable[str]
) -> Outline:
    """Both paths and the one graph, line by line.

    Args:
        first: The first path.
        later: The later path.
        one: The outputs of the one graph; nothing where there is none.
        cache_paths: The paths of the cache's tensors among the inputs.
    """
    caches = frozenset(cache_paths)
    paths = [_steps(_of_graph(first, caches)), _steps(_of_graph(later, caches))]
    columns = [*paths, _steps(_of_terms(one, caches))]
    nothing: tuple[list[str], bool] = ([], False)
    rows = []
    for key in _merged([list(steps) for steps in columns]):
        module, file, line = key
        found = [steps.get(key, nothing) for steps in columns]
        a, b, c = (tuple(operators) for operators, _ in found)
        reads = [is_reading for _, is_reading in found]
        text = linecache.getline(file, line).strip() if file else ""
        rows.append(Row(module, file, line, text, (a, b, c), (reads[0], reads[1], reads[2])))
    return Outline(tuple(rows), blocks_of(rows))


def _steps(found: Iterable[tuple[SourceLine | None, str, bool]]) -> _Steps:
    steps: _Steps = {}
    for where, name, is_reading in found:
        if name in _UNSEEN:
            continue
        key = ("", "", 0) if where is None else (where.module, where.file, where.line)
        operators, was_reading = steps.get(key, ([], False))
        operators.append(name)
        steps[key] = (operators, was_reading or is_reading)
    return steps


def _of_graph(
    captured: Captured, caches: frozenset[str]
) -> Iterator[tuple[SourceLine | None, str, bool]]:
    specs = iter(captured.call.tensors)
    past: set[fx.Node] = set()
    for node in captured.graph.nodes:
        if node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor):
            if next(specs).path in caches:
                past.add(node)
        elif isinstance(node.target, torch._ops.OpOverload) and _gives_tensors(
            node.meta.get("val")
        ):
            is_reading = any(operand in past for operand in node.all_input_nodes)
            yield node.meta.get(LINE), _plain(str(node.target)), is_reading


def _of_terms(
    outputs: Iterable[Term], caches: frozenset[str]
) -> Iterator[tuple[SourceLine | None, str, bool]]:
    for term in topological(outputs):
        is_reading = any(
            operand.op == "input" and operand.args[0] in caches for operand in operands(term)
        )
        yield term.line, _plain(term.name), is_reading


def _gives_tensors(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(isinstance(part, torch.Tensor) for part in value)
    return isinstance(value, torch.Tensor)


def _plain(name: str) -> str:
    """An operator's name without its namespace, its overload, and where it writes."""
    name = name.removeprefix("aten.").removeprefix("cachefree.").split(".")[0]
    return {"_unsafe_view": "view"}.get(name, name.rstrip("_"))


def _merged(orders: Sequence[Sequence[_Key]]) -> list[_Key]:
    """One order of all lines: the later path's, what others have besides put behind what is before.

    Each line is told apart by the module that ran it, so that a layer's lines stay together.
    """
    first, later, one = orders
    merged = list(later)
    for order in (first, one):
        places: Mapping[_Key, int] = {key: place for place, key in enumerate(merged)}
        behind: dict[int, list[_Key]] = {}
        at = -1
        for key in order:
            if key in places:
                at = places[key]
            else:
                behind.setdefault(at, []).append(key)
        again = list(behind.get(-1, ()))
        for place, key in enumerate(merged):
            again += [key, *behind.get(place, ())]
        merged = again
    return merged
