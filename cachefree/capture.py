"""One path of a model as an FX graph of ATen operators, with symbolic sizes and source lines."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from cachefree.errors import CacheFreeError, CaptureError, Refusal
from cachefree.exact_slices import ExactSlices
from cachefree.explaining import explained, silenced
from cachefree.faithful import CallLog, TorchCall, refuse_another_path
from cachefree.fakes import OnOneDevice, WeightsAsFakes, device_of, fakes_by_type
from cachefree.fixed import without_fixed
from cachefree.isolation import StateChange, Trace, untouched
from cachefree.jumps import Jumps, watched_jumps
from cachefree.like_integers import sizes_like_integers
from cachefree.loop_questions import places_of, refuse_questions, repeated
from cachefree.loops import Loop, Loops
from cachefree.memos import MEMOS, outside_state
from cachefree.other_sizes import many_rounds, other_sizes
from cachefree.provenance import provenance
from cachefree.sameness import asks_for_sameness, refuse_sameness
from cachefree.sizes import (
    Question,
    SizeEnvironment,
    compiled,
    expression,
    size_symbol,
)
from cachefree.spelling import sizes_in_text
from cachefree.stand_ins import StandIns
from cachefree.structure import Structure, flatten, leaf_paths
from cachefree.symbolic_python import sizes_in_builtins, sizes_in_imported, sizes_in_int

__all__ = [
    "Call",
    "Captured",
    "SizeSpec",
    "TensorSpec",
    "capture",
    "run_on_fakes",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a call: its path, its sizes as ints or expressions, its dtype and device."""

    path: str
    shape: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class SizeSpec:
    """A Python integer in a call that is no constant but an expression of sizes."""

    path: str
    expr: Any


