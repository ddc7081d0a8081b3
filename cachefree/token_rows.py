"""Tensors that are taken apart into tokens, and put together again, around a loop over them."""

from __future__ import annotations

import functools
from typing import Any

import torch

from cachefree.loops import TokenRange, heard_loops

__all__ = ["rows", "rows_operator", "sequence"]


@functools.cache
def rows_operator() -> Any:
    """The tensors that the rounds of a loop gave, one beside the other.

    Its result has as many as the loop has rounds at any size, not at the example's.
    """
    namespace = torch.ops.cachefree
    if not hasattr(namespace, "rows"):
        torch.library.define(
            "cachefree::rows",
            "(Tensor[] parts, SymInt count, int dim, bool is_joined, int loop) -> Tensor",
        )
        torch.library.register_fake("cachefree::rows", _rows)
    return namespace.rows.default


def _rows(
    parts: list[torch.Tensor], count: Any, dim: int, is_joined: bool, loop: int
) -> torch.Tensor:
    shape = list(parts[0].shape)
    if is_joined:
        shape[dim] = count
    else:
        shape.insert(dim, count)
    return parts[0].new_empty(shape)


def rows(func: Any, args: tuple[Any, ...], kwargs: Any) -> torch.Tensor | None:
    """The rows of a loop that was run, where a call of ``stack`` or ``cat`` puts them together."""
    loops = heard_loops()
    if loops is None or func not in _PUT_TOGETHER or not args:
        return None
    loop = loops.of_rows(args[0])
    if loop is None:
        return None
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    parts = list(args[0])
    is_joined = func is not torch.stack
    rank = parts[0].dim() + (not is_joined)
    is_regular = all(part.shape == parts[0].shape for part in parts)
    if kwargs.keys() - {"dim", "axis"} or not is_regular:
        return None
    dim %= rank
    if is_joined and parts[0].shape[dim] != 1:
        return None
    count = loops.environment.size_of(loop.count)
    result: torch.Tensor = rows_operator()(parts, count, dim, is_joined, loop.number)
    return result


_PUT_TOGETHER = (torch.stack, torch.cat, torch.concat, torch.concatenate)
_TAKEN_APART = {
    torch.unbind: None,
    torch.Tensor.unbind: None,
    torch.Tensor.__iter__: None,
    torch.split: 1,
    torch.Tensor.split: 1,
}


def sequence(func: Any, args: tuple[Any, ...], kwargs: Any) -> TokenRange | None:
    """The parts of a tensor along an axis of symbolic size, where a call takes it apart."""
    loops = heard_loops()
    if loops is None or func not in _TAKEN_APART or not isinstance(args[0], torch.Tensor):
        return None
    source, *rest = args
    width = _TAKEN_APART[func]
    if width is not None and (rest[:1] or [kwargs.get("split_size")]) != [width]:
        return None
    place = 0 if width is None else 1
    dim = rest[place] if len(rest) > place else kwargs.get("dim", 0)
    if not source.dim() or not isinstance(source.shape[dim], torch.SymInt):
        return None

    def item(at: Any) -> Any:
        with torch._C.DisableTorchFunction():
            part = torch.select(source, dim, at)
            return part if width is None else part.unsqueeze(dim)

    return TokenRange(loops, source.shape[dim], item)
