"""Calls of torch functions that are alike: one is computed on fake tensors, the others are copied.

What a function of torch makes of fake tensors depends on their sizes, strides and dtypes, on its
other arguments and on torch's settings. Where all are as in an earlier call, as in the blocks of a
deep model, the nodes of that call are written once more, with the operands of this one. The code
of the model runs for every block: what it asks, and where, is heard.

Not copied: what asks a question in the user's name, writes, draws random numbers, depends on
values, or runs in a loop over tokens. A copy has no history of gradients, and is not told what is
written to its memory through another tensor: a run that needs either is repeated without copies.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, WrapperDescriptorType
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import no_python_dispatcher
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager
from torch.fx.experimental.proxy_tensor import _ProxyTensor, get_proxy_mode
from torch.fx.node import map_arg
from torch.overrides import TorchFunctionMode

from cachefree.fakes import WeightsAsFakes, is_unfit
from cachefree.sizes import TORCH, SizeEnvironment

__all__ = ["AlikeCalls"]


@dataclass(frozen=True)
class _Tensor:
    """A tensor that a call made.

    Attributes:
        layout: Its sizes, its strides, and where it begins in its memory.
        dtype: Its dtype.
        device: The device that it stands for.
        memory: Whose memory it has: an operand's place, or -1 - n for the n-th new one.
    """

    layout: tuple[Any, Any, Any]
    dtype: torch.dtype
    device: torch.device
    memory: int


@dataclass(frozen=True)
class _Made:
    """What a call made.

    Attributes:
        operands: The nodes of its operands: node → place.
        nodes: The nodes that it made, in order, and what they give: tensors, or lists of them.
        results: The tensors that it returned, or an operand's place; and their nodes.
        rebuild: Makes what was returned of a list of tensors.
    """

    operands: dict[fx.Node, int]
    nodes: tuple[tuple[fx.Node, Any], ...]
    results: tuple[tuple[_Tensor | int, fx.Node | None], ...]
    rebuild: Callable[[list[torch.Tensor]], Any]


@dataclass
class _Memories:
    """The memories of a call's tensors.

    Attributes:
        places: What tells a memory → the operand's place, or -1 - n for the n-th new one.
        of_weights: The places of operands that are the model's own.
        dtypes: As what each memory is read: another dtype is a view that strides do not tell.
    """

    places: dict[int, int]
    of_weights: set[int]
    dtypes: dict[int, torch.dtype]

    def described(self, value: Any) -> _Tensor | None:
        """A fake tensor; None for what is not to be copied."""
        if type(value) is not FakeTensor or value.constant is not None or not _is_dense(value):
            return None
        memory = self.places.setdefault(_memory(value), -1 - len(self.places))
        dtype = self.dtypes.setdefault(memory, value.dtype)
        if memory in self.of_weights or dtype is not value.dtype:
            return None
        layout = (value.shape, value.stride(), value.storage_offset())
        return _Tensor(layout, value.dtype, value.fake_device, memory)

    def all_described(self, value: Any) -> Any:
        """What a node gives: a tensor, or a list of them."""
        if not isinstance(value, (tuple, list)):
            return self.described(value)
        parts = [self.described(part) for part in value]
        return None if None in parts else parts


class AlikeCalls(TorchFunctionMode):
    """Copies calls of torch functions that are like earlier ones of the same run.

    Args:
        weights: The mode of the run that sees every operator.
        environment: The sizes, where they are symbols.

    Attributes:
        copied: How many calls were copies.
        is_spoiled: Whether something was written to memory that a copy shares.
    """

    def __init__(self, weights: WeightsAsFakes, environment: SizeEnvironment | None = None) -> None:
        super().__init__()
        self.weights = weights
        self.environment = environment
        self.copied = 0
        self.is_spoiled = False
        self._made: dict[Any, _Made | None] = {}
        self._no_tensors: set[Any] = set()
        self._shared: dict[int, torch.Tensor] = {}
        self._unfit = 0
        self._modes = -1
        self._tracer: Any = None

    def __enter__(self) -> AlikeCalls:
        proxy_mode = get_proxy_mode()
        self._tracer = None if proxy_mode is None else proxy_mode.tracer
        self._modes = torch._C._len_torch_dispatch_stack()
        self.weights.heard = self._heard
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self.weights.heard = None
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._no_tensors or not _is_of_torch(func) or not self._is_plain():
            return func(*args, **kwargs)
        operands: list[torch.Tensor] = []
        with torch._C.DisableTorchFunction():
            described = self._described((args, kwargs), operands)
        if described is None:
            return func(*args, **kwargs)
        key = (func, described, self._settings())
        made = self._made.get(key)
        if made is not None:
            self.copied += 1
            with torch._C.DisableTorchFunction():
                return self._copy(made, operands)
        if key in self._made:
            return func(*args, **kwargs)
        return self._first(key, args, kwargs, operands)

    def _is_plain(self) -> bool:
        """Whether nothing stands between a call and the tracer that was not there at first."""
        loops = None if self.environment is None else self.environment.loops
        return (
            (loops is None or loops.active is None)
            and torch._C._len_torch_dispatch_stack() == self._modes
            and not torch._C._is_any_autocast_enabled()
            and torch._C._functorch.peek_interpreter_stack() is None
        )

    def _settings(self) -> tuple[Any, ...]:
        return (
            0 if self.environment is None else len(self.environment.replacements),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_default_dtype(),
            torch._C._get_flash_sdp_enabled(),
            torch._C._get_mem_efficient_sdp_enabled(),
            torch._C._get_math_sdp_enabled(),
            torch._C._get_cudnn_sdp_enabled(),
        )

    def _heard(self, func: Any, args: tuple[Any, ...]) -> None:
        """Hears operators that are not to be copied, and what they write to."""
        self._unfit += 1
        if self._shared and isinstance(func, OpOverload) and func._schema.is_mutable:
            with torch._C.DisableTorchFunction():
                tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
                self.is_spoiled |= any(_memory(tensor) in self._shared for tensor in tensors)

    def _described(self, value: Any, operands: list[torch.Tensor]) -> Any:
        """What tells arguments apart; None where a call with them is not to be copied."""
        kind = type(value)
        if kind is FakeTensor or kind is torch.nn.Parameter or kind is torch.Tensor:
            return self._tensor_described(value, operands)
        if kind in _PLAIN:
            return kind, value
        if kind is torch.SymInt or kind is torch.SymFloat:
            return kind, value.node.expr
        if kind in (tuple, list, torch.Size):
            parts = [self._described(part, operands) for part in value]
        elif kind is dict:
            parts = [self._described(pair, operands) for pair in value.items()]
        elif kind is slice:
            bounds = (value.start, value.stop, value.step)
            parts = [self._described(bound, operands) for bound in bounds]
        elif kind is float:
            return kind, value.hex()
        else:
            return None
        return None if None in parts else (kind, *parts)

    def _tensor_described(self, tensor: torch.Tensor, operands: list[torch.Tensor]) -> Any:
        for place, other in enumerate(operands):
            if other is tensor:
                return torch.Tensor, place
        if not _is_dense(tensor):
            return None
        if isinstance(tensor, FakeTensor) and tensor.fake_mode is self.weights.mode:
            if tensor.constant is not None or not self._is_traced(tensor):
                return None
            device = tensor.fake_device
        elif isinstance(tensor, torch.nn.Parameter):
            device = tensor.device
        else:
            return None
        operands.append(tensor)
        return (
            type(tensor),
            tensor.dtype,
            device,
            *map(_size, tensor.shape),
            *map(_size, tensor.stride()),
            _size(tensor.storage_offset()),
        )

    def _is_traced(self, tensor: torch.Tensor) -> bool:
        """Whether the tracer knows which node a tensor is, and no values of it."""
        if self._tracer is None:
            return True
        known = self._tracer.tensor_tracker.get(tensor)
        return known is not None and known.constant is None

    def _count(self) -> tuple[int, int]:
        """How many operators are not to be copied, and how many questions were asked, so far."""
        return self._unfit, 0 if self.environment is None else self.environment.asked_by_code

    def _first(self, key: Any, args: Any, kwargs: Any, operands: list[torch.Tensor]) -> Any:
        """A call that is like none before."""
        tracer = self._tracer
        last = None if tracer is None else tracer.graph._root._prev
        nodes = {} if tracer is None else self._nodes_of(operands)  # the call may change them
        before = self._count()
        result = key[0](*args, **kwargs)
        is_fit = self._count() == before and key[2] == self._settings()
        leaves, rebuild = _taken_apart(result)
        if not leaves:
            self._no_tensors.add(key[0])
        with torch._C.DisableTorchFunction():
            made = self._noted(leaves, rebuild, operands, nodes, last) if is_fit else None
        self._made[key] = made
        return result

    def _nodes_of(self, operands: Sequence[torch.Tensor]) -> dict[fx.Node, int]:
        found = [self._tracer.tensor_tracker.get(operand) for operand in operands]
        return {known.proxy.node: k for k, known in enumerate(found) if known is not None}

    def _noted(
        self,
        leaves: Sequence[Any],
        rebuild: Any,
        operands: Sequence[torch.Tensor],
        nodes: dict[fx.Node, int],
        last: fx.Node | None,
    ) -> _Made | None:
        """What a call made; None where it is not to be copied."""
        memories = _Memories(
            {
                _memory(fake): k
                for k, o in enumerate(operands)
                if (fake := self._fake(o)) is not None
            },
            {k for k, operand in enumerate(operands) if not isinstance(operand, FakeTensor)},
            {k: operand.dtype for k, operand in enumerate(operands)},
        )
        known = dict(nodes)
        steps = [] if last is None else self._steps(last, operands, known, memories)
        if not leaves or steps is None:
            return None
        made = {node for node, _ in steps}
        results: list[tuple[_Tensor | int, fx.Node | None]] = []
        for leaf in leaves:
            place = next((k for k, operand in enumerate(operands) if operand is leaf), None)
            result = memories.described(leaf) if place is None else place
            traced = None if last is None else self._tracer.tensor_tracker.get(leaf)
            node = None if traced is None else traced.proxy.node
            if result is None or (last is not None and node not in made):
                return None
            results.append((result, node))
        return _Made(known, tuple(steps), tuple(results), rebuild)

    def _steps(
        self,
        last: fx.Node,
        operands: Sequence[torch.Tensor],
        known: dict[fx.Node, int],
        memories: _Memories,
    ) -> list[tuple[fx.Node, Any]] | None:
        """The nodes after the last one; None where they are not to be copied."""
        steps: dict[fx.Node, Any] = {}
        node = last._next
        while node.op != "root":
            value = node.meta.get("val")
            if node.op == "get_attr":
                attribute = getattr(self._tracer.root, str(node.target))
                place = next((k for k, o in enumerate(operands) if o is attribute), None)
                if place is None:
                    return None
                known[node] = place
            elif not isinstance(value, _SIZES):  # a size is computed once
                described = memories.all_described(value)
                is_known = all(
                    operand in steps or operand in known or _is_size(operand)
                    for operand in node.all_input_nodes
                )
                if described is None or not is_known or not _is_fit(node):
                    return None
                steps[node] = described
            node = node._next
        return list(steps.items())

    def _fake(self, operand: torch.Tensor) -> torch.Tensor | None:
        """The fake tensor of an operand; None for a parameter that no operator was given."""
        if isinstance(operand, FakeTensor):
            return operand
        pair = self.weights.twins.get(id(operand))
        return None if pair is None else pair[1]

    def _copy(self, made: _Made, operands: Sequence[torch.Tensor]) -> Any:
        """Writes the nodes of a call once more, with other operands."""
        tracer = self._tracer
        mode = self.weights.mode
        symbols = mode.shape_env
        bases: dict[int, torch.Tensor] = {}

        def tensor(of: _Tensor) -> torch.Tensor:
            base = operands[of.memory] if of.memory >= 0 else bases.get(of.memory)
            if base is None:
                base = torch.empty(_ROOM, dtype=of.dtype, device="meta")
                bases[of.memory] = base
            elem = torch.ops.aten.as_strided.default(base, *of.layout)
            return FakeTensor(mode, elem, of.device)

        with (
            torch._C._ExcludeDispatchKeyGuard(_PRE_DISPATCH),
            torch._C._AutoDispatchBelowAutograd(),
            no_python_dispatcher(),
            in_kernel_invocation_manager(mode),
            contextlib.nullcontext() if symbols is None else symbols.suppress_guards(),
        ):  # on what fake tensors are made of, unheard
            values = [_map_tensors(value, tensor) for _, value in made.nodes]
            tensors = [
                operands[result] if isinstance(result, int) else tensor(result)
                for result, _ in made.results
            ]
        for result, _ in made.results:
            if isinstance(result, _Tensor):
                self._share(result, operands, tensors)
        if tracer is None:
            return made.rebuild(tensors)
        written: dict[fx.Node, Any] = {}

        def operand_of(node: fx.Node) -> Any:
            if node in written:
                return written[node]
            place = made.operands.get(node)
            if place is None:
                return node
            known = tracer.tensor_tracker.get(operands[place])
            if known is not None:
                return known.proxy.node
            return tracer.create_arg(operands[place])

        for (node, _), value in zip(made.nodes, values, strict=True):
            new = tracer.create_node(
                "call_function",
                node.target,
                map_arg(node.args, operand_of),
                map_arg(node.kwargs, operand_of),
                _name(tracer, node.target),
            )
            new.meta["val"] = value
            written[node] = new
        for (_, last), given in zip(made.results, tensors, strict=True):
            assert last is not None
            tracer.tensor_tracker[given] = _ProxyTensor(tracer.proxy(written[last]), None)
        return made.rebuild(tensors)

    def _share(
        self, result: _Tensor, operands: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]
    ) -> None:
        """Notes memory that a copy shares with another tensor of the run."""
        if result.memory >= 0:
            shared = operands[result.memory]
            self._shared[_memory(shared)] = shared
        elif len(tensors) > 1:
            self._shared.update((_memory(other), other) for other in tensors)


_PLAIN = (
    int,
    bool,
    str,
    type(None),
    type(Ellipsis),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
_SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool)
_ROOM = 2**40  # as_strided asks whether there is room in the memory


_PRE_DISPATCH = torch._C.DispatchKeySet(torch._C.DispatchKey.PreDispatch)


@functools.lru_cache(maxsize=4096)
def _is_of_torch(func: Any) -> bool:
    """Whether a function is one of torch's own, which computes what its arguments say."""
    name = getattr(func, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return False
    if isinstance(func, (OpOverload, OpOverloadPacket)):
        return str(func).startswith("aten.")
    if isinstance(func, FunctionType):
        return func.__code__.co_filename.startswith(TORCH)
    return isinstance(func, (BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType))


def _is_fit(node: fx.Node) -> bool:
    """Whether a node computes, and does nothing else."""
    if node.op != "call_function":
        return False
    target = node.target
    return target is operator.getitem or (isinstance(target, OpOverload) and not is_unfit(target))


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), _SIZES)


def _size(size: Any) -> Any:
    return size if type(size) is int else size.node.expr


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_conj() and not tensor.is_neg()


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _taken_apart(result: Any) -> tuple[list[Any], Any]:
    """The tensors that a call returned, and what makes such a result of others."""
    if isinstance(result, torch.Tensor):
        return [result], operator.itemgetter(0)
    is_plain = type(result) in (tuple, list) or type(result).__module__ == "torch.return_types"
    if is_plain and all(isinstance(part, torch.Tensor) for part in result):
        return list(result), type(result)
    return [], None


def _map_tensors(value: Any, make: Callable[[_Tensor], torch.Tensor]) -> Any:
    return [make(part) for part in value] if isinstance(value, list) else make(value)


@functools.lru_cache(maxsize=4096)
def _packet_name(target: Any) -> str:
    return str(target.overloadpacket.__name__)


def _name(tracer: Any, target: Any) -> str | None:
    if not isinstance(target, OpOverload):
        return None
    return str(tracer.graph._target_to_str(_packet_name(target)))
