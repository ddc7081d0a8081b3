"""The one graph's interface, and how the model's own call and result go through it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import nn

from cachefree.calling import CachePlace, Calling
from cachefree.capture import TensorSpec
from cachefree.certify import Certified
from cachefree.discover import Discovery
from cachefree.reading import Program
from cachefree.spec import CacheSlot, InputSpec, Interface, OutputSpec
from cachefree.structure import flatten
from cachefree.terms import Term, topological
from cachefree.write_once import OneCall

__all__ = ["calling_of", "interface_of"]

aten = torch.ops.aten


def interface_of(
    discovery: Discovery, later: Program, one: OneCall, certified: Certified
) -> Interface:
    """The flat interface of the one graph: its inputs, outputs, cache slots and domain."""
    captured = later.captured
    caches = set(discovery.cache_leaves)
    fed = {
        output: place
        for place, output in zip(discovery.cache_leaves, discovery.carried, strict=True)
    }
    names = _Unique()
    inputs = tuple(
        InputSpec(names.of(spec.path), spec.path, spec.shape, spec.dtype, place in caches)
        for place, spec in enumerate(one.call.tensors)
    )
    outputs = []
    tensors = [leaf for leaf in captured.output_leaves if isinstance(leaf, TensorSpec)]
    for place, spec in enumerate(tensors):
        name = f"present_{inputs[fed[place]].name}" if place in fed else (spec.path or "output")
        outputs.append(OutputSpec(names.of(name), spec.path, spec.shape, spec.dtype, place in fed))
    slots = []
    for place, output in zip(discovery.cache_leaves, discovery.carried, strict=True):
        growing = tuple(
            axis
            for axis, size in enumerate(inputs[place].shape)
            if isinstance(size, sympy.Basic)
            and any(str(symbol).startswith("past") for symbol in size.free_symbols)
        )
        words = (
            f"zero length on axis {growing[0]}"
            if len(growing) == 1
            else f"zero length on axes {growing}"
        )
        slots.append(
            CacheSlot(
                inputs[place],
                outputs[output],
                growing,
                words if growing else certified.neutral_words(place),
            )
        )
    return Interface(inputs, tuple(outputs), tuple(slots), certified.domain)


class _Unique:
    """Valid, unique names."""

    def __init__(self) -> None:
        self.used: set[str] = set()

    def of(self, text: str) -> str:
        name = re.sub(r"\W+", "_", text).strip("_") or "tensor"
        name = f"_{name}" if name[0].isdigit() else name
        unique, count = name, 1
        while unique in self.used:
            count += 1
            unique = f"{name}_{count}"
        self.used.add(unique)
        return unique


def calling_of(
    model: nn.Module,
    discovery: Discovery,
    later: Program,
    one: OneCall,
    certified: Certified,
    interface: Interface,
) -> Calling:
    """How the model's own call goes to that interface and back."""
    signature = inspect.signature(model.forward)
    call = one.call
    markers = [_Marker(spec) for spec in call.leaves]
    args, kwargs = call.structure.rebuild(markers)
    named: dict[str, Any] = {}
    for name, value in signature.bind_partial(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named[f"*{name}"] = value
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        else:
            named[name] = value
    ordered = {name: named[name] for name in _in_order_of(named, markers)}
    leaves, structure = flatten(ordered, _is_marker)
    caches = []
    for link in discovery.links:
        parameter = f"*{link.place.parameter}" if link.place.is_variadic else link.place.parameter
        value = ordered[parameter]
        for step in link.place.steps:
            value = value[step]
        parts, inner = flatten(value, _is_marker)
        caches.append(
            CachePlace(parameter, link.place.steps, inner, tuple(part.spec for part in parts))
        )
    return Calling(
        parameters=tuple(ordered),
        signature=signature,
        structure=structure,
        leaves=tuple(leaf.spec for leaf in leaves),
        caches=tuple(caches),
        results=later.captured.outputs,
        result_leaves=later.captured.output_leaves,
        interface=interface,
        mode_matters=_mode_matters(model, certified.outputs),
    )


class _Marker:
    def __init__(self, spec: Any) -> None:
        self.spec = spec


def _is_marker(value: Any) -> bool:
    return isinstance(value, _Marker)


def _in_order_of(named: dict[str, Any], markers: list[_Marker]) -> list[str]:
    """The arguments in the order of their leaves among the inputs; those without leaves last."""
    place = {id(marker): index for index, marker in enumerate(markers)}

    def first(name: str) -> int:
        leaves, _ = flatten(named[name], _is_marker)
        return min((place[id(leaf)] for leaf in leaves), default=len(markers))

    return sorted(named, key=first)


def _mode_matters(model: nn.Module, outputs: Sequence[Term]) -> str:
    """Why training mode would compute something else than the captured evaluation mode."""
    for term in topological(outputs):
        if (
            term.op
            in (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
            and term.args[1] != 0.0
        ):
            return "the model has dropout"
        if term.op is aten.batch_norm.default:
            return "the model has batch normalization"
    for module in model.modules():
        if type(module).__module__.startswith("torch.nn"):
            continue
        code = getattr(type(module).forward, "__code__", None)
        if code is not None and "training" in code.co_names:
            return f"{type(module).__name__}.forward reads self.training"
    return ""