@dataclass(frozen=True)
class Call:
    """How a model is called: ``(args, kwargs)`` taken apart.

    Attributes:
        structure: The structure of ``(args, kwargs)``.
        leaves: One spec a leaf of the structure.
        fixed: Paths of tensors in the result that are constants of the code, from call to call.
    """

    structure: Structure
    leaves: tuple[TensorSpec | SizeSpec, ...]
    fixed: frozenset[str] = frozenset()

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """The tensors among the leaves, in order."""
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, TensorSpec))

    @property
    def sizes(self) -> tuple[SizeSpec, ...]:
        """The Python numbers among the leaves, in order."""
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, SizeSpec))


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

    def is_same(self, other: _Traced) -> bool:
        """Whether another run gave the same graph and left nothing more behind."""
        if other.trace.outside or len(self.trace.changes) != len(other.trace.changes):
            return False
        return self.text == other.text and all(
            _is_same_attribute(self.module, other.module, str(node.target))
            for node in other.module.graph.nodes
            if node.op == "get_attr"
        )


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
    """Runs the tracer once."""
    environment = SizeEnvironment(hints, asked)
    environment.totals = _totals(call, asked or {})
    mode = FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True)
    result: dict[str, Any] = {}
    stand_ins = StandIns()
    weights = WeightsAsFakes(mode, device_of(model))

    def run(*given: Any) -> tuple[torch.Tensor, ...]:
        tensors_given = given[: len(call.tensors)]
        tensors, sizes = iter(tensors_given), iter(given[len(call.tensors) :])
        leaves = [next(tensors if isinstance(leaf, TensorSpec) else sizes) for leaf in call.leaves]
        args, kwargs = call.structure.rebuild(leaves)
        exact = ExactSlices(environment, tensors_given)
        loops = Loops(environment, model, exact.calls)
        result["loops"] = loops.found
        with (
            provenance(model),
            loops.heard(),
            sizes_in_text(environment),
            stand_ins,
            exact as slices,
        ):
            value = model(*args, **kwargs)
        result["calls"] = slices.calls
        result["leaves"], result["structure"] = flatten(value, is_tensor_or_size)
        return tuple(leaf for leaf in result["leaves"] if isinstance(leaf, torch.Tensor))

    with (
        untouched(model) as trace,
        _quiet(model),
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
    traced = _traced(model, call, hints, asked)
    environment, module, result, trace = (
        traced.environment,
        traced.module,
        traced.result,
        traced.trace,
    )
    if trace.drew_random:
        raise CaptureError(
            Refusal(
                "The model draws random numbers outside of torch.",
                why="Two calls of the model differ, so that no graph can equal them.",
                remedy="Call model.eval(), or pass the numbers as an argument.",
            )
        )
    if trace.outside and (trace.additions is None or not MEMOS.is_open):
        raise outside_state(trace.outside)
    if MEMOS.is_open:
        MEMOS.note(
            trace.additions or {},
            trace.outside,
            lambda: traced.is_same(_traced(model, call, hints, asked)),
        )
    refuse_questions(result["loops"], environment)
    plain = CallLog()
    jumps: Jumps = {}
    watched = watched_jumps(jumps) if is_watched else contextlib.nullcontext()
    try:
        with watched:
            run_on_fakes(model, call, {**hints, **(asked or {})}, plain)
    except Exception as error:
        raise explained(error, "The model does not run with plain sizes.") from error
    values = {size_symbol(name): sympy.Integer(size) for name, size in hints.items()}
    loops, calls = result["loops"], result["calls"]
    refuse_another_path(
        repeated(calls, loops, {**hints, **(asked or {})}),
        plain.calls,
        {**values, **places_of(loops)},
        with_sizes=not asked,
    )
    _refuse_other_rounds(model, call, calls, loops, {**hints, **(asked or {})})
    if asks_for_sameness(model):
        with refuse_sameness():
            run_on_fakes(model, call, {**hints, **(asked or {})})
    _refuse_another_path_elsewhere(
        model, call, environment, calls, loops, {**hints, **(asked or {})}
    )
    if not asked:
        _refuse_another_path_at_one(model, call, environment, calls, loops)
    if plain.asks_layout:
        _refuse_another_path_by_layout(model, call, {**hints, **(asked or {})}, plain.calls)
    attributes = {
        str(node.target): getattr(module, str(node.target))
        for node in module.graph.nodes
        if node.op == "get_attr"
    }
    for node in module.graph.nodes:
        if node.op == "get_attr":  # its views are views of its fake twin
            node.meta["val"] = traced.weights.twin(attributes[str(node.target)])
    leaves = tuple(
        _spec_of(*pair)
        for pair in zip(result["leaves"], leaf_paths(result["structure"]), strict=True)
    )
    captured = Captured(
        graph=module.graph,
        call=call,
        outputs=result["structure"],
        output_leaves=leaves,
        questions=tuple(environment.questions.values()),
        operator_questions=tuple(environment.operator_questions.values()),
        attributes=attributes,
        changes=tuple(
            change
            for change in trace.changes
            if not MEMOS.is_idle(model.get_submodule(change.module), change.attribute)
        ),
        sizes=dict(hints),
        jumps=jumps,
        stand_ins=tuple(traced.stand_ins.used),
        loops=tuple(result["loops"]),
    )
    return without_fixed(captured, call.fixed) if call.fixed else captured


def _refuse_another_path_elsewhere(
    model: torch.nn.Module,
    call: Call,
    environment: SizeEnvironment,
    calls: list[TorchCall],
    loops: Sequence[Loop],
    sizes: Mapping[str, int],
) -> None:
    """Compares a captured path with runs at other sizes of its region, where that may matter."""
    for point in other_sizes(model, environment, sizes):
        beyond = CallLog()
        try:
            run_on_fakes(model, call, point, beyond)
        except Exception as error:  # noqa: BLE001 - the model itself does not run there
            log.debug("the model does not run at %s: %s", point, error)
            continue
        values = {size_symbol(name): sympy.Integer(size) for name, size in point.items()}
        refuse_another_path(
            repeated(calls, loops, point),
            beyond.calls,
            values,
            with_sizes=not loops,
            with_numbers=True,
        )


def _refuse_another_path_at_one(
    model: torch.nn.Module,
    call: Call,
    environment: SizeEnvironment,
    calls: list[TorchCall],
    loops: Sequence[Loop],
) -> None:
    """Compares a captured path with a run where every size is 1, if it should be the same there.

    Code can tell 1 from other numbers without asking a question: ``n is ONE``.
    """
    ones = dict.fromkeys(environment.sizes, 1)
    if not all(compiled(question.fact)(ones) for question in environment.questions.values()):
        return
    single = CallLog()
    try:
        run_on_fakes(model, call, ones, single)
    except Exception as error:  # noqa: BLE001 - an operator that does not run there is told later
        log.debug("the model does not run where every size is 1: %s", error)
        return
    values = {size_symbol(name): sympy.Integer(1) for name in ones}
    refuse_another_path(
        repeated(calls, loops, ones), single.calls, values, with_sizes=False, with_numbers=True
    )


def _refuse_other_rounds(
    model: torch.nn.Module,
    call: Call,
    calls: list[TorchCall],
    loops: Sequence[Loop],
    sizes: Mapping[str, int],
) -> None:
    """Compares the rounds of loops over tokens with those of a run with many more."""
    symbols = {str(s) for loop in loops for s in sympy.sympify(loop.count).free_symbols}
    for name in sorted(symbols):
        most = many_rounds(model)
        found = _run_with_more(model, call, sizes, name, (most, sizes[name] + 2, sizes[name] + 1))
        if found is None:
            raise _no_other_rounds(loops)
        point, many = found
        try:
            refuse_another_path(
                repeated(calls, loops, point), many, {}, with_sizes=False, with_numbers=True
            )
        except CaptureError as error:
            raise CaptureError(
                Refusal(
                    "A loop over the tokens does something else for a later token.",
                    why=f"With {point[name]} of them it calls other functions of torch than with "
                    "few.",
                    remedy="Let every token go through the same code.",
                    where=error.refusals[0].where,
                )
            ) from error


def _run_with_more(
    model: torch.nn.Module,
    call: Call,
    sizes: Mapping[str, int],
    name: str,
    numbers: Sequence[int],
) -> tuple[dict[str, int], list[TorchCall]] | None:
    """The calls of a run with more tokens: as many as the model runs with."""
    for number in numbers:
        point, many = {**sizes, name: number}, CallLog()
        try:
            run_on_fakes(model, call, point, many)
        except Exception as error:  # noqa: BLE001 - the model may have room for fewer
            log.debug("the model does not run at %s: %s", point, error)
            continue
        return point, many.calls
    return None


def _no_other_rounds(loops: Sequence[Loop]) -> CaptureError:
    return CaptureError(
        Refusal(
            f"A loop over the tokens runs for {loops[0].rounds} of them only.",
            why="With one or two more the model raises an error, so that nothing tells what its "
            "other rounds do.",
            remedy="Loop over any number of tokens.",
            where=loops[0].where,
        )
    )


def _refuse_another_path_by_layout(
    model: torch.nn.Module, call: Call, sizes: Mapping[str, int], calls: list[TorchCall]
) -> None:
    """Compares two runs where code asks how tensors lie in memory: its inputs may lie otherwise."""
    scattered = CallLog()
    try:
        run_on_fakes(model, call, sizes, scattered, is_scattered=True)
    except Exception as error:  # noqa: BLE001 - the model itself refuses such inputs
        log.debug("the model takes contiguous inputs only: %s", error)
        return
    refuse_another_path(calls, scattered.calls, {}, with_sizes=False, with_numbers=True)


def run_on_fakes(
    model: torch.nn.Module,
    call: Call,
    sizes: Mapping[str, int],
    log_calls: CallLog | None = None,
    *,
    is_scattered: bool = False,
    seen: Callable[[list[Any], Any, Any, Any], None] | None = None,
) -> tuple[list[Any], Structure]:
    """Runs a call once on fake tensors of fixed sizes, tracing nothing.

    Args:
        model: Any module.
        call: How to call it.
        sizes: The size of each symbol.
        log_calls: Where to write the calls of torch functions down.
        is_scattered: Whether the inputs are parts of larger tensors, not contiguous.
        seen: Looks at the inputs' leaves, the arguments and the result after the call.

    Returns:
        The leaves of the result (fake tensors and Python values) and its structure.

    Raises:
        Exception: whatever the model raises.
    """
    values = {size_symbol(name): size for name, size in sizes.items()}

    def fixed(expr: Any) -> int:
        return int(expr.subs(values)) if hasattr(expr, "subs") else int(expr)

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    device = device_of(model)
    with untouched(model), _quiet(model), mode, WeightsAsFakes(mode, device), torch.no_grad():
        empty = _scattered if is_scattered else torch.empty
        leaves = [
            empty([fixed(size) for size in leaf.shape], dtype=leaf.dtype, device=leaf.device)
            if isinstance(leaf, TensorSpec)
            else fixed(leaf.expr)
            for leaf in call.leaves
        ]
        args, kwargs = call.structure.rebuild(leaves)
        with StandIns(), log_calls or contextlib.nullcontext():
            value = model(*args, **kwargs)
        if seen is not None:
            seen(leaves, args, kwargs, value)
        return flatten(value)


def _scattered(sizes: list[int], **options: Any) -> torch.Tensor:
    """An empty tensor that begins within another one and lies there in reversed order."""
    whole = torch.empty([size + 1 for size in reversed(sizes)], **options)
    whole = whole.permute(*reversed(range(len(sizes))))
    return whole[tuple(slice(1, None) for _ in sizes)]


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


@contextlib.contextmanager
def _quiet(model: torch.nn.Module) -> Iterator[None]:
    """Eager, ordinary torch: compiled submodules run as Python.

    Warnings of the tracer are not the user's.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if any(_is_compiled(module) for module in model.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(torch._dynamo.config.patch(error_on_nested_fx_trace=False))
        stack.enter_context(silenced())
        if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            stack.enter_context(OnOneDevice(device_of(model)))
        stack.enter_context(fakes_by_type(model))
        yield


def _is_compiled(module: torch.nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
