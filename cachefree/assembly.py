"""The one graph's interface, and how the model's own call and result go through it."""

from __future__ import annotations

import dis
import inspect
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import nn

from cachefree.calling import CachePlace, Calling
from cachefree.calls import TensorSpec
from cachefree.certify import Certified
from cachefree.discover import Discovery
from cachefree.encoder import Encoder
from cachefree.encoder_call import EncoderCall, PrefixCall
from cachefree.first_only import argument_of
from cachefree.lifting.facade import Facade
from cachefree.reach import reached_by
from cachefree.reading import Program
from cachefree.recipes import Recipe
from cachefree.recurrent import is_recurrent
from cachefree.signatures import signature_of
from cachefree.sizes import TORCH, size_symbol, symbols_of
from cachefree.spec import (
    FIRST_CALL,
    CacheSlot,
    Condition,
    Domain,
    InputSpec,
    Interface,
    OutputSpec,
    Region,
)
from cachefree.structure import flatten
from cachefree.terms import Term, topological
from cachefree.write_once import OneCall

__all__ = ["Assembled", "assembled"]

aten = torch.ops.aten


@dataclass
class Assembled:
    """The one graph's interface and calls.

    Attributes:
        interface: Its inputs, outputs, cache slots and domain.
        inputs: One term an input.
        calling: How it is called.
        encoder: How a call of the whole model becomes one of the decoder; None where the model has
            no encoder inside.
    """

    interface: Interface
    inputs: tuple[Term, ...]
    calling: Calling
    encoder: EncoderCall | None = None


def assembled(
    model: nn.Module,
    discovery: Discovery,
    later: Program,
    one: OneCall,
    certified: Certified,
    spare: tuple[str, ...] = (),
    needed: tuple[str, ...] = (),
) -> Assembled:
    """The interface of the one graph, and how the model's own call goes through it.

    Args:
        model: Any module.
        discovery: How it is called.
        later: The later path.
        one: What the one graph is made from.
        certified: What was shown of it.
        spare: Arguments that later calls may leave out.
        needed: Flags that calls may not leave out.
    """
    make = _Maker(model, discovery, later, one, certified, spare, needed)
    return make.plain() if one.encoder is None else make.decoder(one.encoder)


