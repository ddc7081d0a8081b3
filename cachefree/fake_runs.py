"""Runs of a model on fake tensors of fixed sizes: no weight is read, no operator computes."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.jit._fuser import optimized_execution

from cachefree.alike import AlikeCalls
from cachefree.calls import Call, TensorSpec
from cachefree.explaining import silenced
from cachefree.faithful import CallLog
from cachefree.fakes import OnOneDevice, device_of, fakes_by_type, weights_as_fakes
from cachefree.isolation import untouched
from cachefree.known_values import KnownValues
from cachefree.sizes import size_symbol
from cachefree.stand_ins import StandIns
from cachefree.structure import Structure, flatten
from cachefree.value_questions import ANSWERS, Answering

__all__ = [
    "for_inference",
    "marks_on",
    "negated",
    "of_one_row",
    "quiet",
    "run_on_fakes",
    "scattered",
    "tracked",
]


def run_on_fakes(
    model: torch.nn.Module,
    call: Call,
    sizes: Mapping[str, int],
    log_calls: CallLog | None = None,
    *,
    made: Callable[..., torch.Tensor] = torch.empty,
    seen: Callable[[list[Any], Any, Any, Any], None] | None = None,
) -> tuple[list[Any], Structure]:
    """Runs a call once on fake tensors of fixed sizes, tracing nothing.

    Args:
        model: Any module.
        call: How to call it.
        sizes: The size of each symbol.
        log_calls: Where to write the calls of torch functions down.
        made: Makes an input of its sizes: `scattered`, `of_one_row`, `negated`, `tracked`,
            `for_inference`.
        seen: Looks at the inputs' leaves, the arguments and the result after the call.

    Returns:
        The leaves of the result (fake tensors and Python values) and its structure.

    Raises:
        Exception: whatever the model raises.
    """
    values = {size_symbol(name): size for name, size in sizes.items()}

    def fixed(expr: Any) -> int:
        return int(expr.subs(values)) if hasattr(expr, "subs") else int(expr)

    with untouched(model), quiet(model), weights_as_fakes(model) as weights, torch.no_grad():
        leaves = [
            made([fixed(size) for size in leaf.shape], dtype=leaf.dtype, device=leaf.device)
            if isinstance(leaf, TensorSpec)
            else fixed(leaf.expr)
            for leaf in call.leaves
        ]
        args, kwargs = call.structure.rebuild(leaves)
        given = [
            (leaf.path, value)
            for leaf, value in zip(call.leaves, leaves, strict=True)
            if isinstance(leaf, TensorSpec) and isinstance(value, torch.Tensor)
        ]
        if log_calls is not None:
            log_calls.given(given)
        known = None if ANSWERS.of_sizes is None else KnownValues()
        answering = Answering(given, None if known is None else known.number)
        nothing: Any = contextlib.nullcontext()
        is_plain = known is None and made is torch.empty
        copies = AlikeCalls(weights) if is_plain else nothing
        with known or nothing, copies, StandIns(), answering, log_calls or nothing:
            value = model(*args, **kwargs)
        if seen is not None:
            seen(leaves, args, kwargs, value)
        flat = flatten(value)
        if log_calls is not None:
            log_calls.returned(flat[0])
        return flat


def scattered(sizes: list[int], **options: Any) -> torch.Tensor:
    """An empty tensor that begins within another one and lies there in reversed order."""
    whole = torch.empty([size + 1 for size in reversed(sizes)], **options)
    whole = whole.permute(*reversed(range(len(sizes))))
    return whole[tuple(slice(1, None) for _ in sizes)]


def of_one_row(sizes: list[int], **options: Any) -> torch.Tensor:
    """An empty tensor whose rows are all one row in memory."""
    return torch.empty([1] * len(sizes[:1]) + sizes[1:], **options).expand(sizes)


def negated(sizes: list[int], **options: Any) -> torch.Tensor:
    """An empty tensor that is another one, to be negated, and conjugated, when it is read."""
    made = torch.empty(sizes, **options)
    if made.is_complex():
        made = made.conj()
    return torch._neg_view(made) if made.is_floating_point() or made.is_complex() else made


def tracked(sizes: list[int], **options: Any) -> torch.Tensor:
    """An empty tensor through which gradients are followed, where its dtype has any."""
    made = torch.empty(sizes, **options)
    if not (made.is_floating_point() or made.is_complex()):
        return made
    with torch.enable_grad():  # as what an earlier call gave, written to since
        return made.requires_grad_().clone().mul_(1)


def for_inference(sizes: list[int], **options: Any) -> torch.Tensor:
    """An empty tensor that was made in inference mode."""
    with torch.inference_mode():
        return torch.empty(sizes, **options)


def marks_on(leaves: Iterable[Any]) -> list[str]:
    """The attributes that code has put on fake tensors, which a later call may find there."""
    fakes = [leaf for leaf in leaves if isinstance(leaf, FakeTensor)]
    known = set(vars(torch.empty(0))) if fakes else set()
    found = {name for fake in fakes for name in vars(fake).keys() - known}
    return sorted(name for name in found if "_memo" not in name and "_dynamo" not in name)


@contextlib.contextmanager
def quiet(model: torch.nn.Module) -> Iterator[None]:
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
        # a script's optimizer decides anew from run to run, and would learn from fake tensors
        stack.enter_context(optimized_execution(False))
        stack.enter_context(silenced())
        if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            stack.enter_context(OnOneDevice(device_of(model)))
        stack.enter_context(fakes_by_type(model))
        yield


def _is_compiled(module: torch.nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
