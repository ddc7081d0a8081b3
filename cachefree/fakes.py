"""Fake tensors: what is computed of weights alone is not computed either, and ``type`` is blind."""

from __future__ import annotations

import ast
import contextlib
import functools
import linecache
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["WeightsAsFakes", "fakes_by_type"]


class WeightsAsFakes(TorchDispatchMode):
    """Gives an operator whose operands are all real their fake twins.

    ``FakeTensorMode`` runs such an operator for real: it would scale a weight, or write to a
    buffer. One tensor has one twin, so that what is written to it is read from it.

    Args:
        mode: The mode below.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mode = mode

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _LIFTS:
            return func(*args, **(kwargs or {}))
        leaves, structure = tree_flatten((args, kwargs or {}))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            leaves = [
                self._twin(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves
            ]
            args, kwargs = tree_unflatten(leaves, structure)
        return func(*args, **(kwargs or {}))

    def _twin(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.mode.from_tensor(tensor, static_shapes=True)


_LIFTS = (  # a tensor of numbers in the code: torch keeps the numbers beside its fake twin
    torch.ops.aten.lift_fresh.default,
    torch.ops.aten.lift_fresh_copy.default,
    torch.ops.aten.lift.default,
)


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
