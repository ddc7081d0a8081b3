"""Recurrent networks as ONNX has them: one operator a layer, the gates in another order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from cachefree.recurrent import is_recurrent, of_our_own

__all__ = ["network_operator", "network_translations"]

# Places of torch's gates in ONNX's order.
_GATES = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn_tanh": (0,), "rnn_relu": (0,)}


def network_operator(target: Any) -> Any:
    """The operator with a shape rule for one of torch's networks; any other as it is."""
    return of_our_own(target) if is_recurrent(target) else target


def network_translations() -> dict[Any, Callable[..., Any]]:
    """How ``torch.onnx`` writes the networks."""
    return {
        of_our_own(getattr(torch.ops.aten, name).input): functools.partial(_network, name)
        for name in _GATES
    }


def _network(
    name: str,
    source: Any,
    hx: Any,
    params: Sequence[Any],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    from onnxscript import opset18 as op

    states = list(hx) if isinstance(hx, (list, tuple)) else [hx]
    directions = 2 if bidirectional else 1
    each = len(params) // (num_layers * directions)
    if each not in (2, 4):
        raise NotImplementedError("ONNX has no recurrent network with a projection")
    x = op.Transpose(source, perm=[1, 0, 2]) if batch_first else source
    last: list[list[Any]] = [[] for _ in states]
    for layer in range(num_layers):
        start = layer * directions * each
        groups = [params[start + i * each : start + (i + 1) * each] for i in range(directions)]
        first = [_rows(op, state, layer * directions, directions) for state in states]
        y, *ends = _layer(op, name, x, groups, first)
        # y is S, direction, B, D
        merged: Any = op.Constant(value_ints=[0, 0, -1])
        x = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), merged)
        for kept, end in zip(last, ends, strict=True):
            kept.append(end)
    output = op.Transpose(x, perm=[1, 0, 2]) if batch_first else x
    ends = [op.Concat(*kept, axis=0) if len(kept) > 1 else kept[0] for kept in last]
    return (output, *ends)


def _rows(op: Any, value: Any, start: int, count: int) -> Any:
    return op.Slice(
        value,
        op.Constant(value_ints=[start]),
        op.Constant(value_ints=[start + count]),
        op.Constant(value_ints=[0]),
    )


def _layer(
    op: Any, name: str, x: Any, groups: Sequence[Sequence[Any]], states: Sequence[Any]
) -> Sequence[Any]:
    hidden = int(groups[0][1].shape[1])
    weights = [
        _joined(op, [_reordered(op, name, group[place], hidden) for group in groups])
        for place in (0, 1)
    ]
    bias = None
    if len(groups[0]) == 4:
        both = [
            op.Concat(*(_reordered(op, name, group[place], hidden) for place in (2, 3)), axis=0)
            for group in groups
        ]
        bias = _joined(op, both)
    direction = "bidirectional" if len(groups) == 2 else "forward"
    given: dict[str, Any] = {"hidden_size": hidden, "direction": direction}
    args = (x, *weights, bias, None, *states)
    if name == "lstm":
        return op.LSTM(*args, **given)  # type: ignore[no-any-return]
    if name == "gru":
        return op.GRU(*args, **given, linear_before_reset=1)  # type: ignore[no-any-return]
    kind = "Relu" if name == "rnn_relu" else "Tanh"
    return op.RNN(*args, **given, activations=[kind] * len(groups))  # type: ignore[no-any-return]


def _reordered(op: Any, name: str, value: Any, hidden: int) -> Any:
    gates = [_rows(op, value, gate * hidden, hidden) for gate in _GATES[name]]
    return op.Concat(*gates, axis=0) if len(gates) > 1 else value


def _joined(op: Any, values: Sequence[Any]) -> Any:
    """One axis in front, for the directions."""
    axes = op.Constant(value_ints=[0])
    rows = [op.Unsqueeze(value, axes) for value in values]
    return op.Concat(*rows, axis=0) if len(rows) > 1 else rows[0]
