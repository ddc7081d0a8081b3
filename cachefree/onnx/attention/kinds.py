"""What becomes of a cache when a graph is written with another kind of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import fx

from cachefree.onnx.attention.layout import Layout
from cachefree.spec import Interface

__all__ = ["KV", "KvGraph", "KvReport"]

KV = Literal["concat", "attention", "shared"]


@dataclass
class KvReport:
    """What became of each slot of the cache.

    Attributes:
        kind: What was asked for.
        kernels: Path of a slot → the operator that holds it.
        reasons: Path of a slot → why it is joined by ``Concat``.
    """

    kind: str
    kernels: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for kernel in self.kernels.values():
            counts[kernel] = counts.get(kernel, 0) + 1
        lines = [f"{count} slots: {kernel}" for kernel, count in counts.items()]
        lines += [f"{slot}: Concat, since {reason}" for slot, reason in self.reasons.items()]
        return "\n".join([f'kv="{self.kind}"', *lines])


@dataclass
class KvGraph:
    """A graph and its interface after the change.

    Attributes:
        module: The graph; parameters are shared with the model.
        interface: Its inputs and outputs.
        report: What became of each slot.
        layouts: Place of a slot that is a buffer → how the model lays it out.
        rows_apart: Whether several rows of a batch with a past and several new tokens have to be
            run one by one.
    """

    module: fx.GraphModule
    interface: Interface
    report: KvReport
    layouts: dict[int, Layout] = field(default_factory=dict)
    rows_apart: bool = False
