"""The one graph as a ``torch.export.ExportedProgram`` in which no size was decided.

``torch.export.export`` refuses named dimensions where an operator asks about a size: a table of
positions with W rows, sliced by ``past + query``, leaves ``2 <= past <= W - 2``. Here the graph is
written as a program directly. Its sizes are the symbols of the interface, what is past from 0 on;
its nodes compute every size that they need; no guard is made, and so none can fail.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from cachefree.errors import CaptureError, Refusal
from cachefree.fakes import device_of, has_no_values
from cachefree.graph import is_body
from cachefree.onnx.domain import concrete
from cachefree.onnx.networks import network_operator
from cachefree.onnx.pairs import Pairs, pair_of, unwritten
from cachefree.onnx.simpler import PREVIOUS, SIMPLER, Result, without_groups
from cachefree.onnx.spare_rounds import cut_to, with_spare_round, with_spare_row
from cachefree.sizes import SizeEnvironment, size_symbol
from cachefree.token_scan import token_scan

if TYPE_CHECKING:
    from cachefree.spec import Interface

__all__ = ["CAPACITY", "example_sizes", "exported_program", "graph_values"]

log = logging.getLogger(__name__)

aten = torch.ops.aten
CAPACITY = "capacity"
"""The symbol of the rows that a shared buffer has."""
_NUMBERS = (
    (2, 3, 4, 5, 6, 7, 8, 9),
    (3, 5, 7, 11, 13, 17, 19, 23),
    (3, 2, 5, 7, 4, 9, 8, 11),
    (4, 3, 2, 5, 6, 7, 8, 9),
)

_FACTORS = (16, 512)  # for the lengths of what an encoder hears


def example_sizes(interface: Interface) -> Iterator[dict[str, int]]:
    """Sizes to trace at: at least 2 each and all different; those inside the domain come first.

    Sizes 0 and 1 would be frozen, and two equal ones could be taken for one. The domain says where
    the graph is the model; it runs beyond, and where a domain has no room for such sizes it is
    traced there. What is past comes to less than what it is a part of.
    """
    symbols = interface.symbols
    past_first = sorted(symbols, key=lambda name: name not in interface.past_symbols)
    orders = (past_first, symbols) if _has_ties(interface) else (symbols,)
    candidates = [
        _with_room(dict(zip(order, (*numbers, *range(24, 24 + len(order))), strict=False)))
        for order in orders
        for numbers in _NUMBERS
    ]
    small = {"batch", "query", *interface.past_symbols}
    candidates += [
        {name: size if name in small else size * factor for name, size in sizes.items()}
        for factor in _FACTORS
        for sizes in candidates
    ]
    yield from sorted(
        candidates,
        key=lambda sizes: (not interface.domain.holds(sizes), _has_ones(interface, sizes)),
    )


def _has_ones(interface: Interface, sizes: Mapping[str, int]) -> bool:
    """Whether a size that may vary is 0 or 1: rows of a convolution with a stride are few."""
    shapes = [spec.shape for spec in interface.inputs] + [spec.shape for spec in interface.outputs]
    varying = {
        size
        for shape in shapes
        for size in shape
        if isinstance(size, sympy.Basic) and {str(s) for s in size.free_symbols} <= sizes.keys()
    }
    return any(concrete((size,), sizes)[0] < 2 for size in varying)


def _with_room(sizes: dict[str, int]) -> dict[str, int]:
    """Buffers hold more rows than there are."""
    if CAPACITY in sizes:
        sizes[CAPACITY] = 1 + 2 * sum(sizes.values())
    return sizes


def _has_ties(interface: Interface) -> bool:
    """Whether a slot of the cache holds all rows of another input, or none."""
    return len(interface.past_symbols) > 1


def exported_program(
    module: fx.GraphModule, interface: Interface, *, has_values: bool = True
) -> ExportedProgram:
    """Writes the graph as an exported program.

    Args:
        module: The graph of the interface; parameters and buffers are shared, and tied ones come in
            once.
        interface: Its inputs, whose sizes become the program's symbols.
        has_values: Whether parameters and buffers must have values; if not, those without are on
            the meta device in the program.

    Raises:
        CaptureError: a parameter or buffer has no storage, or the graph runs at no sizes of its
            domain.
    """
    device = _device(module) if has_values else torch.device("cpu")
    return _written(module, interface, device)[0]


def graph_values(module: fx.GraphModule, interface: Interface) -> dict[fx.Node, Any]:
    """The value of each node of a graph on fake tensors, whose sizes are the interface's symbols.

    Raises:
        CaptureError: the graph runs at no sizes of its domain.
    """
    device = device_of(module)
    writer = _written(module, interface, device)[1]
    pairs = writer.pairs.numbers
    return {
        # () for a loop
        node: pairs.get(value, value.meta.get("val", ())) if isinstance(value, fx.Node) else value
        for node, value in writer.nodes.items()
    }


def _written(
    module: fx.GraphModule, interface: Interface, device: torch.device
) -> tuple[ExportedProgram, _ProgramWriter]:
    reason: Exception | None = None
    for sizes in example_sizes(interface):
        writer = _ProgramWriter(module, interface, sizes, device)
        try:
            with torch.no_grad(), torch.inference_mode(False), enable_python_dispatcher():
                return writer.run(), writer
        except (RuntimeError, ValueError, IndexError) as error:
            log.debug("The graph does not run at %s: %s", sizes, error)
            reason = reason or error
    raise CaptureError(
        Refusal("The graph runs at none of the example sizes of its domain.", why=str(reason))
    ) from reason


class _ProgramWriter:
    def __init__(
        self,
        module: fx.GraphModule,
        interface: Interface,
        sizes: Mapping[str, int],
        device: torch.device,
    ) -> None:
        self.module = module
        self.interface = interface
        self.device = device
        self.sizes = sizes
        self.environment = SizeEnvironment(sizes)
        self.ranges = {
            size_symbol(name): ValueRanges(int(name not in interface.past_symbols), int_oo)
            for name in sizes
        }
        self.environment.var_to_range.update(self.ranges)
        self.mode = FakeTensorMode(shape_env=self.environment, allow_non_fake_inputs=True)
        self.graph = fx.Graph()
        self.nodes: dict[fx.Node, Any] = {}
        self.inputs: list[InputSpec] = []
        self.outputs: list[OutputSpec] = []
        self.state: dict[str, torch.Tensor] = {}
        self.bodies: dict[str, fx.GraphModule] = {}
        self.returned: list[fx.Node] = []
        self.pairs = Pairs(self.mode)

    def run(self) -> ExportedProgram:
        fakes = self._fakes()
        self._lift_tensors()
        remaining = iter(fakes)
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                self.nodes[node] = self._placeholder(
                    node.name, next(remaining), InputKind.USER_INPUT, None
                )
            elif node.op == "output":
                self._write_output(node)
            elif node.op != "get_attr":
                self.nodes[node] = self._write_call(node)
        return self._program(fakes)

    def _fakes(self) -> list[torch.Tensor]:
        with self.mode:
            return [
                torch.empty(
                    [self.environment.size_of(size) for size in spec.shape],
                    dtype=spec.dtype,
                    device=self.device,
                )
                for spec in self.interface.inputs
            ]

    def _placeholder(self, name: str, value: Any, kind: InputKind, target: str | None) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = value
        persistent = target in self.state if kind is InputKind.BUFFER else None
        self.inputs.append(InputSpec(kind, TensorArgument(node.name), target, persistent))
        return node

    def _lift_tensors(self) -> None:
        """Makes an input of each parameter and buffer; one for tensors that are tied."""
        seen: dict[int, fx.Node] = {}
        used = []
        for node in self.module.graph.nodes:
            if node.op == "get_attr" and is_body(node):
                self.nodes[node] = node
            elif node.op == "get_attr":
                used.append(node)
        tensors = [_tensor(self.module, str(node.target)) for node in used]
        is_parameter = [
            isinstance(tensor, torch.nn.Parameter) and not tensor.is_complex() for tensor in tensors
        ]
        order = sorted(range(len(used)), key=lambda place: not is_parameter[place])
        for place in order:  # parameters stand before buffers
            node, tensor, name = used[place], tensors[place], str(used[place].target)
            if id(tensor) not in seen:
                kind = InputKind.PARAMETER if is_parameter[place] else InputKind.BUFFER
                fake = number = self._fake(tensor)
                kept = fake if has_no_values(tensor) else tensor
                if tensor.is_complex():
                    with self.mode:
                        fake = pair_of(number)
                    kept = fake if has_no_values(tensor) else pair_of(tensor)
                self.state[name] = kept
                prefix = "p" if is_parameter[place] else "b"
                written = self._placeholder(f"{prefix}_{name.replace('.', '_')}", fake, kind, name)
                if tensor.is_complex():
                    self.pairs.numbers[written] = number
                seen[id(tensor)] = written
            self.nodes[node] = seen[id(tensor)]

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        if has_no_values(tensor):
            with self.mode:
                fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            return torch.nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
        return self.mode.from_tensor(tensor, static_shapes=True)

    def _write_call(self, node: fx.Node) -> Any:
        def written(argument: Any) -> Any:
            return self.nodes[argument] if isinstance(argument, fx.Node) else argument

        args = fx.node.map_aggregate(node.args, written)
        if node.target is token_scan:
            if self.pairs.is_due(token_scan, args, {}):
                raise unwritten(node)
            return self._write_scan(node, args)
        kwargs = fx.node.map_aggregate(node.kwargs, written)
        if node.target is getattr:  # the only attribute that the graph reads is the device
            return self.device
        if node.target is operator.getitem and isinstance(args[0], tuple):
            return args[0][args[1]]  # type: ignore[index]
        if self.pairs.is_due(node.target, args, kwargs):
            return self.pairs.write(functools.partial(self._create, node), node, args, kwargs)
        for target, simpler in SIMPLER.items():
            if node.target is target and (steps := simpler(args)) is not None:
                return self._write_steps(node, steps, kwargs)
        target = aten.sym_size.int if node.op == "call_method" else network_operator(node.target)
        return self._create(node, target, args, kwargs)

    def _write_scan(self, node: fx.Node, args: Any) -> fx.Node | tuple[fx.Node, ...]:
        """A loop over tokens, with its body as a graph beside this one."""
        body, first, sources, outside, may_be_none = args
        module = getattr(self.module, str(body.target))
        count = None
        if may_be_none:
            module = with_spare_round(module, len(first), len(sources))
            sources, count = with_spare_row(
                lambda target, args: self._create(node, target, args, {}), sources
            )
        shapes = [value.meta["val"] for value in (*first, *sources, *outside)]
        rows = range(len(first), len(first) + len(sources))
        with self.mode:
            fakes = [
                torch.empty(value.shape[1:], dtype=value.dtype, device=value.device)
                if place in rows
                else value
                for place, value in enumerate(shapes)
            ]
        name = str(body.target)
        inner = _BodyWriter(module, self)
        self.bodies[name] = inner.run_body(fakes)
        new = self.graph.call_function(
            torch.ops.higher_order.scan,
            (self.graph.get_attr(name), list(first), list(sources), tuple(outside)),
        )
        rounds = shapes[len(first)].shape[0]
        results = [result.meta["val"] for result in inner.returned]
        with self.mode:
            given = [
                torch.empty((rounds, *value.shape), dtype=value.dtype, device=value.device)
                for value in results[len(first) :]
            ]
        new.meta["val"] = (*results[: len(first)], *given)
        return new if count is None else self._without_spare(node, new, len(first), count)

    def _without_spare(
        self, node: fx.Node, scan: fx.Node, carried: int, count: fx.Node
    ) -> tuple[fx.Node, ...]:
        """The results of a loop with a spare round, without those of that round."""

        def create(target: Any, args: tuple[Any, ...]) -> fx.Node:
            return self._create(node, target, args, {})

        parts = [create(operator.getitem, (scan, place)) for place in range(len(scan.meta["val"]))]
        return (*parts[:carried], *(cut_to(create, part, count) for part in parts[carried:]))

    def _write_steps(
        self, node: fx.Node, steps: Sequence[tuple[Any, tuple[Any, ...]]], kwargs: Any
    ) -> Any:
        """Writes operators one after the other, which take the results of those before.

        The operator itself, where it is among them, keeps its keyword arguments.
        """
        results: list[Any] = []

        def given(argument: Any) -> Any:
            if isinstance(argument, Result):
                return results[argument.number]
            return results[-1] if argument is PREVIOUS else argument

        for target, args in steps:
            options = kwargs if target is node.target else {}
            results.append(self._create(node, target, tuple(map(given, args)), options))
        result = results[-1]
        has_several = (
            isinstance(node.target, torch._ops.OpOverload) and len(node.target._schema.returns) > 1
        )
        return (result,) if has_several else result

    def _create(self, node: fx.Node, target: Any, args: Any, kwargs: Any) -> fx.Node:
        kwargs = without_groups(target, args, kwargs)
        new = self.graph.create_node("call_function", target, args, kwargs, name=node.name)
        new.meta.update({key: node.meta[key] for key in ("stack_trace",) if key in node.meta})
        with self.mode:
            values = fx.node.map_arg((args, kwargs), lambda operand: operand.meta["val"])
            new.meta["val"] = target(*values[0], **values[1])
        return new

    def _write_output(self, node: fx.Node) -> None:
        returned = [self.nodes[result] for result in node.args[0]]  # type: ignore[union-attr, index]
        if any(result in self.pairs.numbers for result in returned):
            raise unwritten(node)
        self.graph.output(tuple(returned))
        self.returned = returned
        self.outputs = [
            OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(result.name), None)
            for result in returned
        ]

    def _program(self, fakes: list[torch.Tensor]) -> ExportedProgram:
        _, input_tree = pytree.tree_flatten((tuple(fakes), {}))
        _, output_tree = pytree.tree_flatten(tuple(range(len(self.outputs))))
        entry = ModuleCallEntry("", ModuleCallSignature([], [], input_tree, output_tree))
        root = torch.nn.Module()
        for name, body in self.bodies.items():
            root.add_module(name, body)
        return ExportedProgram(
            fx.GraphModule(root, self.graph),
            self.graph,
            ExportGraphSignature(self.inputs, self.outputs),
            self.state,
            self.ranges,
            [entry],
            example_inputs=(tuple(fakes), {}),
            constants={},
        )


class _BodyWriter(_ProgramWriter):
    """The body of a loop over tokens, in the sizes of the graph that it stands in."""

    def __init__(self, module: fx.GraphModule, outer: _ProgramWriter) -> None:
        super().__init__(module, outer.interface, outer.sizes, outer.device)
        self.environment, self.mode = outer.environment, outer.mode
        self.pairs = Pairs(self.mode)

    def run_body(self, fakes: Sequence[torch.Tensor]) -> fx.GraphModule:
        remaining = iter(fakes)
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                self.nodes[node] = self.graph.placeholder(node.name)
                self.nodes[node].meta["val"] = next(remaining)
            elif node.op == "output":
                self._write_output(node)
            else:
                self.nodes[node] = self._write_call(node)
        return fx.GraphModule(torch.nn.Module(), self.graph)


def _device(module: torch.nn.Module) -> torch.device:
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_meta:
            raise CaptureError(
                Refusal(
                    "The model's weights are on the meta device: they have a shape but no values.",
                    why="An ONNX file holds the weights.",
                    remedy="Load the weights first (model.to_empty, load_state_dict), then export.",
                )
            )
    return next((tensor.device for tensor in module.parameters()), torch.device("cpu"))


def _tensor(module: torch.nn.Module, path: str) -> torch.Tensor:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    assert isinstance(value, torch.Tensor)
    return value
