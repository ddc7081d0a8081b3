"""Terms as a torch.fx graph: flat tensors in and out, and sizes that are read from the inputs.

The parameters and buffers are the model's own.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import Max, Min

from cachefree.execution import make_quick
from cachefree.size_nodes import SizeNodes
from cachefree.sizes import symbols_of
from cachefree.structure import is_same_plain
from cachefree.terms import (
    SCAN,
    Term,
    is_part,
    operands,
    outer_operands,
    replace_operands,
    scan_parts,
    topological,
)
from cachefree.token_places import least_of
from cachefree.token_scan import token_scan

__all__ = ["bodies", "emit", "is_body", "mirror"]

aten = torch.ops.aten
CONSTANTS = "_constants"
BODY = "_one_token"


def emit(
    model: torch.nn.Module,
    inputs: Sequence[tuple[str, Term]],
    outputs: Sequence[tuple[str, Term]],
) -> fx.GraphModule:
    """Writes terms as a graph module.

    Args:
        model: Whose parameters and buffers the graph uses; they are shared, not copied.
        inputs: A name and an ``"input"`` term each; they become the placeholders, in this order.
        outputs: A name and a term each; they become the tuple that the graph returns.

    Returns:
        A graph module with no control flow, no ``None`` and no shape but those read from its
        inputs.
    """
    writer = _Writer(inputs, outputs)
    graph = writer.run()
    return assemble(graph, {**mirror(model), **writer.bodies}, writer.constants)


def assemble(
    graph: fx.Graph,
    containers: Mapping[str, torch.nn.Module],
    constants: Mapping[str, torch.Tensor],
) -> fx.GraphModule:
    """A graph module over containers that share the model's parameters."""
    root = torch.nn.Module()
    for name, container in containers.items():
        if name:
            root.add_module(name, container)
        else:
            root._parameters, root._buffers = container._parameters, container._buffers
            root._non_persistent_buffers_set = container._non_persistent_buffers_set
    if constants:
        holder = torch.nn.Module()
        for name, tensor in constants.items():
            holder.register_buffer(name, tensor, persistent=False)
        root.add_module(CONSTANTS, holder)
    module = fx.GraphModule(root, graph, class_name="OneGraph")
    # GraphModule copies the tensors it uses into new containers; share the model's own instead.
    for name in list(module._modules):
        del module._modules[name]
    for name, child in root._modules.items():
        module.add_module(name, child)
    module._parameters, module._buffers = root._parameters, root._buffers
    module._non_persistent_buffers_set = root._non_persistent_buffers_set
    module.training = False
    make_quick(module)
    return module


