"""The assertions of the whole suite: equal calls, and nothing left on a model or the process."""

from __future__ import annotations

import builtins
import hashlib
import logging
import random
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    import cachefree

    from .models import ModelCase, RefusalCase

GRID: tuple[tuple[int, tuple[int, ...]], ...] = (
    (1, (1, 1, 1, 4, 1)),
    (1, (6, 1, 3)),
    (2, (2, 1, 1, 5)),
    (2, (4, 7, 1)),
    (3, (1, 8, 1, 2)),
    (3, (13, 1, 9, 1, 1)),
)
"""Batch, then the lengths of the first call and of each later one: past 0, 1 and many."""


def equal_calls(
    case: ModelCase | RefusalCase,
    model: nn.Module,
    rewritten: Callable[..., Any],
    *,
    grid: tuple[tuple[int, tuple[int, ...]], ...] = GRID,
    may_raise: type[Exception] | tuple[type[Exception], ...] = (),
) -> int:
    """Both give the same, call after call, each fed with its own cache.

    A later call that the model takes one token at a time gets one. `may_raise` is what the
    rewritten model may answer instead, which ends that row of the grid.

    Returns:
      How many calls were compared.
    """
    compared = 0
    for batch, lengths in grid:
        past, theirs, mine = 0, None, None
        for length in lengths:
            query = length if _is_inside(case, batch, past, length) else 1
            where = f"batch {batch}, past {past}, query {query}"
            theirs = _called(case, model, theirs, batch, past, query)
            try:
                mine = _called(case, rewritten, mine, batch, past, query)
            except may_raise:
                break
            same(mine, theirs, where)
            compared += 1
            past += query
    return compared


def _is_inside(case: ModelCase | RefusalCase, batch: int, past: int, query: int) -> bool:
    domain = getattr(case, "domain", None)
    return domain is None or domain(batch, past, query)


def _called(
    case: ModelCase | RefusalCase,
    function: Callable[..., Any],
    outputs: Any,
    batch: int,
    past: int,
    query: int,
) -> Any:
    generator = torch.Generator().manual_seed(7)
    assert case.prefill is not None
    assert case.step is not None
    if past == 0:
        call = case.prefill(batch, query, generator)
    else:
        call = case.step(outputs, batch, past, query, generator)
    args, kwargs = map_tensors(_like_parameters(function, case), call)
    with torch.no_grad():
        return function(*args, **kwargs)


