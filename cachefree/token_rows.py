"""Tensors that are taken apart into tokens, and put together again, around a loop over them."""

from __future__ import annotations

import functools
from typing import Any

import torch

from cachefree.loops import heard_loops
from cachefree.sizes import expression
from cachefree.token_ranges import TokenRange

__all__ = ["JOINS", "rows", "rows_operator", "sequence"]


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
    found = loops.of_rows(args[0])
    if found is None:
        return None
    loop, place = found
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    first, parts = list(args[0][: place.start]), list(args[0][place])
    last = list(args[0][place.stop :])
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
    if not first and not last:
        return result
    if is_joined:
        return torch.cat([*first, result, *last], dim)
    beside = [torch.stack(others, dim) if others else None for others in (first, last)]
    return torch.cat([part for part in (beside[0], result, beside[1]) if part is not None], dim)


JOINS = (torch.cat, torch.concat, torch.concatenate)
_PUT_TOGETHER = (torch.stack, *JOINS)
_UNBOUND = (torch.unbind, torch.Tensor.unbind, torch.Tensor.__iter__)
_SPLIT = (torch.split, torch.Tensor.split)
_CHUNKED = (torch.chunk, torch.Tensor.chunk, torch.tensor_split, torch.Tensor.tensor_split)
_NAMES_OF_WIDTH = ("split_size", "split_size_or_sections", "chunks", "indices_or_sections")


def sequence(func: Any, args: tuple[Any, ...], kwargs: Any) -> TokenRange | None:
    """The parts of a tensor along an axis of symbolic size, where a call takes it apart."""
    loops = heard_loops()
    is_apart = func in _UNBOUND or func in _SPLIT or func in _CHUNKED
    if loops is None or not is_apart or not args or not isinstance(args[0], torch.Tensor):
        return None
    source, *rest = args
    is_kept = func not in _UNBOUND
    width = None
    if is_kept:
        named = [kwargs[name] for name in _NAMES_OF_WIDTH if name in kwargs]
        width = rest.pop(0) if rest else (named or [None])[0]
    dim = rest[0] if rest else kwargs.get("dim", 0)
    if not source.dim() or not isinstance(source.shape[dim], torch.SymInt):
        return None
    count = source.shape[dim]
    if func in _SPLIT and not (isinstance(width, int) and width == 1):
        return None
    if func in _CHUNKED and not (
        isinstance(width, torch.SymInt) and expression(width) == expression(count)
    ):
        return None

    def item(at: Any) -> Any:
        with torch._C.DisableTorchFunction():
            part = torch.select(source, dim, at)
            return part.unsqueeze(dim) if is_kept else part

    return TokenRange(loops, count, item)
