"""What the nodes of the one graph are: their shapes in size symbols, and their values at sizes."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor

from cachefree.onnx.domain import concrete
from cachefree.onnx.program import graph_values
from cachefree.sizes import expression
from cachefree.spec import Interface

__all__ = ["Shapes", "SizeNodes", "evaluate"]


class Shapes:
    """The shape and dtype of every node, with no size decided.

    Args:
        module: The graph of the interface.
        interface: Its inputs.
    """

    def __init__(self, module: fx.GraphModule, interface: Interface) -> None:
        self.values = graph_values(module, interface)

        tensors = (value for value in self.values.values() if isinstance(value, FakeTensor))
        self.mode = next(tensors).fake_mode

    def value(self, node: fx.Node) -> Any:
        """The value of a node on fake tensors; a node that was written later is run now."""
        if node not in self.values:
            args: Any
            kwargs: Any
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.value)
            with torch.no_grad(), enable_python_dispatcher(), self.mode:
                if node.op == "call_method":
                    self.values[node] = args[0].size(*args[1:])
                else:
                    function: Any = node.target
                    self.values[node] = function(*args, **kwargs)
        return self.values[node]

    def of(self, node: fx.Node) -> tuple[Any, ...]:
        """The sizes of a tensor: ints, or expressions in the size symbols."""
        return tuple(sympy.sympify(expression(size)) for size in self.value(node).shape)

    def dtype(self, node: fx.Node) -> torch.dtype:
        """The dtype of a tensor."""
        return self.value(node).dtype  # type: ignore[no-any-return]

    def is_tensor(self, node: Any) -> bool:
        """Whether a node has a tensor for its value."""
        return isinstance(node, fx.Node) and isinstance(self.value(node), torch.Tensor)


class SizeNodes:
    """Nodes that compute sizes, written where the graph begins.

    Args:
        graph: The graph; the nodes are inserted behind its last placeholder.
        interface: Its inputs, from which the sizes are read.
    """

    def __init__(self, graph: fx.Graph, interface: Interface) -> None:
        self.graph = graph
        self.placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        self.last = self.placeholders[-1]
        self.read: dict[Any, Any] = {}
        for node, spec in zip(self.placeholders, interface.inputs, strict=True):
            for axis, size in enumerate(spec.shape):
                if isinstance(size, sympy.Symbol) and size not in self.read:
                    self.read[size] = (node, axis)

    def node(self, size: Any) -> Any:
        """A node of a size, or the number that it is.

        Raises:
            ValueError: no input tells the size.
        """
        size = sympy.sympify(size)
        if size.is_Integer:
            return int(size)
        known = self.read.get(size)
        if isinstance(known, fx.Node):
            return known
        if isinstance(known, tuple):
            source, axis = known
            self.read[size] = self._write(lambda graph: graph.call_method("size", (source, axis)))
            return self.read[size]
        if not isinstance(size, (sympy.Add, sympy.Mul)):
            raise ValueError(f"no input tells the size {size}")
        function = operator.add if isinstance(size, sympy.Add) else operator.mul
        first, *rest = [self.node(part) for part in size.args]
        for part in rest:
            pair = (first, part)
            first = self._write(lambda graph, pair=pair: graph.call_function(function, pair))
        self.read[size] = first
        return first

    def _write(self, write: Any) -> fx.Node:
        with self.graph.inserting_after(self.last):
            self.last = write(self.graph)
        return self.last  # type: ignore[no-any-return]


def evaluate(
    node: fx.Node,
    interface: Interface,
    sizes: Mapping[str, int],
    given: Mapping[fx.Node, torch.Tensor],
) -> torch.Tensor:
    """The value of a node at sizes.

    Args:
        node: What is asked for.
        interface: The shapes of the placeholders, in order.
        sizes: A number for each size symbol.
        given: Values of the tensors that it is computed from.

    Raises:
        ValueError: it needs a tensor that is not given.
    """
    placeholders = [other for other in node.graph.nodes if other.op == "placeholder"]
    shapes = {
        other: concrete(spec.shape, sizes)
        for other, spec in zip(placeholders, interface.inputs, strict=True)
    }
    known: dict[fx.Node, Any] = dict(given)

    def value(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return of(argument)
        if isinstance(argument, (tuple, list)):
            return type(argument)(map(value, argument))
        return argument

    def of(wanted: fx.Node) -> Any:
        if wanted in known:
            return known[wanted]
        if wanted.op == "call_method" and wanted.target == "size":
            source, axis = wanted.args
            known[wanted] = shapes[source][axis]  # type: ignore[index]
        elif wanted.op == "call_function" and not _reads_device(wanted):
            function: Any = wanted.target
            known[wanted] = function(
                *value(tuple(wanted.args)), **{k: value(v) for k, v in wanted.kwargs.items()}
            )
        else:
            raise ValueError(f"{wanted} is not known")
        return known[wanted]

    result: torch.Tensor = of(node)
    return result


def _reads_device(node: fx.Node) -> bool:
    return node.target is getattr


def product(sizes: Sequence[Any]) -> Any:
    """The product of sizes."""
    result = sympy.Integer(1)
    for size in sizes:
        result = result * sympy.sympify(size)
    return sympy.expand(result)
