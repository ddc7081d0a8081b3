"""Values that the code asks for and that are made of sizes alone: ``if mask.any()``.

A mask that the code builds of numbers has the same values at every call of the same sizes. What is
asked about it is a question about sizes. The part of the graph that it comes from is read as a
term, and this as a fact about sizes. What cannot be shown is left unanswered, and refused.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._mode_utils import no_dispatch

from cachefree.calls import Call
from cachefree.capture import Captured
from cachefree.errors import CacheFreeError
from cachefree.known_values import SHAPED
from cachefree.laws.evaluation import is_of_sizes_alone
from cachefree.loops import LOOP, node_of
from cachefree.reading import read
from cachefree.size_facts import SizeFact, UnknownFactError, symbols_in
from cachefree.sizes import SizeEnvironment, symbols_of
from cachefree.storages import storage_of
from cachefree.structure import flatten
from cachefree.terms import Table, Term

__all__ = ["SizeAnswers"]

_FULL = torch.ops.aten.full.default
_LIFTS = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default)


class SizeAnswers:
    """Answers what code asks of tensors that it makes of sizes alone, while it is captured."""

    def __init__(self) -> None:
        self.table = Table()
        self._found: dict[tuple[Term, Any], Any] = {}

    def __call__(self, tensor: torch.Tensor) -> Any:
        """The number or truth that a tensor is, as an expression of sizes; None if unknown."""
        environment = getattr(getattr(tensor, "fake_mode", None), "shape_env", None)
        node = node_of(tensor)
        graph = None if node is None else _made_of_sizes(node)
        if graph is None or not isinstance(environment, SizeEnvironment):
            return None
        # the modes that trace the model are those of its thread
        with ThreadPoolExecutor(1) as apart:
            found = apart.submit(self._of, graph, environment).result()
        if found is None:
            return None
        return _in(environment, found, is_truth=tensor.dtype == torch.bool)

    def _of(self, graph: fx.Graph, environment: SizeEnvironment) -> Any:
        captured = Captured(graph, Call(flatten(())[1], ()), flatten(())[1], (), (), (), {}, ())
        with torch.no_grad():
            try:
                (term,) = read(captured, self.table, {}).outputs
            except CacheFreeError:
                return None
            symbols = symbols_of(environment.backed_var_to_val)
            if not is_of_sizes_alone(term) or not symbols_in(term) <= symbols:
                return None
            asked = tuple(question.fact for question in environment.questions.values())
            for known in ((), asked):
                if (term, known) not in self._found:
                    self._found[term, known] = self._answer(term, known)
                if self._found[term, known] is not None:
                    return self._found[term, known]
        return None

    def _answer(self, term: Term, known: tuple[Any, ...]) -> Any:
        try:
            return SizeFact(self.table, term, known).given()
        except (UnknownFactError, RuntimeError, ValueError, IndexError, NotImplementedError):
            return None


def _in(environment: SizeEnvironment, value: Any, *, is_truth: bool) -> Any:
    """A value as what the code is given while it is captured."""
    if not is_truth:
        return environment.size_of(value)
    fact = environment.learnt(value)
    if fact in (sympy.true, sympy.false):
        return fact is sympy.true
    return torch.SymBool(environment.create_symboolnode(fact).node)


def _made_of_sizes(node: fx.Node) -> fx.Graph | None:
    """The part of a graph that a value comes from; None where more than sizes is in it."""
    needed: set[fx.Node] = set()
    writes = [other for other in node.graph.nodes if _is_write(other)]
    pending = [node]
    while pending:
        part = pending.pop()
        if part in needed:
            continue
        if LOOP in part.meta or _is_size(part):
            return None
        if part.op != "call_function" and _constant(part) is None:
            return None
        needed.add(part)
        pending += [operand for operand in _read_by(part) if not _is_size(operand)]
        if not pending:
            memories = {storage_of(other.meta["val"]) for other in needed}
            pending = [
                write
                for write in writes
                if write not in needed
                and any(_memory(operand) in memories for operand in write.all_input_nodes)
            ]
    return _copied(node, needed)


def _read_by(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values an operator reads."""
    target: Any = node.target
    operands = list(node.all_input_nodes)
    if getattr(target, "overloadpacket", None) not in SHAPED:
        return operands
    return [operand for operand in operands if operand is not node.args[0]]


def _copied(node: fx.Node, needed: set[fx.Node]) -> fx.Graph:
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()

    def copy(operand: fx.Node) -> fx.Node:
        value = operand.meta["val"]
        if operand not in copies and isinstance(value, torch.Tensor):  # its values are not read
            options: Any = {"dtype": value.dtype, "device": value.device}
            copies[operand] = graph.call_function(_FULL, (list(value.shape), 0), options)
            copies[operand].meta = dict(operand.meta)
        elif operand not in copies:
            copies[operand] = graph.placeholder(operand.name)
            copies[operand].meta = dict(operand.meta)
        return copies[operand]

    for part in node.graph.nodes:
        if part in needed and part.op == "get_attr":
            value = part.meta["val"]
            options = {"dtype": value.dtype, "device": value.device}
            copies[part] = graph.call_function(_FULL, ([], _constant(part)), options)
            copies[part].meta = dict(part.meta)
        elif part in needed:
            copies[part] = graph.node_copy(part, copy)
    graph.output((copies[node],))
    return graph


def _constant(node: fx.Node) -> Any:
    """A number that the code makes a tensor of; None for the model's own tensors."""
    mode: Any = get_proxy_mode()
    if (
        node.op != "get_attr"
        or mode is None
        or any(user.target not in _LIFTS for user in node.users)
    ):
        return None
    value = getattr(mode.tracer.root, str(node.target), None)
    if type(value) is not torch.Tensor or value.is_meta or value.dim():
        return None
    with torch._C.DisableTorchFunction(), no_dispatch():
        return value.item()


def _is_size(node: fx.Node) -> bool:
    sizes = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)
    return isinstance(node.meta.get("val"), sizes)


def _is_write(node: fx.Node) -> bool:
    target: Any = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _memory(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return storage_of(value) if isinstance(value, torch.Tensor) else None