class _Maker:
    def __init__(
        self,
        model: nn.Module,
        discovery: Discovery,
        later: Program,
        one: OneCall,
        certified: Certified,
        spare: tuple[str, ...],
        needed: tuple[str, ...],
    ) -> None:
        self.model = model
        self.spare = spare
        self.needed = needed
        self.discovery = discovery
        self.later = later
        self.one = one
        self.certified = certified
        self.signature = signature_of(model)
        self.arguments = self._arguments()

    def plain(self) -> Assembled:
        """The model's own call."""
        leaves, _ = flatten(self.arguments, _is_marker)
        specs = [leaf.spec for leaf in leaves if isinstance(leaf.spec, TensorSpec)]
        interface = _interface(self.discovery, self.later, specs, self.certified)
        interface = replace(interface, **self._sizes_of_first_calls(specs))
        calling = self._calling(self.arguments, self.signature, interface)
        return Assembled(interface, self._terms(specs), calling)

    def decoder(self, encoder: Encoder) -> Assembled:
        """A call of the decoder, which takes the encoder's states in place of its inputs."""
        whole = self.plain()
        own = {str(term.args[0]) for term in encoder.only}
        dropped = [name for name, value in self.arguments.items() if _is_all_of(value, own)]
        path, shape, _ = encoder.states.args
        assert encoder.states.dtype is not None
        assert encoder.states.device is not None
        marker = _Marker(TensorSpec(path, shape, encoder.states.dtype, encoder.states.device))
        arguments: dict[str, Any] = {}
        for name, value in self.arguments.items():
            if name in dropped:
                arguments.setdefault(path, marker)
            else:
                arguments[name] = value
        arguments.setdefault(path, marker)
        leaves, _ = flatten(arguments, _is_marker)
        specs = [leaf.spec for leaf in leaves if isinstance(leaf.spec, TensorSpec)]
        interface = _interface(self.discovery, self.later, specs, self.certified)
        if self.one.present:
            domain = _domain_of_states(interface, self.one.present)
            interface = replace(interface, domain=domain)
        signature = _with_states(self.signature, dropped, path)
        calling = self._calling(arguments, signature, interface)
        places = {spec.path: place for place, spec in enumerate(whole.interface.inputs)}
        kind = PrefixCall if self.one.absent else EncoderCall
        call = kind(
            whole.calling,
            tuple(places[str(term.args[0])] for term in encoder.inputs),
            tuple(None if spec.path == path else places[spec.path] for spec in specs),
            next(spec for spec in interface.inputs if spec.path == path),
            encoder.is_needed_whole,
            tuple(dropped),
        )
        return Assembled(interface, self._terms(specs), calling, call)

    def _terms(self, specs: Sequence[TensorSpec]) -> tuple[Term, ...]:
        terms = {str(term.args[0]): term for term in self.one.inputs}
        if self.one.encoder is not None:
            terms[str(self.one.encoder.states.args[0])] = self.one.encoder.states
        return tuple(terms[spec.path] for spec in specs)

    def _arguments(self) -> dict[str, Any]:
        """The arguments of a later call by name, with markers for their leaves."""
        call = self.one.call
        markers = [_Marker(spec) for spec in call.leaves]
        args, kwargs = call.structure.rebuild(markers)
        named: dict[str, Any] = {}
        for name, value in self.signature.bind_partial(*args, **kwargs).arguments.items():
            kind = self.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                named[f"*{name}"] = value
            elif kind is inspect.Parameter.VAR_KEYWORD:
                named.update(value)
            else:
                named[name] = value
        return {name: named[name] for name in _in_order_of(named, markers)}

    def _sizes_of_first_calls(self, specs: Sequence[TensorSpec]) -> dict[str, Any]:
        own = [argument_of(spec.path) in self.discovery.first_only for spec in specs]
        within, beside = (
            symbols_of(
                size
                for spec, is_own in zip(specs, own, strict=True)
                if is_own is side
                for size in spec.shape
            )
            for side in (True, False)
        )
        return {
            "absent": {
                **dict.fromkeys(map(str, within - beside), 0),
                **{str(symbol): size for symbol, size in self.one.absent.items()},
            },
            "present": {str(symbol): size for symbol, size in self.one.present.items()},
        }

    def _first_only(self) -> tuple[str, ...]:
        encoder = self.one.encoder if self.one.absent else None
        states = () if encoder is None else (str(encoder.states.args[0]),)
        return (*self.discovery.first_only, *states)

    def _calling(
        self, arguments: dict[str, Any], signature: inspect.Signature, interface: Interface
    ) -> Calling:
        leaves, structure = flatten(arguments, _is_marker)
        first_only = tuple(name for name in self._first_only() if name in arguments)
        caches = []
        for link in self.discovery.links:
            place = link.place
            parameter = f"*{place.parameter}" if place.is_variadic else place.parameter
            value = arguments[parameter]
            for step in place.steps:
                value = value[step]
            parts, inner = flatten(value, _is_marker)
            caches.append(
                CachePlace(parameter, place.steps, inner, tuple(part.spec for part in parts))
            )
        spare = tuple(name for name in self.spare if name in arguments and name not in first_only)
        return Calling(
            parameters=tuple(arguments),
            signature=signature,
            structure=structure,
            leaves=tuple(leaf.spec for leaf in leaves),
            caches=tuple(caches),
            results=self.later.captured.outputs,
            result_leaves=self.later.captured.output_leaves,
            interface=interface,
            mode_matters=_mode_matters(self.model, self.certified.outputs),
            was_training=self.model.training,
            neutrals={path: Recipe.of(term) for path, term in self.certified.neutrals.items()},
            methods=self.model.methods if isinstance(self.model, Facade) else (),
            first_only=first_only,
            absent={str(symbol): size for symbol, size in self.one.absent.items()},
            present={str(symbol): size for symbol, size in self.one.present.items()},
            spare=spare,
            usual={
                str(symbol): self.discovery.hints[str(symbol)]
                for leaf in leaves
                if argument_of(leaf.spec.path) in spare
                for symbol in symbols_of(getattr(leaf.spec, "shape", ()))
                if str(symbol) in self.discovery.hints
            },
            needed=self.needed,
        )


