"""The whole way, from a model to one proved graph, on one page."""

from __future__ import annotations

import inspect
import logging
import re
import time
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import nn

from cachefree.branches import removed_branches
from cachefree.calling import CachePlace, Calling
from cachefree.capture import TensorSpec, capture
from cachefree.certify import Certified, certify
from cachefree.discover import Carry, Discovery, discover
from cachefree.errors import CaptureError, Refusal, UnsupportedBranchError
from cachefree.graph import emit
from cachefree.origin import Origin
from cachefree.progress import stages
from cachefree.reading import Program, read
from cachefree.report import Report
from cachefree.rewritten import Rewritten
from cachefree.spec import CacheSlot, InputSpec, Interface, OutputSpec
from cachefree.structure import flatten
from cachefree.terms import Table, Term, topological

__all__ = ["rewrite"]

log = logging.getLogger(__name__)
aten = torch.ops.aten
_CHECKS = ("prove", "test", "off")


def rewrite(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    cache: str | Sequence[str] | None = None,
    carry: Carry | None = None,
    check: str = "prove",
    progress: bool | None = None,
) -> Rewritten:
    """Gives back one graph that is both of a model's paths: the first call's, and the later calls'
    with a cache.

    The cache is always a tensor: zero length on the first call, joined unconditionally. No weight
    is read or copied, and the model is not modified.

    Args:
        model: Any ``nn.Module`` whose forward takes a cache that may be absent.
        example_inputs: Inputs of a first call: a tuple (positional) or a dict (by keyword). Every
            axis that may vary is found by itself.
            None: taken from ``model.dummy_inputs`` or ``model.example_input_array``, or probed.
        cache: Name or names of the arguments that carry the cache; None: found by itself.
        carry: ``(outputs, inputs) → later inputs``: how a call's outputs feed the next; None: found
            by itself.
        check: ``"prove"`` refuses what cannot be proved; ``"test"`` accepts what random tests
            accept; ``"off"`` checks nothing.
        progress: Whether to show a progress bar; None: on a terminal or in a notebook.

    Returns:
        The module, with its ``graph_module`` and its ``report``.

    Raises:
        CacheNotFoundError: no argument carries a cache, or several could.
        CaptureError: the model does not run, or its code depends on the values of tensors.
        UnsupportedBranchError: the two paths differ in a way that no rule closes.
    """
    started = time.perf_counter()
    if not isinstance(model, nn.Module):
        raise CaptureError(
            Refusal(
                f"rewrite takes an nn.Module, not {type(model).__name__}.",
                remedy="Pass the model itself.",
            )
        )
    if check not in _CHECKS:
        raise CaptureError(Refusal(f"check={check!r} is none of {', '.join(map(repr, _CHECKS))}."))
    _refuse_unusual_parameters(model)
    with stages(4, progress) as begin:
        begin("first path")
        discovery = discover(model, example_inputs, cache=cache, carry=carry)
        begin("later path")
        table = Table()
        names = _names(model)
        first = read(discovery.first_path, table, names)
        later = read(
            capture(model, discovery.later, discovery.hints, discovery.asked), table, names
        )
        _refuse_writes(first, later)
        _refuse_frozen_sizes(first, later)
        _refuse_other_results(discovery, first, later)
        _refuse_independence(discovery, later)
        begin("proof")
        certified = certify(model, table, names, discovery, first, later, check)
        begin("graph")
        interface = _interface(discovery, later, certified)
        graph_module = emit(
            model,
            [(spec.name, term) for spec, term in zip(interface.inputs, later.inputs, strict=True)],
            [
                (spec.name, term)
                for spec, term in zip(interface.outputs, certified.outputs, strict=True)
            ],
        )
    calling = _calling(model, discovery, later, certified, interface)
    report = Report(
        model=type(model).__name__,
        branches=removed_branches(
            model,
            (discovery.first, discovery.later),
            discovery.hints | discovery.asked,
            certified.closings,
            interface.cache[0].neutral,
        ),
        verdict=certified.verdict,
        domain=certified.domain,
        laws=tuple(law.name for law in certified.laws),
        slots=tuple(
            f"{slot.past.path}: ({', '.join(map(str, slot.past.shape))}), {slot.neutral}"
            for slot in interface.cache
        ),
        notes=discovery.notes,
        questions=tuple(map(str, (*first.captured.questions, *later.captured.questions))),
        seconds=time.perf_counter() - started,
    )

    def again() -> Rewritten:
        return rewrite(
            model, example_inputs, cache=cache, carry=carry, check=check, progress=progress
        )

    return Rewritten(graph_module, interface, calling, report, Origin(model, again))


