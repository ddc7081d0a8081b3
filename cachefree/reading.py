"""A captured FX graph read as terms: sizes become expressions, writes in place become values.

An operator that writes to a tensor changes every view of it. Here each tensor is its base and the
chain of views that leads to it; a write puts a new value into the base, and views are taken again
when they are read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import fx, nn

from cachefree.axes_in_place import changes_axes, names_of, view_of
from cachefree.calls import TensorSpec
from cachefree.capture import Captured
from cachefree.errors import CaptureError, Refusal, SourceLine
from cachefree.in_place import as_place, dtype_of, value_written, without_the_write
from cachefree.inverse_views import CASTS, is_part, put_back
from cachefree.isolation import StateChange
from cachefree.memos import MEMOS
from cachefree.provenance import LINE
from cachefree.randomness import is_random, is_thrown_away
from cachefree.recurrent import original
from cachefree.scans import Rounds
from cachefree.sizes import expression
from cachefree.storages import Base, Value, Views, are_apart, sharing, spoil, storage_of
from cachefree.strided import is_in_order, taken
from cachefree.terms import Table, Term, operands, topological

__all__ = ["Program", "is_own_buffer", "read"]

aten = torch.ops.aten


@dataclass
class Program:
    """A path as terms.

    Attributes:
        captured: What it was read from.
        inputs: One term a tensor of the call.
        outputs: One term a tensor of the result.
        written: Terms of inputs and attributes that the path writes to, with their last value.
        shared: Output → what may share elements of memory with it: other outputs, by their places,
            and inputs and attributes.
    """

    captured: Captured
    inputs: tuple[Term, ...]
    outputs: tuple[Term, ...]
    written: dict[Term, Term]
    shared: dict[int, list[int | Term]] = field(default_factory=dict)


_AUTOCAST = (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)
_PROFILED = ("profiler::_record_function_enter", "profiler::_record_function_exit")


def read(captured: Captured, table: Table, names: dict[int, str]) -> Program:
    """Reads a captured path.

    Args:
        captured: The path.
        table: Where the terms are made.
        names: ``id`` of a parameter or buffer → its qualified name.

    Raises:
        CaptureError: the path draws random numbers, or writes in a way that has no value.
    """
    program = _Reader(captured, table, names).run()
    if MEMOS.may_keep and not MEMOS.numbers_only:
        _keep_writes(program)
    return program


def _keep_writes(program: Program) -> None:
    """Takes what is written to buffers, and not read in the end, for what calls may leave."""
    read_in_the_end = set(topological(program.outputs)) if program.written else set()
    for term in list(program.written):
        module, _, key = str(term.args[0]).rpartition(".")
        if term not in read_in_the_end and is_own_buffer(term, program.captured):
            before, after = {key: term}, {key: program.written.pop(term)}
            MEMOS.kept.append(StateChange(module, "_buffers", before, after))


def is_own_buffer(term: Term, captured: Captured) -> bool:
    """Whether what is written to is a buffer, and no other tensor of the path is a part of it."""
    buffer = term.payload
    others = [tensor for tensor in captured.attributes.values() if tensor is not buffer]
    is_buffer = term.op == "attribute" and not isinstance(buffer, nn.Parameter)
    return is_buffer and all(
        type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.untyped_storage()._cdata != buffer.untyped_storage()._cdata
        for tensor in others
    )


class _Reader:
    def __init__(self, captured: Captured, table: Table, names: dict[int, str]) -> None:
        self.captured = captured
        self.table = table
        self.names = names
        self.values: dict[fx.Node, Any] = {}
        self.leaves: dict[Term, Base] = {}
        self.rounds = Rounds(table, captured.loops)
        self.is_grad_enabled = True
        self.tracked: set[Term] = set()  # terms that gradients flow through

    def run(self) -> Program:
        specs = iter(self.captured.call.tensors)
        inputs: list[Term] = []
        outputs: tuple[Term, ...] = ()
        paths = [spec.path for spec in self.captured.call.tensors]
        if len(set(paths)) < len(paths):
            twice = next(path for path in paths if paths.count(path) > 1)
            raise CaptureError(Refusal(f"Two inputs have one name: {twice}."))
        shared: dict[int, list[int | Term]] = {}
        for node in self.captured.graph.nodes:
            self.rounds.enter(node)
            if node.op == "placeholder":
                if not isinstance(node.meta.get("val"), torch.Tensor):
                    continue  # a size, which is read from the values that it is part of
                spec: TensorSpec = next(specs)
                term = self.table.input(spec.path, spec.shape, spec.dtype, spec.device)
                inputs.append(term)
                self.values[node] = self._leaf(term, node)
            elif node.op == "get_attr":
                self.values[node] = self._leaf(self._attribute(node), node)
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                results = [self.values[arg] for arg in node.args[0]]
                outputs = tuple(map(self._read, results))
                shared = sharing(results, self.leaves)
            self.rounds.note(node, self._made(node), is_write=_is_write(node))
        for base in self.leaves.values():
            self._refuse_spoiled(base, ())
        written = {term: base.term for term, base in self.leaves.items() if base.version}
        closed = self.rounds.closed((*outputs, *written.values()))
        if self.captured.doubt is not None:
            raise self.captured.doubt
        outputs = closed[: len(outputs)]
        written = dict(zip(written, closed[len(outputs) :], strict=True))
        return Program(self.captured, tuple(inputs), outputs, written, shared)

    def _made(self, node: fx.Node) -> tuple[Term, ...]:
        """The value of a node, and what it is a part of where the node wrote to it."""
        value = self.values.get(node)
        if isinstance(value, tuple):
            return (value[0],)
        if not isinstance(value, Value):
            return ()
        own = self._read(value, is_viewed=True)
        return (own, value.base.term) if _is_write(node) else (own,)

    def _leaf(self, term: Term, node: fx.Node) -> Value:
        base = self.leaves.setdefault(term, Base(term))
        is_trained = term.op == "input" or getattr(term.payload, "requires_grad", False)
        if is_trained and term.dtype is not None and term.dtype.is_floating_point:
            self.tracked.add(term)
        return Value(base, (), base.term, base.version, storage_of(node.meta.get("val")))

    def _attribute(self, node: fx.Node) -> Term:
        tensor = self.captured.attributes[str(node.target)]
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            self._refuse(
                node,
                "The path calls a transform of torch.func (vmap, grad).",
                "what is inside it has no shape of its own, and was not traced",
            )
        name = self.names.get(id(tensor))
        if name is None:
            return self.table.constant(tensor)
        return self.table.attribute(name, tensor, node.meta["val"].device)

    def _read(self, value: Value, *, is_viewed: bool = False) -> Term:
        if not is_viewed:
            self._refuse_spoiled(value.base, value.views)
        if value.term is None or value.version != value.base.version:
            term = value.base.term
            for node, op, args in value.views:
                assert node is not None
                term = self._apply(node, op, (term, *args))
            value.term, value.version = term, value.base.version
        return value.term

    def _autocast(self, node: fx.Node) -> None:
        """Leaves out a region without automatic casts; one with them is refused."""
        enter = node.args[0] if isinstance(node.args[0], fx.Node) else node
        if bool(enter.args[2]):
            self._refuse(
                node,
                "The model's code switches automatic casts on (torch.autocast).",
                "the casts are made after the path is traced, and would be missing in the graph",
                "Convert the module itself, with .to(dtype), and leave autocast to the caller.",
            )

    def _computes_nothing(self, node: fx.Node, target: Any) -> bool:
        """Whether a call switches a mode of torch, or gives a name to the profiler."""
        if target is torch._C._set_grad_enabled:
            self.is_grad_enabled = bool(node.args[0])
        elif target in _AUTOCAST:
            self._autocast(node)
        elif not isinstance(target, torch._ops.OpOverload):
            return False
        else:
            return target._schema.name.startswith(_PROFILED)
        return True

    def _call(self, node: fx.Node) -> None:
        target: Any = original(node.target)
        example = node.meta.get("val")
        if self._computes_nothing(node, target):
            return
        if isinstance(example, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)):
            if _reads_values(node):
                self._refuse(
                    node,
                    "The model's Python code depends on the values of a tensor.",
                    "a number is read from a tensor",
                )
            return
        if target.__name__ == "getitem" and target.__module__ == "_operator":
            self._item(node)
            return
        if not isinstance(target, torch._ops.OpOverload):
            self._refuse(
                node,
                f"The path calls {target}, which is no torch operator.",
                "it cannot be compared with the other path",
            )
        if node.meta.get("val") is None and target._schema.returns:
            self._refuse(
                node,
                "The path catches an error of a torch operator.",
                "whether an operator fails depends on sizes, and a graph catches nothing",
                "Ask for the size before, instead of catching the error",
            )
        if target._schema.is_mutable:
            self._write(node, target)
            return
        parent = self._aliased(node, target)
        if parent is not None and target in CASTS:
            self.values[node] = parent  # it has that type: torch gives the tensor itself
            return
        args = self._arguments(node, target, viewed=parent)
        if is_random(target, args) and not is_thrown_away(node):
            self._refuse(
                node,
                f"The path draws random numbers ({target}).",
                "two calls of the model differ, so that no graph can equal them",
                "call model.eval() if the model is in training mode, "
                "or pass the random numbers as an argument",
            )
        term = self._without_gradient(self._apply(node, target, args))
        if parent is not None and term.shape is not None:
            self.values[node] = Value(
                parent.base,
                (*parent.views, (node, target, args[1:])),
                term,
                parent.base.version,
                storage_of(example),
            )
        elif term.shape is None:
            self.values[node] = (term, parent, (node, target, args[1:]))
        else:
            self.values[node] = Value(Base(term), (), term, 0, storage_of(example))
            self._link(node, target)

    def _link(self, node: fx.Node, target: Any) -> None:
        """Notes that a copy is its operand itself at other sizes, where its operator may do so."""
        first = node.args[0] if node.args else None
        copy = self.values[node]
        if not isinstance(first, fx.Node) or not target._schema.returns[0].alias_info:
            return
        source = self.values.get(first)
        if not isinstance(source, Value):
            return
        one, other = _type_of(node.meta["val"]), _type_of(first.meta["val"])
        if one[1:] == other[1:]:
            copy.base.perhaps.append(((), source.base, source.views))
            source.base.perhaps.append((source.views, copy.base, ()))

    def _refuse_spoiled(self, base: Base, views: Views) -> None:
        for part, write in base.spoiled:
            if not are_apart(part, views):
                self._refuse(
                    write,
                    "The path writes in place to what is a copy at some sizes and not at others.",
                    "contiguous() and reshape() give the tensor itself where a size of 1 leaves "
                    "nothing to move, and that tensor is read after the write",
                    "Write to x.clone(), or do not write in place",
                )

    def _without_gradient(self, term: Term) -> Term:
        """Detaches what a ``no_grad`` block computes from something that gradients flow through."""
        if term.dtype is None or not term.dtype.is_floating_point or term.op is aten.detach.default:
            return term
        if not any(operand in self.tracked for operand in operands(term)):
            return term
        if self.is_grad_enabled:
            self.tracked.add(term)
            return term
        return self.table.like(term, aten.detach.default, (term,))

    def _aliased(self, node: fx.Node, target: Any) -> Value | None:
        """The first operand's value where the result shares its storage."""
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node) or not isinstance(self.values.get(first), Value):
            return None
        example = node.meta.get("val")
        if isinstance(example, (tuple, list)):
            example = example[0] if example else None
        parent: Value = self.values[first]
        shares = parent.storage is not None and storage_of(example) == parent.storage
        if target is aten.dropout.default and not is_random(target, node.args):
            return parent  # torch gives the tensor itself, its traced twin is a copy
        return parent if shares and len(target._schema.arguments) else None

    def _item(self, node: fx.Node) -> None:
        args: tuple[Any, ...] = node.args
        source, index = args
        several, parent, (producer, target, rest) = self.values[source]
        example = node.meta["val"]
        shape, dtype, device = _type_of(example)
        term = self.table.make("item", (several, index), shape, dtype, device, node.meta.get(LINE))
        if parent is None:
            self.values[node] = Value(Base(term), (), term, 0, storage_of(example))
        else:
            view = (node, ("item", producer, target, index), rest)
            self.values[node] = Value(
                parent.base, (*parent.views, view), term, parent.base.version, parent.storage
            )

    def _apply(self, node: fx.Node, op: Any, args: tuple[Any, ...]) -> Term:
        if isinstance(op, tuple):
            _, producer, target, index = op
            several = self._apply(producer, target, args)
            shape, dtype, device = _type_of(node.meta["val"])
            return self.table.make(
                "item", (several, index), shape, dtype, device, node.meta.get(LINE)
            )
        example = node.meta.get("val")
        line: SourceLine | None = node.meta.get(LINE)
        if op is aten.as_strided.default:
            return self._strided(node, args)
        if isinstance(example, (tuple, list)):
            types = tuple(_type_of(part) for part in example)
            return self.table.make(op, args, None, None, None, line, payload=types)
        return self.table.make(op, args, *_type_of(example), line)

    def _strided(self, node: fx.Node, args: tuple[Any, ...]) -> Term:
        first: Any = node.args[0]
        if self.values[first].base in self.leaves.values() or not is_in_order(first.meta["val"]):
            self._refuse(
                node,
                "The path views a tensor by its layout in memory (as_strided).",
                "its elements lie in another order there than along its axes, or as the caller "
                "laid them out; values that are equal may lie otherwise",
                "Use unfold, slices and reshape; or view what an operator has just computed, "
                "after contiguous()",
            )
        return taken(self.table, args, node.meta.get(LINE))

    def _arguments(
        self, node: fx.Node, target: Any, viewed: Value | None = None
    ) -> tuple[Any, ...]:
        """All arguments by position, with defaults; terms and expressions in place of nodes.

        A tensor that is only viewed is not read yet.
        """
        given = list(node.args)
        full: list[Any] = []
        for place, argument in enumerate(target._schema.arguments):
            if place < len(given):
                value = given[place]
            elif argument.name in node.kwargs:
                value = node.kwargs[argument.name]
            else:
                value = argument.default_value if argument.has_default_value() else None
            if argument.name == "pin_memory":
                value = None
            full.append(self._argument(value, viewed))
        return tuple(full)

    def _argument(self, value: Any, viewed: Value | None = None) -> Any:
        if isinstance(value, fx.Node):
            known = self.values.get(value)
            if isinstance(known, Value):
                return self._read(known, is_viewed=known is viewed)
            return expression(value.meta["val"])
        if isinstance(value, (list, tuple)):
            return tuple(self._argument(part) for part in value)
        return expression(value)

    def _write(self, node: fx.Node, target: Any) -> None:
        written = [
            argument.name
            for argument in target._schema.arguments
            if argument.alias_info and argument.alias_info.is_write
        ]
        name = target._schema.name.removeprefix("aten::")
        destination = node.args[0] if node.args else None
        value = self.values.get(destination) if isinstance(destination, fx.Node) else None
        if written != ["self"] or not name.endswith("_") or not isinstance(value, Value):
            self._refuse(
                node,
                f"The path writes in place with {target}.",
                "this operator has no form without the write",
            )
        args = self._arguments(node, target)
        before = self._read(value)
        if name == "detach_":
            self.values[node] = value
            return
        if changes_axes(target):
            self._turn(node, target, value, args)
            return
        after = self._written(node, name, target, before, args)
        if name == "copy_" and not any(is_part(view) for _, view, _ in value.views):
            # what is written is no other name for what it was copied from
            after = self.table.like(after, aten.clone.default, (after, None))
        self._put(node, value, after)
        self.values[node] = value

    def _turn(self, node: fx.Node, target: Any, value: Value, args: tuple[Any, ...]) -> None:
        """Lets the names of a tensor that is given other axes in place stand for that view."""
        name = target._schema.name.removeprefix("aten::")
        view, names = view_of(target, name), names_of(value, node, self.values.items())
        is_leaf = not value.views and value.base in self.leaves.values()
        if view is None or not names or is_leaf:
            self._refuse(
                node,
                f"The path gives a tensor other axes in place ({target}).",
                "whoever holds that tensor sees it, and the graph has values only",
                f"Use {name.removesuffix('_')}(), which returns another view",
            )
        term = self._apply(node, view, args)
        if args[0] in self.tracked:
            self.tracked.add(term)
        steps = (*value.views, (node, view, args[1:]))
        turned = Value(value.base, steps, term, value.base.version, value.storage)
        self.values |= dict.fromkeys((*names, node), turned)

    def _written(
        self, node: fx.Node, name: str, target: Any, before: Term, args: tuple[Any, ...]
    ) -> Term:
        """The value that a write leaves in the tensor it writes to."""
        line: SourceLine | None = node.meta.get(LINE)
        value = value_written(self.table, name, before, args, line)
        if value is not None:
            return value
        functional = without_the_write(target, name)
        seeded = torch.Tag.nondeterministic_seeded in target.tags
        if is_random(functional, args) if functional is not None else seeded:
            self._refuse(
                node, f"The path draws random numbers ({target}).", "two calls of the model differ"
            )
        if functional is None:
            self._refuse(
                node,
                f"The path writes in place with {target}.",
                "this operator has no form without the write",
            )
        dtype = dtype_of(functional, args, before)
        after = self.table.make(functional, args, before.shape, dtype, before.device, line)
        return as_place(self.table, after, before)

    def _put(self, node: fx.Node, value: Value, after: Term) -> None:
        """Writes ``after`` through the chain of views into the base."""
        terms = [value.base.term]
        for view, op, args in value.views:
            assert view is not None
            terms.append(self._apply(view, op, (terms[-1], *args)))
        for place in range(len(value.views) - 1, -1, -1):
            _, op, args = value.views[place]
            viewed, index = op[2:] if isinstance(op, tuple) else (op, None)
            changed = put_back(viewed, self.table, terms[place], after, args, index)
            if changed is None:
                self._refuse(
                    node,
                    f"The path writes in place through the view {op}.",
                    "this view cannot be written back",
                )
            after = changed
        value.base.term = after
        value.base.version += 1
        value.term = None
        spoil(value.base, value.views, node)

    def _refuse(self, node: fx.Node, what: str, why: str, remedy: str = "") -> NoReturn:
        raise CaptureError(Refusal(what, why=why, remedy=remedy, where=node.meta.get(LINE)))


def _is_write(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def _type_of(example: Any) -> tuple[tuple[Any, ...], torch.dtype, torch.device]:
    return tuple(expression(size) for size in example.shape), example.dtype, example.device


def _reads_values(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target in (
        aten._local_scalar_dense.default,
        aten.item.default,
    )
