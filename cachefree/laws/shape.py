"""Shapes: a view is a ``reshape``, a reordering a ``permute``, a broadcast an ``expand``."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from cachefree.laws.law import Law, Rewriter
from cachefree.terms import Term

__all__ = ["NO_ELEMENTS", "SHAPE_LAWS", "slice_extent"]

aten = torch.ops.aten


def _no_elements(term: Term, rewriter: Rewriter) -> Term | None:
    if term.op == "full" or term.shape is None or not any(size == 0 for size in term.shape):
        return None
    return rewriter.build("full", (term.shape, 0, term.dtype, term.device), term.shape, term)


def _as_reshape(term: Term, rewriter: Rewriter) -> Term | None:
    return rewriter.build("reshape", (term.args[0], term.shape), term.shape, term)


def _reshape(term: Term, rewriter: Rewriter) -> Term | None:
    source: Term
    source, shape = term.args
    if source.shape == shape:
        return source
    if len(source.sizes) == len(shape) and all(map(rewriter.facts.equal, source.sizes, shape)):
        return source
    if source.op == "reshape":
        return rewriter.build("reshape", (source.args[0], shape), shape, term)
    if source.op == "full":
        return rewriter.build("full", (shape, *source.args[1:]), shape, term)
    if source.op == "permute" and _moves_ones_only(source):
        return rewriter.build("reshape", (source.args[0], shape), shape, term)
    return None


def _moves_ones_only(term: Term) -> bool:
    """Whether a permutation keeps the order of all dimensions but those of size 1."""
    source, order = term.args
    kept = [dim for dim in order if source.sizes[dim] != 1]
    return kept == sorted(kept)


def _expand_dims_of(term: Term, rewriter: Rewriter) -> Term | None:
    """``permute`` that moves only ones is a ``reshape``."""
    if _moves_ones_only(term):
        return rewriter.build("reshape", (term.args[0], term.shape), term.shape, term)
    return None


def _order(term: Term) -> tuple[int, ...] | None:
    rank = len(term.args[0].sizes)
    dims = list(range(rank))
    op, args = term.op, term.args
    if rank == 0:
        return ()
    if op in (aten.transpose.int, aten.swapaxes.default, aten.swapdims.default):
        first, second = args[1] % rank, args[2] % rank
        dims[first], dims[second] = dims[second], dims[first]
    elif op in (aten.t.default, aten.numpy_T.default):
        dims.reverse()
    elif op in (aten.mT.default, aten.adjoint.default, aten.mH.default):
        if term.dtype is None or term.dtype.is_complex:
            return None
        dims[-1], dims[-2] = dims[-2], dims[-1]
    elif op is aten.permute.default:
        dims = [dim % rank for dim in args[1]]
    elif op in (aten.movedim.int, aten.moveaxis.int):
        source, target = args[1] % rank, args[2] % rank
        dims.remove(source)
        dims.insert(target, source)
    else:
        return None
    return tuple(dims)


def _as_permute(term: Term, rewriter: Rewriter) -> Term | None:
    order = _order(term)
    if order is None:
        return None
    return rewriter.build("permute", (term.args[0], order), term.shape, term)


def _permute(term: Term, rewriter: Rewriter) -> Term | None:
    source: Term
    source, order = term.args
    if order == tuple(range(len(order))):
        return source
    if source.op == "permute":
        combined = tuple(source.args[1][dim] for dim in order)
        return rewriter.build("permute", (source.args[0], combined), term.shape, term)
    if source.op == "full":
        return rewriter.build("full", (term.shape, *source.args[1:]), term.shape, term)
    return _expand_dims_of(term, rewriter)


def _as_expand(term: Term, rewriter: Rewriter) -> Term | None:
    return rewriter.build("expand", (term.args[0], term.shape), term.shape, term)


def _repeat(term: Term, rewriter: Rewriter) -> Term | None:
    source, times = term.args
    lead = len(times) - len(source.sizes)
    repeated = [size for size, count in zip(source.sizes, times[lead:], strict=True) if count != 1]
    if any(size != 1 for size in repeated):
        return None
    return rewriter.build("expand", (source, term.shape), term.shape, term)


def _expand(term: Term, rewriter: Rewriter) -> Term | None:
    source: Term
    source, shape = term.args
    if source.shape == shape:
        return source
    if source.op == "expand":
        return rewriter.build("expand", (source.args[0], shape), shape, term)
    if source.op == "full":
        return rewriter.build("full", (shape, *source.args[1:]), shape, term)
    return None


def _split(term: Term, rewriter: Rewriter) -> Term | None:
    """One part of a split as the slice that it is."""
    several, index = term.args
    op, args = several.op, several.args
    source = args[0]
    if not isinstance(source, Term) or source.shape is None or several.payload is None:
        return None
    rank = len(source.sizes)
    if op is aten.unbind.int:
        dim = args[1] % rank
        return rewriter.build(aten.select.int, (source, dim, index), term.shape, term)
    if op not in _SPLITS:
        return None
    dim = args[2] % rank
    widths = [shape[dim] for shape, _, _ in several.payload]
    start = sum(widths[:index], sympy.Integer(0))
    return rewriter.build("slice", (source, dim, start, start + widths[index], 1), term.shape, term)


_SPLITS = (
    aten.split.Tensor,
    aten.split.default,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.tensor_split.sections,
)


def _unsliced(term: Term, rewriter: Rewriter) -> Term | None:
    source, dim, _, _, step = term.args
    extent = slice_extent(term, rewriter.facts)
    if extent is None or step not in (None, 1):
        return None
    dim %= len(source.sizes)
    first, length = extent
    shape = (*source.sizes[:dim], length, *source.sizes[dim + 1 :])
    last = rewriter.facts.simplified(first + length)
    return rewriter.build("slice", (source, dim, first, last, 1), shape, term)


def slice_extent(term: Term, facts: Any) -> tuple[Any, Any] | None:
    """Where a slice starts and how long it is, where the facts decide it."""
    source, dim, start, end, _ = term.args
    size = source.sizes[dim % len(source.sizes)]
    first = _bound(facts, 0 if start is None else start, size)
    last = _bound(facts, size if end is None else end, size)
    if first is None or last is None:
        return None
    length = last - first if facts.at_most(first, last) else sympy.Max(0, last - first)
    return facts.simplified(first), facts.simplified(length)


def _bound(facts: Any, bound: Any, size: Any) -> Any:
    """A bound of a slice as a number in ``[0, size]``."""
    if isinstance(bound, int) and bound >= 2**62:
        return size
    if facts.at_most(0, bound):
        return bound if facts.at_most(bound, size) else facts.simplified(sympy.Min(bound, size))
    if facts.at_most(bound, -1):
        return facts.simplified(sympy.Max(0, sympy.sympify(bound) + size))
    return None


def _slice(term: Term, rewriter: Rewriter) -> Term | None:
    source: Term
    source, dim, start, end, _ = term.args
    facts = rewriter.facts
    if facts.equal(start, 0) and facts.equal(end, source.sizes[dim]):
        return source
    if source.op == "slice" and source.args[1] == dim:
        offset = source.args[2]
        new = (
            source.args[0],
            dim,
            facts.simplified(offset + start),
            facts.simplified(offset + end),
            1,
        )
        return rewriter.build("slice", new, term.shape, term)
    if source.op == "full":
        return rewriter.build("full", (term.shape, *source.args[1:]), term.shape, term)
    if source.op == "expand":
        return _slice_of_expand(term, rewriter)
    return None


def _slice_of_expand(term: Term, rewriter: Rewriter) -> Term | None:
    source, dim, start, end, _ = term.args
    inner = source.args[0]
    place = dim - (len(source.sizes) - len(inner.sizes))
    if place < 0 or inner.sizes[place] == 1:
        return rewriter.build("expand", (inner, term.shape), term.shape, term)
    shape = (*inner.sizes[:place], term.sizes[dim], *inner.sizes[place + 1 :])
    part = rewriter.build("slice", (inner, place, start, end, 1), shape, term)
    return rewriter.build("expand", (part, term.shape), term.shape, term)


def _select(term: Term, rewriter: Rewriter) -> Term | None:
    source, dim, index = term.args
    rank = len(source.sizes)
    facts = rewriter.facts
    dim %= rank
    if not facts.at_most(0, index):
        if not facts.at_most(index, -1):
            return None
        index = facts.simplified(index + source.sizes[dim])
    shape = (*source.sizes[:dim], 1, *source.sizes[dim + 1 :])
    part = rewriter.build("slice", (source, dim, index, index + 1, 1), shape, term)
    return rewriter.build("reshape", (part, term.shape), term.shape, term)


_RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.view_as.default,
    aten.reshape_as.default,
    aten._reshape_alias.default,
    aten.ravel.default,
)
_PERMUTES = (
    aten.transpose.int,
    aten.t.default,
    aten.mT.default,
    aten.permute.default,
    aten.movedim.int,
    aten.moveaxis.int,
    aten.swapaxes.default,
    aten.swapdims.default,
    aten.adjoint.default,
    aten.mH.default,
    aten.numpy_T.default,
)

SHAPE_LAWS: tuple[Law, ...] = (
    Law(
        "view",
        "view(x), flatten(x), unsqueeze(x), … = reshape(x, shape)",
        "exact",
        _RESHAPES,
        _as_reshape,
    ),
    Law(
        "reshape",
        "reshape(x, shape(x)) = x;  reshape(reshape(x, a), b) = reshape(x, b)",
        "exact",
        ("reshape",),
        _reshape,
    ),
    Law(
        "transpose",
        "transpose(x), t(x), movedim(x), … = permute(x, order)",
        "exact",
        _PERMUTES,
        _as_permute,
    ),
    Law(
        "permute",
        "permute(x, 0…n) = x;  permute(permute(x, p), q) = permute(x, p∘q)",
        "exact",
        ("permute",),
        _permute,
    ),
    Law(
        "broadcast",
        "expand_as(x, y) = expand(x, shape(y))",
        "exact",
        (aten.expand.default, aten.expand_as.default, aten.broadcast_to.default),
        _as_expand,
    ),
    Law(
        "repeat",
        "repeat(x, n) = expand(x, n ∘ shape(x))  where only dimensions of size 1 are repeated",
        "exact",
        (aten.repeat.default,),
        _repeat,
    ),
    Law(
        "expand",
        "expand(x, shape(x)) = x;  expand(expand(x, a), b) = expand(x, b)",
        "exact",
        ("expand",),
        _expand,
    ),
    Law(
        "split",
        "split(x, …)[i], chunk(x, …)[i], unbind(x)[i] = a slice of x",
        "exact",
        ("item",),
        _split,
    ),
    Law(
        "clamp-slice",
        "x[a:b] = x[a':b']  with 0 ≤ a' ≤ b' ≤ size(x)",
        "exact",
        (aten.slice.Tensor,),
        _unsliced,
    ),
    Law("slice", "x[0:size(x)] = x;  x[a:b][c:d] = x[a+c:a+d]", "exact", ("slice",), _slice),
    Law("select", "x[i] = reshape(x[i:i+1])", "exact", (aten.select.int,), _select),
)
NO_ELEMENTS = Law(
    "no-elements", "x = empty(shape(x))  if a size of x is 0", "exact", (), _no_elements
)
