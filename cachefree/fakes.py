"""Fake tensors: what is computed of weights alone is not computed either, and ``type`` is blind.

Weights without values, on the meta device or fake already, count as weights on the device of the
others, the CPU where there are none: a table of positions that is real, or ``torch.arange(n)``,
goes with them as it will once they are loaded.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import linecache
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from cachefree.looked_up import once

__all__ = [
    "OnOneDevice",
    "WeightsAsFakes",
    "device_of",
    "fakes_by_type",
    "has_no_values",
    "is_unfit",
    "weights_as_fakes",
]


class WeightsAsFakes(TorchDispatchMode):
    """Gives an operator whose operands are all real their fake twins.

    ``FakeTensorMode`` runs such an operator for real: it would scale a weight, or write to a
    buffer. One tensor has one twin, so that what is written to it is read from it.

    Args:
        mode: The mode below.
        device: Where weights without values are taken to be.

    Attributes:
        is_written: Whether an operator that writes was given a parameter.
        heard: Called with operators that write or depend on values, and their arguments.
    """

    def __init__(self, mode: FakeTensorMode, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mode = mode
        self.device = device
        self.twins: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.is_written = False
        self.heard: Callable[[Any, tuple[Any, ...]], None] | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: torch would wrap each call in a guard against its compiler, which never runs."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.heard is not None and is_unfit(func):
            self.heard(func, args)
        if func is _DEVICE and self._is_fake(args[0]) and not self.mode.in_kernel_invocation:
            return args[0].fake_device
        if func in _LIFTS or (not kwargs and self._all_fake(args)):
            return func(*args, **(kwargs or {}))
        leaves, structure = tree_flatten((args, kwargs or {}))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        is_real = bool(tensors) and not any(self._is_fake(tensor) for tensor in tensors)
        is_whole = is_real and torch.is_inference_mode_enabled() and isinstance(func, OpOverload)
        if is_whole:  # without autograd nobody took it apart
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:  # it may be the operand itself
                return result
        if is_real or any(self._has_twin(tensor) for tensor in tensors):
            self.is_written |= func._schema.is_mutable
            leaves = [
                self.twin(leaf)
                if isinstance(leaf, torch.Tensor) and (is_real or self._has_twin(leaf))
                else leaf
                for leaf in leaves
            ]
            args, kwargs = tree_unflatten(leaves, structure)
        return func(*args, **(kwargs or {}))

    def _all_fake(self, args: tuple[Any, ...]) -> bool:
        """Whether all operands are, as they mostly are; False where there are lists of them."""
        has_fake = False
        for arg in args:
            if isinstance(arg, torch.Tensor):
                if not self._is_fake(arg):
                    return False
                has_fake = True
            elif isinstance(arg, (list, tuple)) and any(isinstance(a, torch.Tensor) for a in arg):
                return False
        return has_fake

    def _is_fake(self, tensor: torch.Tensor) -> bool:
        return isinstance(tensor, FakeTensor) and tensor.fake_mode is self.mode

    def _has_twin(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a parameter, or has no values."""
        return not self._is_fake(tensor) and (
            isinstance(tensor, torch.nn.Parameter) or has_no_values(tensor)
        )

    def twin(self, tensor: torch.Tensor) -> torch.Tensor:
        """The fake tensor that stands for a tensor of the model."""
        if self._is_fake(tensor):
            return tensor
        is_unvalued = has_no_values(tensor)
        if not is_unvalued and not isinstance(tensor, torch.nn.Parameter):
            return self.mode.from_tensor(tensor, static_shapes=True)
        if id(tensor) not in self.twins:
            if is_unvalued:
                twin = self._with_values(tensor)
            else:
                twin = self.mode.from_tensor(tensor, static_shapes=True)
            self.twins[id(tensor)] = (tensor, twin)
        return self.twins[id(tensor)][1]

    @property
    def is_current(self) -> bool:
        """Whether each twin still is as its tensor is."""
        return not self.is_written and all(_are_alike(*pair) for pair in self.twins.values())

    def _with_values(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake tensor as one without values will be once they are loaded."""
        with self.mode:
            twin = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device
            )
        return twin.requires_grad_(tensor.requires_grad)


def _are_alike(tensor: torch.Tensor, twin: torch.Tensor) -> bool:
    return (
        tensor.shape == twin.shape
        and tensor.dtype == twin.dtype
        and tensor.stride() == twin.stride()
        and tensor.requires_grad == twin.requires_grad
    )


class OnOneDevice(TorchFunctionMode):
    """Reads the meta device in a call of torch as the one of `WeightsAsFakes`.

    Args:
        device: Where weights without values are taken to be.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(map(_is_meta, args)):
            args = tuple(self.device if _is_meta(arg) else arg for arg in args)
        where = kwargs.get("device")
        if where is not None and torch.device(where).type == "meta":
            kwargs = {**kwargs, "device": self.device}
        return func(*args, **kwargs)


def _is_meta(value: Any) -> bool:
    return isinstance(value, torch.device) and value.type == "meta"


def has_no_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor is on the meta device, or fake."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def device_of(model: torch.nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer that is on one; else the CPU."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != "meta":  # a fake tensor says where it stands for one
            return tensor.device
    return torch.device("cpu")


_DEVICE = torch.ops.prim.device.default


@functools.lru_cache(maxsize=4096)
def is_unfit(func: Any) -> bool:
    """Whether an operator writes, or gives what depends on values."""
    if not isinstance(func, OpOverload):
        return True
    return func._schema.is_mutable or not _ODD.isdisjoint(func.tags)


_ODD = {
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
}
_LIFTS = (  # a tensor of numbers in the code: torch keeps the numbers beside its fake twin
    torch.ops.aten.lift_fresh.default,
    torch.ops.aten.lift_fresh_copy.default,
    torch.ops.aten.lift.default,
)


@once
def _left_of(model: torch.nn.Module) -> list[WeightsAsFakes]:
    """What earlier runs of a model have made, if no run has it now."""
    return []


@contextlib.contextmanager
def weights_as_fakes(model: torch.nn.Module) -> Iterator[WeightsAsFakes]:
    """The modes for a run of fixed sizes, with the twins of parameters that earlier runs have made.

    A run that writes to a parameter leaves nothing: its twin may have another size by now.

    Args:
        model: The model that is run.
    """
    left = _left_of(model)
    weights = left.pop() if left else None
    if weights is None or not weights.is_current:
        weights = WeightsAsFakes(FakeTensorMode(allow_non_fake_inputs=True), device_of(model))
    with weights.mode, weights:
        yield weights
    left.append(weights)


@contextlib.contextmanager
def fakes_by_type(model: torch.nn.Module) -> Iterator[None]:
    """Lets ``type(x) is torch.Tensor`` hold of fake tensors, and ``type(n) is int`` of sizes.

    In the files that define the model's classes, where they call ``type`` and do nothing else with
    it.
    """
    homes = {sys.modules.get(type(module).__module__) for module in model.modules()}
    changed = [
        home
        for home in homes
        if home is not None
        and home.__name__.split(".")[0] not in ("torch", "builtins")
        and "type" not in vars(home)
        and _only_asks(getattr(home, "__file__", None) or "")
    ]
    for home in changed:
        home.type = _type_of  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for home in changed:
            vars(home).pop("type", None)


def _type_of(value: Any) -> type:
    if isinstance(value, FakeTensor) and not isinstance(value, torch.nn.Parameter):
        return torch.Tensor
    return int if isinstance(value, torch.SymInt) else type(value)


@functools.lru_cache(maxsize=256)
def _only_asks(file: str) -> bool:
    """Whether a file calls ``type`` with one argument, and else annotates with it only."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return False
    asked = {
        id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call) and _has_one(node)
    }
    asked |= {id(part) for note in _annotations(tree) for part in ast.walk(note)}
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "type"]
    return bool(uses) and all(id(node) in asked for node in uses)


def _annotations(tree: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        found = getattr(node, "returns", None) or getattr(node, "annotation", None)
        if isinstance(found, ast.expr):
            yield found


def _has_one(call: ast.Call) -> bool:
    return len(call.args) == 1 and not call.keywords
