"""Recurrent networks of torch as one operator while a path is captured.

``torch.lstm`` and its like have no shape rule of their own: to find the size of the result, torch
runs them token by token, and the number of tokens is frozen. Here they are called as operators of
our own that know their result's sizes, and read as torch's afterwards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["captured_as", "is_recurrent", "of_our_own", "original"]

aten = torch.ops.aten
_NAMESPACE = "cachefree"
_SCHEMAS = {
    "lstm": ("Tensor[] hx", "(Tensor, Tensor, Tensor)"),
    "gru": ("Tensor hx", "(Tensor, Tensor)"),
    "rnn_tanh": ("Tensor hx", "(Tensor, Tensor)"),
    "rnn_relu": ("Tensor hx", "(Tensor, Tensor)"),
}


def is_recurrent(target: Any) -> bool:
    """Whether an operator is a whole recurrent network, with dropout between its layers."""
    return getattr(target, "overloadpacket", None) in tuple(
        getattr(aten, name) for name in _SCHEMAS
    )


def captured_as(func: Any, args: tuple[Any, ...]) -> Callable[..., Any] | None:
    """Our operator for a torch function; None where it is no recurrent network.

    One that takes packed sequences is none of ours.
    """
    name = getattr(func, "__name__", "")
    if name not in _SCHEMAS or func is not getattr(torch, name) or len(args) != 9:
        return None
    is_padded = isinstance(args[3], bool) and isinstance(args[0], torch.Tensor)
    return _operators()[name] if is_padded and args[0].dim() == 3 else None


def of_our_own(target: Any) -> Any:
    """Our operator for one of torch's, see `is_recurrent`."""
    return _operators()[target._schema.name.partition("::")[2]]


def original(target: Any) -> Any:
    """Torch's operator for one of ours; any other as it is."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != _NAMESPACE:
        return target
    name = target._schema.name.partition("::")[2]
    return getattr(aten, name).input if name in _SCHEMAS else target


@functools.cache
def _operators() -> dict[str, Any]:
    """Our operators, declared to torch once a process."""
    namespace = getattr(torch.ops, _NAMESPACE)
    for name, (state, results) in _SCHEMAS.items():
        if hasattr(namespace, name):
            continue
        torch.library.define(
            f"{_NAMESPACE}::{name}",
            f"(Tensor source, {state}, Tensor[] params, bool has_biases, int num_layers, "
            f"float dropout, bool train, bool bidirectional, bool batch_first) -> {results}",
        )
        torch.library.register_fake(f"{_NAMESPACE}::{name}", _results)
    return {name: getattr(namespace, name).default for name in _SCHEMAS}


def _results(
    source: torch.Tensor,
    hx: Any,
    params: Any,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[torch.Tensor, ...]:
    """Tensors of the sizes of the results, BSD or SBD and the states."""
    states = hx if isinstance(hx, (list, tuple)) else [hx]
    width = states[0].shape[-1] * (2 if bidirectional else 1)
    output = source.new_empty((*source.shape[:2], width))
    return (output, *(state.new_empty(state.shape) for state in states))
