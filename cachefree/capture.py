"""One path of a model as an FX graph of ATen operators, with symbolic sizes and source lines."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from cachefree.alike import AlikeCalls
from cachefree.calls import Call, SizeSpec, TensorSpec
from cachefree.errors import CacheFreeError, CaptureError
from cachefree.exact_slices import ExactSlices
from cachefree.explaining import explained
from cachefree.fake_runs import quiet
from cachefree.fakes import WeightsAsFakes, device_of
from cachefree.fixed import without_fixed
from cachefree.idle_draws import draws_randomly, refused_where_used
from cachefree.isolation import NOTHING, StateChange, Trace, untouched
from cachefree.jumps import Jumps
from cachefree.like_integers import sizes_like_integers
from cachefree.loop_questions import refuse_questions
from cachefree.loops import Loop, Loops
from cachefree.memos import MEMOS, outside_state
from cachefree.other_runs import CapturedCalls
from cachefree.provenance import provenance
from cachefree.reach import PLAIN, reached_by
from cachefree.sizes import (
    Question,
    SizeEnvironment,
    expression,
    size_symbol,
)
from cachefree.spelling import sizes_in_text
from cachefree.stand_ins import StandIns
from cachefree.structure import Structure, flatten, leaf_paths
from cachefree.symbolic_python import sizes_in_builtins, sizes_in_imported, sizes_in_int
from cachefree.value_questions import ANSWERS, Answering, ValueQuestion

__all__ = ["Captured", "capture"]


@dataclass
class Captured:
    """A captured path.

    Attributes:
        graph: The FX graph: placeholders are the call's tensors, then its sizes; outputs the
            tensors of the result.
        call: How the model was called.
        outputs: The structure of the result.
        output_leaves: One spec a leaf of the result.
        questions: What Python code asked about sizes.
        operator_questions: What torch operators asked about the sizes of their operands.
        attributes: ``get_attr`` target of the graph → the tensor itself.
        changes: What the call left in the model's attributes.
        sizes: The example size of each symbol.
        jumps: The ways that conditional jumps of the user's code went, where they were watched.
        stand_ins: Operators of the model that others stand for, equal over the reals.
        loops: Loops over tokens in the user's code.
        doubt: The refusal, where the rounds of a loop are not alike, unless one tells more.
        values: What Python code asked about the values of inputs.
    """

    graph: fx.Graph
    call: Call
    outputs: Structure
    output_leaves: tuple[TensorSpec | SizeSpec, ...]
    questions: tuple[Question, ...]
    operator_questions: tuple[Question, ...]
    attributes: dict[str, torch.Tensor]
    changes: tuple[StateChange, ...]
    sizes: dict[str, int] = field(default_factory=dict)
    jumps: Jumps = field(default_factory=dict)
    stand_ins: tuple[str, ...] = ()
    loops: tuple[Loop, ...] = ()
    doubt: CaptureError | None = None
    values: tuple[ValueQuestion, ...] = ()

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """The tensors of the result, in order."""
        return tuple(leaf for leaf in self.output_leaves if isinstance(leaf, TensorSpec))


def is_tensor_or_size(value: Any) -> bool:
    """Whether a value is a leaf of a captured result: a tensor, or a size that is no constant."""
    return isinstance(
        value, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
    ) and not isinstance(value, torch.nn.Parameter)


@dataclass
class _Traced:
    """One run of the tracer."""

    environment: SizeEnvironment
    weights: WeightsAsFakes
    module: fx.GraphModule
    result: dict[str, Any]
    trace: Trace
    stand_ins: StandIns
    text: str

    def is_same(self, other: _Traced, model: torch.nn.Module) -> bool:
        """Whether another run gave the same graph and left nothing more behind."""
        mine, others = (
            {(change.module, change.attribute) for change in _changes(model, trace)}
            for trace in (self.trace, other.trace)
        )
        if other.trace.outside or mine != others:
            return False
        return self.text == other.text and all(
            _is_same_attribute(self.module, other.module, str(node.target))
            for node in other.module.graph.nodes
            if node.op == "get_attr"
        )


def _has_tensors(changes: Sequence[StateChange]) -> bool:
    """Whether a call leaves anything on the model that is neither a number nor a text."""
    parts = [part for change in changes for part in (change.before, change.after)]
    sizes = (torch.SymInt, torch.SymFloat)
    return any(part is not NOTHING and not isinstance(part, (*PLAIN, *sizes)) for part in parts)


def _changes(model: torch.nn.Module, trace: Trace) -> list[StateChange]:
    """What a run has changed on the model, but for what no call reads."""
    return [
        change
        for change in trace.changes
        if not MEMOS.is_idle(model.get_submodule(change.module), change.attribute)
    ]


def _is_same_attribute(one: fx.GraphModule, other: fx.GraphModule, name: str) -> bool:
    first, second = getattr(one, name), getattr(other, name)
    if first is second:
        return True
    is_plain = all(type(part) is torch.Tensor and not part.is_meta for part in (first, second))
    return is_plain and first.dtype == second.dtype and torch.equal(first, second)


def _traced(
    model: torch.nn.Module,
    call: Call,
    hints: Mapping[str, int],
    asked: Mapping[str, int] | None,
) -> _Traced:
    """Runs the tracer, a second time where calls were copied that should not have been."""
    alike: list[AlikeCalls] = []
    try:
        traced = _traced_once(model, call, hints, asked, alike)
    except Exception:
        if not alike[0].copied:
            raise
    else:
        if not alike[0].is_spoiled:
            return traced
    return _traced_once(model, call, hints, asked, None)


def _traced_once(
    model: torch.nn.Module,
    call: Call,
    hints: Mapping[str, int],
    asked: Mapping[str, int] | None,
    alike: list[AlikeCalls] | None,
) -> _Traced:
    """Runs the tracer; what copies calls that are alike is put into `alike`, if that is a list."""
    environment = SizeEnvironment(hints, asked)
    environment.totals = _totals(call, asked or {})
    mode = FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True)
    result: dict[str, Any] = {}
    stand_ins = StandIns()
    weights = WeightsAsFakes(mode, device_of(model))
    copies: Any = contextlib.nullcontext()
    if alike is not None:
        copies = AlikeCalls(weights, environment)
        alike.append(copies)

    def run(*given: Any) -> tuple[torch.Tensor, ...]:
        tensors_given = given[: len(call.tensors)]
        tensors, sizes = iter(tensors_given), iter(given[len(call.tensors) :])
        leaves = [next(tensors if isinstance(leaf, TensorSpec) else sizes) for leaf in call.leaves]
        args, kwargs = call.structure.rebuild(leaves)
        exact = ExactSlices(environment, tensors_given)
        named = list(zip((spec.path for spec in call.tensors), tensors_given, strict=True))
        exact.given(named)
        loops = Loops(environment, model, exact.calls)
        result["loops"] = loops.found
        with (
            copies,
            provenance(model),
            loops.heard(),
            sizes_in_text(environment),
            stand_ins,
            Answering(named, ANSWERS.of_sizes),
            exact as slices,
        ):
            with refused_where_used(reached_by(model).codes):
                value = model(*args, **kwargs)
            leaves, result["structure"] = flatten(value, is_tensor_or_size)
            result["leaves"] = slices.replaced(leaves)
        slices.returned(result["leaves"])
        slices.refuse_values()
        if alike and slices.asks_history:
            alike[0].is_spoiled = True
        result["calls"] = slices.whole
        return tuple(leaf for leaf in result["leaves"] if isinstance(leaf, torch.Tensor))

    with (
        untouched(model) as trace,
        quiet(model),
        sizes_in_builtins(),
        sizes_in_int(model),
        sizes_in_imported(model),
        sizes_like_integers(model),
    ):
        try:
            with mode, weights:
                inputs: list[Any] = [_fake(environment, spec) for spec in call.tensors]
                # a size that is no whole size of a tensor has no other place in the trace
                inputs += [environment.size_of(leaf.expr) for leaf in call.sizes]
                module = make_fx(run, pre_dispatch=True, _allow_non_fake_inputs=True)(*inputs)
        except CacheFreeError:
            raise
        except Exception as error:
            raise explained(error, "The model could not be traced.") from error
    return _Traced(environment, weights, module, result, trace, stand_ins, str(module.graph))


def capture(
    model: torch.nn.Module,
    call: Call,
    hints: Mapping[str, int],
    asked: Mapping[str, int] | None = None,
    *,
    is_watched: bool = False,
) -> Captured:
    """Captures the path that a call takes through a model.

    No weight is read and no operator computes: sizes are symbols, tensors are fake. The model, its
    buffers and the random states are afterwards as they were.

    Args:
        model: Any module.
        call: How to call it. Sizes are expressions in the symbols that ``hints`` names.
        hints: The example size of each symbol; at least 2 each, so that nothing is frozen as 0 or
            1.
        asked: Sizes by which the questions of Python code are answered instead.
        is_watched: Whether to write down which way conditional jumps go.

    Raises:
        CaptureError: the call does not run, or depends on the values of tensors.
    """
    with ANSWERS.recorded() as values:
        captured = _captured(model, call, hints, asked, is_watched=is_watched)
    captured.values = tuple(values.values())
    return without_fixed(captured, call.fixed) if call.fixed else captured


def _captured(
    model: torch.nn.Module,
    call: Call,
    hints: Mapping[str, int],
    asked: Mapping[str, int] | None,
    *,
    is_watched: bool,
) -> Captured:
    """The path, with the inputs that are always the same still among its inputs."""
    traced = _traced(model, call, hints, asked)
    environment, module, result, trace = (
        traced.environment,
        traced.module,
        traced.result,
        traced.trace,
    )
    if trace.drew_random:
        raise draws_randomly()
    if trace.outside and (trace.additions is None or not MEMOS.is_open):
        raise outside_state(trace.outside)
    if MEMOS.is_open:
        uniform = ANSWERS.uniform

        def comes_out_again() -> bool:
            with ANSWERS.of(uniform):
                return traced.is_same(_traced(model, call, hints, asked), model)

        MEMOS.note(trace.additions or {}, trace.outside, comes_out_again)
    refuse_questions(result["loops"], environment)
    jumps: Jumps = {}
    doubt = CapturedCalls(
        model,
        call,
        environment,
        result["calls"],
        (result["leaves"], result["structure"]),
        result["loops"],
        hints,
        asked or {},
    ).compare(jumps if is_watched else None)
    attributes = {
        str(node.target): getattr(module, str(node.target))
        for node in module.graph.nodes
        if node.op == "get_attr"
    }
    for node in module.graph.nodes:
        if node.op == "get_attr":  # its views are views of its fake twin
            node.meta["val"] = traced.weights.twin(attributes[str(node.target)])
    changes = _changes(model, trace)
    if MEMOS.may_keep and not (MEMOS.numbers_only and _has_tensors(changes)):
        MEMOS.kept += changes
        changes = []
    leaves = tuple(
        _spec_of(*pair)
        for pair in zip(result["leaves"], leaf_paths(result["structure"]), strict=True)
    )
    return Captured(
        graph=module.graph,
        call=call,
        outputs=result["structure"],
        output_leaves=leaves,
        questions=tuple(environment.questions.values()),
        operator_questions=tuple(environment.operator_questions.values()),
        attributes=attributes,
        changes=tuple(changes),
        sizes=dict(hints),
        jumps=jumps,
        stand_ins=tuple(traced.stand_ins.used),
        loops=tuple(result["loops"]),
        doubt=doubt,
    )


def _totals(call: Call, asked: Mapping[str, int]) -> dict[Any, Any]:
    """Sizes of the arguments, other than masks, that hold all tokens; and how many are past."""
    found = {}
    for spec in call.tensors if asked else ():
        for size in spec.shape if "mask" not in spec.path else ():
            rest = [size - size_symbol(name) for name in asked if isinstance(size, sympy.Add)]
            if any(len(expr.free_symbols) and expr.is_nonnegative for expr in rest):
                found[size] = next(expr for expr in rest if expr.is_nonnegative)
    return found


def _fake(environment: SizeEnvironment, spec: TensorSpec) -> torch.Tensor:
    sizes = [environment.size_of(size) for size in spec.shape]
    return torch.empty(sizes, dtype=spec.dtype, device=spec.device)


def _spec_of(leaf: Any, path: str) -> TensorSpec | SizeSpec:
    if isinstance(leaf, torch.Tensor):
        return TensorSpec(
            path, tuple(expression(size) for size in leaf.shape), leaf.dtype, leaf.device
        )
    return SizeSpec(path, expression(leaf))