def _domain_of_states(interface: Interface, present: Mapping[sympy.Symbol, Any]) -> Domain:
    """The domain of a graph that is given states, whatever they were computed of."""
    known = {size_symbol(name) for name in interface.symbols}
    regions = []
    for region in interface.domain.regions:
        told = tuple(c for c in region.conditions if symbols_of([c.fact]) <= known)
        if region.name == FIRST_CALL:
            told += tuple(Condition(sympy.Ge(symbol, 1)) for symbol in present)
        regions.append(Region(region.name, told))
    return Domain(tuple(regions), interface.domain.fixed)


def _is_all_of(value: Any, paths: set[str]) -> bool:
    leaves, _ = flatten(value, _is_marker)
    marked = [leaf.spec.path for leaf in leaves if _is_marker(leaf)]
    return bool(marked) and all(path in paths for path in marked)


def _with_states(
    signature: inspect.Signature, dropped: Sequence[str], name: str
) -> inspect.Signature:
    """A signature without some arguments and with one more, by keyword."""
    kept = [p for p in signature.parameters.values() if p.name not in (*dropped, name)]
    states = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)
    end = kept and kept[-1].kind is inspect.Parameter.VAR_KEYWORD
    return signature.replace(parameters=[*kept[:-1], states, kept[-1]] if end else [*kept, states])


def _interface(
    discovery: Discovery, later: Program, specs: Sequence[TensorSpec], certified: Certified
) -> Interface:
    """The flat interface of a graph: its inputs, outputs, cache slots and domain."""
    captured = later.captured
    paths = [captured.call.tensors[place].path for place in discovery.cache_leaves]
    where = {spec.path: place for place, spec in enumerate(specs)}
    fed = {output: where[path] for path, output in zip(paths, discovery.carried, strict=True)}
    caches = set(fed.values())
    names = _Unique()
    inputs = tuple(
        InputSpec(names.of(spec.path), spec.path, spec.shape, spec.dtype, place in caches)
        for place, spec in enumerate(specs)
    )
    outputs = []
    tensors = [leaf for leaf in captured.output_leaves if isinstance(leaf, TensorSpec)]
    for place, (spec, term) in enumerate(zip(tensors, certified.outputs, strict=True)):
        name = f"present_{inputs[fed[place]].name}" if place in fed else (spec.path or "output")
        outputs.append(OutputSpec(names.of(name), spec.path, term.sizes, spec.dtype, place in fed))
    slots = []
    for output, place in fed.items():
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
        if not growing or inputs[place].path in certified.neutrals:
            words = certified.neutral_words(inputs[place].path)
        slots.append(CacheSlot(inputs[place], outputs[output], growing, words))
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
    """Why another mode would compute something else than the captured one."""
    for term in topological(outputs):
        if (
            term.op
            in (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
            and term.args[1] != 0.0
        ):
            return "the model has dropout"
        if is_recurrent(term.op) and any(
            isinstance(arg, float) and arg != 0.0 for arg in term.args
        ):
            return "the model has dropout"
        if term.op is aten.batch_norm.default:
            return "the model has batch normalization"
    for code in reached_by(model).codes:
        if _reads_mode(code):
            return f"{code.co_qualname.rpartition('<locals>.')[2]} reads self.training"
    return ""


def _reads_mode(code: types.CodeType) -> bool:
    if code.co_filename.startswith(TORCH):
        return False  # what torch's layers do otherwise is told by their operators
    if "training" not in code.co_names:
        return "training" in code.co_consts
    return any(
        step.argval == "training" and step.opname.startswith("LOAD")
        for step in dis.get_instructions(code)
    )