def _names(model: nn.Module) -> dict[int, str]:
    names: dict[int, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        names.setdefault(id(tensor), name)
    return names


def _refuse_unusual_parameters(model: nn.Module) -> None:
    refusals = []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.layout is not torch.strided:
            refusals.append(
                Refusal(
                    f"The parameter {name!r} is sparse ({tensor.layout}).",
                    why="Sparse tensors cannot be traced with symbolic sizes.",
                    remedy="Make it dense.",
                )
            )
        elif tensor.is_quantized:
            refusals.append(
                Refusal(
                    f"The parameter {name!r} is quantized ({tensor.dtype}).",
                    why="Quantized tensors cannot be traced with symbolic sizes.",
                    remedy="Rewrite first, quantize the exported graph.",
                )
            )
    for name, module in model.named_modules():
        if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized")):
            refusals.append(
                Refusal(
                    f"The module {name!r} is quantized ({type(module).__name__}).",
                    why="Quantized operators cannot be traced with symbolic sizes.",
                    remedy="Rewrite first, quantize the exported graph.",
                )
            )
    if refusals:
        raise CaptureError(*refusals)


def _refuse_writes(first: Program, later: Program) -> None:
    refusals = []
    for program in (first, later):
        for change in program.captured.changes:
            refusals.append(
                Refusal(
                    f"The model keeps state on itself: forward sets {change.path!r}.",
                    why="What a call leaves on the module changes the next call, and a graph has no memory.",
                    remedy="Pass it in and return it, as an argument of forward.",
                )
            )
        for term in program.written:
            refusals.append(
                Refusal(
                    f"The model writes in place to {term.args[0]!r}.",
                    why="A graph neither changes its inputs nor its buffers.",
                    remedy="Return the new value instead.",
                )
            )
    if refusals:
        raise CaptureError(*dict.fromkeys(refusals))


def _refuse_frozen_sizes(*programs: Program) -> None:
    refusals = [
        Refusal(
            f"A size is turned into a Python number: {question.fact.lhs} is frozen as {question.fact.rhs}.",
            why="The graph would be right at this one size only.",
            remedy="Compute with the size itself; loop over tensors, not over range(size).",
            where=question.where,
        )
        for program in programs
        for question in program.captured.questions
        if question.froze
    ]
    if refusals:
        raise CaptureError(*dict.fromkeys(refusals))


def _refuse_other_results(discovery: Discovery, first: Program, later: Program) -> None:
    problem = first.captured.outputs.difference(later.captured.outputs, "the result")
    if problem is None:
        ranks = [
            (a.path, a, b)
            for a, b in zip(first.captured.output_leaves, later.captured.output_leaves, strict=True)
            if type(a) is not type(b)
            or (
                isinstance(a, TensorSpec)
                and isinstance(b, TensorSpec)
                and (len(a.shape) != len(b.shape) or a.dtype != b.dtype)
            )
        ]
        if ranks:
            problem = f"the result{ranks[0][0]} has another rank or dtype on later calls"
    if problem is not None:
        raise UnsupportedBranchError(
            Refusal(
                f"The first call and later calls return different structures: {problem}.",
                why="One graph has one list of outputs.",
                remedy="Return the same structure from both paths.",
            )
        )


def _refuse_independence(discovery: Discovery, later: Program) -> None:
    used = set(topological(later.outputs))
    idle = [
        later.inputs[place] for place in discovery.cache_leaves if later.inputs[place] not in used
    ]
    if len(idle) == len(discovery.cache_leaves):
        raise UnsupportedBranchError(
            Refusal(
                f"The later path does not depend on the cache ({', '.join(str(term.args[0]) for term in idle[:3])}).",
                why="No output of a later call uses it.",
                remedy="Name the argument that carries the cache with cache=.",
            )
        )


def _interface(discovery: Discovery, later: Program, certified: Certified) -> Interface:
    captured = later.captured
    caches = set(discovery.cache_leaves)
    fed = {
        output: place
        for place, output in zip(discovery.cache_leaves, discovery.carried, strict=True)
    }
    names = _Unique()
    inputs = tuple(
        InputSpec(names.of(spec.path), spec.path, spec.shape, spec.dtype, place in caches)
        for place, spec in enumerate(captured.call.tensors)
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


def _calling(
    model: nn.Module,
    discovery: Discovery,
    later: Program,
    certified: Certified,
    interface: Interface,
) -> Calling:
    signature = inspect.signature(model.forward)
    call = discovery.later
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
    """The arguments in the order of their leaves among the graph's inputs; those without leaves
    last."""
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