def mirror(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Empty modules in the model's hierarchy whose parameters and buffers *are* the model's.

    The dictionaries themselves are shared: a parameter that the model replaces later is seen here
    too, while ``train()`` of one does not reach the other.

    Returns:
        The mirrored children by name, and under ``""`` a holder of the model's own parameters and
        buffers.
    """
    seen: dict[int, torch.nn.Module] = {}

    def copy(module: torch.nn.Module) -> torch.nn.Module:
        if id(module) not in seen:
            container = torch.nn.Module()
            container._parameters, container._buffers = module._parameters, module._buffers
            container._non_persistent_buffers_set = module._non_persistent_buffers_set
            container.training = module.training
            seen[id(module)] = container
            for name, child in module.named_children():
                container.add_module(name, copy(child))
        return seen[id(module)]

    top = copy(model)
    return {"": top, **{name: child for name, child in top._modules.items() if child is not None}}


class _BufferTracer(fx.Tracer):
    """Writes a graph that is unpickled: a buffer stays the buffer, whatever is computed from it."""

    proxy_buffer_attributes = True


def is_body(node: fx.Node) -> bool:
    """Whether a node of a graph is the body of a loop over tokens, and no tensor."""
    return node.op == "get_attr" and str(node.target).startswith(BODY)


def bodies(module: fx.GraphModule) -> dict[str, torch.nn.Module]:
    """The bodies of a graph's loops over tokens, by name."""
    return {
        name: child
        for name, child in module._modules.items()
        if name.startswith(BODY) and child is not None
    }


class _Writer:
    def __init__(
        self,
        inputs: Sequence[tuple[str, Term]],
        outputs: Sequence[tuple[str, Term]],
        *,
        is_body: bool = False,
    ) -> None:
        self.is_body = is_body
        self.inputs = inputs
        self.outputs = outputs
        self.graph = fx.Graph(tracer_cls=_BufferTracer)
        self.nodes: dict[Term, fx.Node] = {}
        self.sizes = SizeNodes(self.graph)
        self.constants: dict[str, torch.Tensor] = {}
        self.bodies: dict[str, torch.nn.Module] = {}
        self.device_node: fx.Node | None = None
        self.device: torch.device | None = None

    def run(self) -> fx.Graph:
        for name, term in self.inputs:
            node = self.graph.placeholder(_identifier(name))
            self.nodes[term] = node
            self.device = self.device or term.device
        self.sizes.find([(term, self.nodes[term]) for _, term in self.inputs])
        below = topological((term for _, term in self.outputs), self._needed)
        order = sorted(below, key=lambda term: term.number)
        for term in order:
            if term not in self.nodes:
                self.nodes[term] = self._node(term)
        results = []
        returned: set[fx.Node] = set()
        for name, term in self.outputs:
            node = self.nodes[term]
            if node.op == "placeholder" or node in returned or (self.is_body and is_part(term)):
                # an output of its own: exporters name outputs by their nodes
                node = self.graph.call_function(aten.clone.default, (node,))
            returned.add(node)
            node.meta["output_name"] = name
            results.append(node)
        self.graph.output(tuple(results))
        self.graph.eliminate_dead_code()
        self.graph.lint()
        return self.graph

    def _needed(self, term: Term) -> Iterable[Term]:
        return () if term in self.nodes else outer_operands(term)

    def _node(self, term: Term) -> fx.Node:
        if term.op == "attribute":
            return self.graph.get_attr(str(term.args[0]))
        if term.op == "constant":
            name = f"tensor_{len(self.constants)}"
            self.constants[name] = term.payload
            return self.graph.get_attr(f"{CONSTANTS}.{name}")
        if term.op == SCAN:
            return self._scan(term)
        if term.op == "item":
            return self._call(term, operator.getitem, self._written(term.args), {})
        if isinstance(term.op, str):
            op, args = _CANONICAL[term.op](term)
        else:
            op, args = term.op, term.args
        if op in (aten.view.default, aten._unsafe_view.default, aten.reshape.default):
            op = aten.reshape.default if op is aten.reshape.default else aten.view.default
            args = (args[0], term.sizes)  # every -1 is resolved: it is ambiguous at zero elements
        elif op is aten.expand.default:
            args = (args[0], _expanded(term), *args[2:])
        elif op is aten.slice.Tensor:
            args = _plain_slice(term.op, args)
            if args[2] in (0, None) and args[3] in (_END, None) and args[4:] in ((), (1,)):
                return self.nodes[args[0]]  # all of it, as ``x[:, None]`` asks of the first axis
        return self._call(term, op, *self._schema_arguments(op, args))

    def _scan(self, term: Term) -> fx.Node:
        """A loop over tokens, by torch's own operator for it."""
        _, carried, first, rows, sources, _, _ = term.args
        results, outside = scan_parts(term)
        outside += self._sizes_for_body(results, [*carried, *rows, *outside])
        inputs = [
            *((f"carried_{place}", bound) for place, bound in enumerate(carried)),
            *((f"row_{place}", bound) for place, bound in enumerate(rows)),
            *((f"outer_{place}", value) for place, value in enumerate(outside)),
        ]
        writer = _Writer(
            inputs, [(f"y{place}", value) for place, value in enumerate(results)], is_body=True
        )
        name = f"{BODY}_{len(self.bodies)}"
        self.bodies[name] = fx.GraphModule(torch.nn.Module(), writer.run(), class_name="OneToken")
        node = self.graph.call_function(
            token_scan,
            (
                self.graph.get_attr(name),
                [self.nodes[value] for value in first],
                [self.nodes[value] for value in sources],
                tuple(self.nodes[value] for value in outside),
                not (least_of(sympy.sympify(term.args[0])) - 1).is_nonnegative,
            ),
        )
        if term.line is not None:
            node.meta["stack_trace"] = (
                f'File "{term.line.file}", line {term.line.line}, in {term.line.function}'
            )
        return node

    def _sizes_for_body(self, results: Sequence[Term], inputs: Sequence[Term]) -> list[Term]:
        """Inputs of the graph whose sizes the body needs and cannot read elsewhere."""
        known = symbols_of(size for term in inputs for size in term.sizes)
        needed: set[sympy.Symbol] = set()
        taken = set(inputs)
        for term in topological(results, lambda term: () if term in taken else operands(term)):
            if term not in taken:
                sizes: list[Any] = []
                replace_operands((term.args, term.shape or ()), sizes.append)
                needed |= symbols_of(sizes)
        found = []
        for symbol in sorted(needed - known, key=str):
            source = next((t for _, t in self.inputs if symbol in t.sizes), None)
            if source is not None and source not in found:
                found.append(source)
        return found

    def _call(self, term: Term, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        name = re.split(r"[.:]", term.name)[0]
        module = term.line.module if term.line is not None else ""
        node = self.graph.create_node(
            "call_function",
            op,
            args,
            kwargs,
            name=_identifier(f"{module}.{name}" if module else name),
        )
        if term.line is not None:
            node.meta["stack_trace"] = (
                f'File "{term.line.file}", line {term.line.line}, in {term.line.function}'
            )
        return node

    def _schema_arguments(
        self, op: Any, args: tuple[Any, ...]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of a call.

        Defaults at the end are left out, and the device is that of the inputs.
        """
        positional: list[Any] = []
        keywords: dict[str, Any] = {}
        schema = op._schema.arguments
        for argument, value in zip(schema, args, strict=False):
            if argument.name == "device" and value is not None and value == self.device:
                keywords["device"] = self._input_device()
                continue
            value = self._written(value)
            if argument.kwarg_only:
                if not (
                    argument.has_default_value() and _is_default(argument.default_value, value)
                ):
                    keywords[argument.name] = value
            else:
                positional.append(value)
        if keywords.get("device") is not None and any(
            a.name == "device" and not a.kwarg_only for a in schema
        ):
            place = next(i for i, a in enumerate(schema) if a.name == "device")
            positional.insert(place, keywords.pop("device"))
        positional_schema = [argument for argument in schema if not argument.kwarg_only]
        while positional:
            argument = positional_schema[len(positional) - 1]
            if argument.has_default_value() and _is_default(argument.default_value, positional[-1]):
                positional.pop()
            else:
                break
        return tuple(positional), keywords

    def _input_device(self) -> fx.Node:
        if self.device_node is None:
            first = self.nodes[self.inputs[0][1]]
            with self.graph.inserting_after(first):
                self.device_node = self.graph.call_function(getattr, (first, "device"))
        return self.device_node

    def _written(self, args: Any) -> Any:
        if isinstance(args, tuple):
            return type(args)(self._written(arg) for arg in args)
        if isinstance(args, Term):
            return self.nodes[args]
        return self.sizes.node(args)


def _is_default(default: Any, value: Any) -> bool:
    if isinstance(value, (fx.Node, torch.Tensor)):
        return False
    if isinstance(default, list):
        default = tuple(default)
    return is_same_plain(default, value)


def _expanded(term: Term) -> tuple[Any, ...]:
    """-1 where a dimension is kept, so that no size is needed for it."""
    source = term.args[0].sizes
    added = len(term.sizes) - len(source)
    return tuple(
        -1 if dim >= added and source[dim - added] == size and size != 1 else size
        for dim, size in enumerate(term.sizes)
    )


_END = 2**63 - 1
"""Where a slice ends that ends with its tensor."""


def _plain_slice(op: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A slice in the words of Python: ``-w:`` rather than ``max(n - w, 0):``."""
    source, dim, start, end, *rest = args
    size = source.sizes[dim]
    if isinstance(start, Max) and len(start.args) == 2 and 0 in start.args:
        width = sympy.expand(size - next(arg for arg in start.args if arg != 0))
        if width.is_Integer and width > 0:
            start = -int(width)
    if isinstance(end, Min) and size in end.args and len(end.args) == 2:
        end = next(arg for arg in end.args if arg != size)
        end = int(end) if end.is_Integer else end
    if isinstance(size, sympy.Basic) and end == size:
        end = _END
    return (source, dim, start, end, *rest)


def _identifier(name: str) -> str:
    text = re.sub(r"\W+", "_", name).strip("_")
    return text if text and not text[0].isdigit() else f"_{text}"


def _canonical_cast(term: Term) -> tuple[Any, tuple[Any, ...]]:
    source, dtype, device = term.args
    if device == source.device:
        return aten.to.dtype, (source, dtype)
    return aten.to.device, (source, device, dtype)


def _canonical_slice(term: Term) -> tuple[Any, tuple[Any, ...]]:
    source, dim, start, end, step = term.args
    return aten.slice.Tensor, (source, dim, start, end, step)


_CANONICAL: dict[str, Any] = {
    "reshape": lambda term: (aten.reshape.default, term.args),
    "permute": lambda term: (aten.permute.default, term.args),
    "expand": lambda term: (aten.expand.default, (*term.args, False)),
    "slice": _canonical_slice,
    "cat": lambda term: (aten.cat.default, term.args),
    "arange": lambda term: (
        aten.arange.start_step,
        (
            term.args[0],
            term.args[0] + term.args[1] * term.args[2],
            term.args[2],
            term.args[3],
            None,
            term.args[4],
            None,
        ),
    ),
    "cast": _canonical_cast,
    "full": lambda term: (
        aten.full.default,
        (term.args[0], term.args[1], term.args[2], None, term.args[3], None),
    ),
}