def _like_parameters(
    function: Callable[..., Any], case: ModelCase | RefusalCase
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Inputs on the case's device, and in float64 where the model was made so."""
    parameters = list(function.parameters()) if isinstance(function, nn.Module) else []
    is_double = bool(parameters) and all(
        p.dtype == torch.float64 for p in parameters if p.is_floating_point()
    )
    device = getattr(case, "device", "cpu")

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor if tensor.device.type == device else tensor.to(device)
        return tensor.double() if is_double and tensor.is_floating_point() else tensor

    return convert


def same(actual: Any, expected: Any, where: str = "", path: str = "the result") -> None:
    """Two results of the same classes, with equal tensors by the tolerance of their dtype."""
    place = f"{path}, {where}" if where else path
    assert type(actual) is type(expected), f"{place}: {type(actual)}, not {type(expected)}"
    if isinstance(expected, torch.Tensor):
        assert actual.device == expected.device, place
        assert actual.shape == expected.shape, f"{place}: {actual.shape}, not {expected.shape}"
        assert actual.dtype == expected.dtype, f"{place}: {actual.dtype}, not {expected.dtype}"
        if expected.device.type != "meta":
            torch.testing.assert_close(
                actual, expected, equal_nan=True, msg=lambda text: f"{place}: {text}"
            )
        return
    if isinstance(expected, (tuple, list)):
        assert len(actual) == len(expected), f"{place}: {len(actual)} entries, not {len(expected)}"
        for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
            same(one, other, where, f"{path}[{index}]")
        return
    if isinstance(expected, Mapping):
        assert list(actual) == list(expected), f"{place}: keys {list(actual)}"
        for key in expected:
            same(actual[key], expected[key], where, f"{path}[{key!r}]")
    if hasattr(expected, "__dict__") and not isinstance(expected, (nn.Module, type)):
        assert vars(actual).keys() == vars(expected).keys(), f"{place}: {vars(actual).keys()}"
        for name in vars(expected):
            same(getattr(actual, name), getattr(expected, name), where, f"{path}.{name}")
    elif not isinstance(expected, Mapping):
        assert actual == expected, f"{place}: {actual!r}, not {expected!r}"


def map_tensors(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """`value` with each tensor changed, in containers of its own classes."""

    def within(child: Any) -> Any:
        return map_tensors(change, child)

    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(within, value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(within, value))
    if isinstance(value, dict):
        return type(value)((key, within(child)) for key, child in value.items())
    if hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)):
        clone = type(value).__new__(type(value))
        clone.__dict__.update({name: within(child) for name, child in vars(value).items()})
        return clone
    return value


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors inside, in order."""
    found: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    map_tensors(keep, value)
    return found


def graph_is_plain(graph_module: torch.fx.GraphModule) -> None:
    """Flat tensors, operators of torch, no `None` among the outputs, no `-1` in a view."""
    aten = torch.ops.aten
    views = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
    for node in graph_module.graph.nodes:
        if node.op == "output":
            assert isinstance(node.args[0], tuple)
            assert all(isinstance(result, torch.fx.Node) for result in node.args[0])
        elif node.op == "call_function":
            assert not isinstance(node.target, torch._ops.HigherOrderOperator), node.target
            if node.target in views:
                assert -1 not in node.args[1], f"{node} has a size that is to be guessed"
        else:
            assert node.op in ("placeholder", "get_attr", "call_method"), node.format_node()
            assert node.op != "call_method" or node.target == "size", node.format_node()


def says_what_to_do(error: cachefree.CacheFreeError) -> None:
    """A message that says what, why or where, and what to do."""
    for refusal in error.refusals:
        assert refusal.what, error
        assert refusal.what[-1] in ".:", f"no sentence: {refusal.what}"
        assert refusal.why or refusal.where, f"neither why nor where:\n{refusal}"
        assert refusal.remedy, f"nothing to do:\n{refusal}"


class Unchanged:
    """What a model and the process were, to be asserted again after whatever was done."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = self._now()

    def check(self) -> None:
        """Asserts that all is as it was, and names the first thing that is not."""
        after = self._now()
        for name, value in self.before.items():
            assert name in after, f"{name} is gone"
            assert after[name] == value, f"{name} was {value}, and is {after[name]}"
        assert after.keys() == self.before.keys(), f"new: {after.keys() - self.before.keys()}"

    def _now(self) -> dict[str, Any]:
        found = _process()
        found["int"] = ["int" in vars(home) for home in _homes(self.model)]
        for name, module in self.model.named_modules():
            for attribute, value in vars(module).items():
                found[f"{name}.{attribute}"] = _described(value)
        return found


def _homes(model: nn.Module) -> list[Any]:
    """The files of the model's classes, whose builtins are their own."""
    names = {type(module).__module__ for module in model.modules()}
    return [sys.modules[name] for name in sorted(names) if name in sys.modules]


def _process() -> dict[str, Any]:
    modules = torch.nn.modules.module
    return {
        "builtins": (builtins.min, builtins.max, builtins.len, builtins.sum, builtins.abs),
        "attention": F.scaled_dot_product_attention,
        "random state": hash(random.getstate()),
        "torch's random state": _bits(torch.random.get_rng_state()),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "compiler stance": repr(torch._dynamo.eval_frame._stance),
        "warning filters": list(warnings.filters),
        "trace function": sys.gettrace(),
        "threads": threading.active_count(),
        "global hooks": tuple(
            len(getattr(modules, name)) for name in vars(modules) if name.startswith("_global_")
            and isinstance(getattr(modules, name), dict)
        ),
        "log filters": tuple(
            tuple(logging.getLogger(name).filters)
            for name in ("torch", "torch._subclasses.fake_tensor", "torch.fx.experimental")
        ),
    }  # fmt: skip


def _described(value: Any) -> Any:
    """What can be compared later: a tensor's identity and bits, a container's entries."""
    if isinstance(value, torch.Tensor):
        return (id(value), type(value), value.dtype, value.requires_grad, _bits(value))
    if isinstance(value, Mapping):
        return (id(value), {key: _described(part) for key, part in value.items()})
    if isinstance(value, (list, tuple, deque)):
        return (id(value), [_described(part) for part in value])
    return (id(value), repr(value) if isinstance(value, (int, float, str, set)) else "")


def _bits(tensor: torch.Tensor) -> str:
    if tensor.is_meta or tensor.is_quantized or tensor.layout is not torch.strided:
        return ""
    raw = tensor.detach().cpu().contiguous().view(-1)
    return hashlib.sha256(raw.view(torch.uint8).numpy().tobytes()).hexdigest()
