"""The one graph with the kind of cache that was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cachefree.errors import CacheFreeError, Refusal
from cachefree.onnx.attention.kinds import KvGraph
from cachefree.onnx.attention.separate import with_attention
from cachefree.onnx.attention.shared import SCATTERED, with_shared
from cachefree.onnx.exporting import default_opset

if TYPE_CHECKING:
    from cachefree.spec import Interface

__all__ = ["opset_of", "with_kind"]

_SCATTER_OPSET = 24  # the first with TensorScatter


def with_kind(module: Any, interface: Interface, kind: str, opset: int | None) -> KvGraph | None:
    """The graph with another kind of cache; None for joins.

    Args:
        module: The one graph.
        interface: Its inputs and outputs.
        kind: ``"concat"``, ``"attention"`` or ``"shared"``.
        opset: The ONNX opset that was asked for; None for any.

    Raises:
        CacheFreeError: an unknown kind, or one that needs a newer opset.
    """
    writers = {"concat": None, "attention": with_attention, "shared": with_shared}
    if kind not in writers:
        raise CacheFreeError(
            Refusal(
                f"There is no kv={kind!r}.", remedy=f"Use one of {', '.join(map(repr, writers))}."
            )
        )
    writer = writers[kind]
    if writer is None:
        return None
    changed = writer(module, interface)
    least = opset_of(changed)
    if changed.report.kernels and (opset or least) < least:
        raise CacheFreeError(
            Refusal(
                f'kv="{kind}" needs opset {least}, and opset={opset} was asked for.',
                why="Its operators are not in older ones.",
                remedy='Leave opset= out, or use kv="concat".',
            )
        )
    return changed


def opset_of(changed: KvGraph | None) -> int:
    """The opset that a kind of cache needs."""
    is_scattered = changed is not None and SCATTERED in changed.report.kernels.values()
    return _SCATTER_OPSET if is_scattered else default_opset()
