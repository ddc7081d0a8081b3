"""What the laws of shapes, joins and slices say, a second time; nothing here is the prover's.

Each function takes the makers of terms and a left side, and yields every right side that the law
allows; it yields nothing where the side condition is not shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import sympy

from cachefree.checker.terms import Term, Terms

__all__ = ["SHAPES", "Rights", "operators"]

Rights = Iterator[Term]
WIDE = 2**62  # a bound that torch writes for the end


def operators(text: str) -> frozenset[str]:
    """Names of operators of ATen, the overload ``default`` left out."""
    words = (word if "." in word else f"{word}.default" for word in text.split())
    return frozenset(f"aten.{word}" for word in words)


def as_reshape(m: Terms, t: Term) -> Rights:
    yield m.reshape(t.args[0], t.shape)


def reshape(m: Terms, t: Term) -> Rights:
    x, shape = t.args
    if x.shape == shape:
        yield x
    if x.op == "reshape" or (x.op == "permute" and moves_ones_only(x)):
        yield m.reshape(x.args[0], shape)
    if x.op == "full":
        yield m.full(shape, *x.args[1:])


def moves_ones_only(t: Term) -> bool:
    kept = [dim for dim in t.args[1] if t.args[0].shape[dim] != 1]
    return kept == sorted(kept)


def as_permute(m: Terms, t: Term) -> Rights:
    name, rank = t.op.split(".")[1], len(t.shape)
    dims = list(range(rank))
    if name in ("transpose", "swapaxes", "swapdims"):
        one, other = t.args[1] % rank, t.args[2] % rank
        dims[one], dims[other] = dims[other], dims[one]
    elif name in ("t", "numpy_T"):
        dims.reverse()
    elif name in ("mT", "mH", "adjoint") and not t.dtype.is_complex:
        dims[-2:] = dims[:-3:-1]
    elif name == "permute":
        dims = [dim % rank for dim in t.args[1]]
    elif name in ("movedim", "moveaxis") and isinstance(t.args[1], int):
        dims.insert(t.args[2] % rank, dims.pop(t.args[1] % rank))
    else:
        return
    yield m.permute(t.args[0], dims)


def permute(m: Terms, t: Term) -> Rights:
    x, order = t.args
    if list(order) == list(range(len(order))):
        yield x
    if x.op == "permute":
        yield m.permute(x.args[0], [x.args[1][dim] for dim in order])
    if x.op == "full":
        yield m.full(t.shape, *x.args[1:])
    if moves_ones_only(t):
        yield m.reshape(x, t.shape)


def as_expand(m: Terms, t: Term) -> Rights:
    yield m.expand(t.args[0], t.shape)


def repeat(m: Terms, t: Term) -> Rights:
    x, times = t.args
    before = (1,) * (len(times) - len(x.shape)) + tuple(x.shape)
    if all(size == 1 or count == 1 for size, count in zip(before, times, strict=True)):
        yield m.expand(x, t.shape)


def expand(m: Terms, t: Term) -> Rights:
    x, shape = t.args
    if x.shape == shape:
        yield x
    if x.op == "expand":
        yield m.expand(x.args[0], shape)
    if x.op == "full":
        yield m.full(shape, *x.args[1:])


def split(m: Terms, t: Term) -> Rights:
    several, index = t.args
    name, args = several.op.split(".")[1], several.args
    dim = args[1 if name == "unbind" else 2] % len(args[0].shape)
    if name == "unbind":
        yield m.make("aten.select.int", (args[0], dim, index), t.shape, t.dtype, t.device)
    elif name in ("split", "split_with_sizes", "chunk") or several.op.endswith("split.sections"):
        ends = list(accumulate((shape[dim] for shape in several.parts), initial=0))
        yield m.slice(args[0], dim, ends[index], ends[index + 1])


def bound(m: Terms, at: Any, size: Any) -> Any:
    """A bound of a slice as a number from 0 to the size; None where its sign is not known."""
    if isinstance(at, int) and at >= WIDE:
        return size
    if m.sizes.at_most(0, at):
        return sympy.Min(at, size)
    return sympy.Max(0, at + sympy.sympify(size)) if m.sizes.at_most(at, -1) else None


def clamp_slice(m: Terms, t: Term) -> Rights:
    x, dim, start, end, step = t.args
    dim %= len(x.shape)
    first = bound(m, 0 if start is None else start, x.shape[dim])
    last = bound(m, WIDE if end is None else end, x.shape[dim])
    if step in (None, 1) and first is not None and last is not None:
        yield m.slice(x, dim, first, sympy.Max(first, last))


def slice_(m: Terms, t: Term) -> Rights:
    x, dim, start, end, _ = t.args
    if start == 0 and end == x.shape[dim]:
        yield x
    if x.op == "slice" and x.args[1] == dim:
        yield m.slice(x.args[0], dim, x.args[2] + start, x.args[2] + end)
    if x.op == "full":
        yield m.full(t.shape, *x.args[1:])
    if x.op == "expand":
        inner, place = x.args[0], dim - len(x.shape) + len(x.args[0].shape)
        if place < 0 or inner.shape[place] == 1:
            yield m.expand(inner, t.shape)
        else:
            yield m.expand(m.slice(inner, place, start, end), t.shape)


def select(m: Terms, t: Term) -> Rights:
    x, dim, at = t.args
    dim %= len(x.shape)
    at = at if m.sizes.at_most(0, at) else at + x.shape[dim] if m.sizes.at_most(at, -1) else None
    if at is not None:
        yield m.reshape(m.slice(x, dim, at, at + 1), t.shape)


def no_elements(m: Terms, t: Term) -> Rights:
    if t.shape is not None and 0 in t.shape:
        yield m.full(t.shape, 0, t.dtype, t.device)


def concat(m: Terms, t: Term) -> Rights:
    name, parts = t.op.split(".")[1], t.args[0]
    rank, is_stack = len(t.shape), name.endswith("stack")
    if not is_stack or all(len(x.shape) == rank for x in parts):
        dim = int(name == "hstack" and rank > 1) if is_stack else t.args[1] % rank
        yield m.cat(parts, dim, t.shape, t)


def stack(m: Terms, t: Term) -> Rights:
    dim = t.args[1] % len(t.shape)
    shape = (*t.shape[:dim], 1, *t.shape[dim + 1 :])
    yield m.cat([m.reshape(x, shape) for x in t.args[0]], dim, t.shape, t)


def pieces(m: Terms, t: Term, dim: int) -> list[Term]:
    """What is joined, without what is empty, neighbours that continue one another as one."""
    found: list[Term] = []
    for x in t.args[0] if t.op == "cat" and t.args[1] == dim else [t]:
        if len(x.shape) != len(t.shape) or x.shape[dim] == 0:
            if 0 not in x.shape:
                return [t]
            continue
        for piece in pieces(m, x, dim) if x.op == "cat" and x.args[1] == dim else [x]:
            joined = continued(m, found[-1], piece, dim) if found else None
            found[-1:] = [joined] if joined else [*found[-1:], piece]
    return found


def continued(m: Terms, a: Term, b: Term, dim: int) -> Term | None:
    shape = (*a.shape[:dim], sympy.sympify(a.shape[dim]) + b.shape[dim], *a.shape[dim + 1 :])
    bases = [x.args[0] if x.op == "expand" else x for x in (a, b)]
    if bases[0] is bases[1]:
        widths = (1,) * (len(shape) - len(bases[0].shape)) + tuple(bases[0].shape)
        if widths[dim] == 1:
            return m.expand(bases[0], shape)
    if a.op == b.op == "slice" and a.args[:2] == b.args[:2] and a.args[1] == dim:
        return m.slice(a.args[0], dim, a.args[2], b.args[3]) if a.args[3] == b.args[2] else None
    if a.op == b.op == "full" and a.args[1:] == b.args[1:]:
        return m.full(shape, *a.args[1:])
    if a.op == b.op == "arange" and a.args[2:] == b.args[2:]:
        args = (a.args[0], shape[0], *a.args[2:])
        end = a.args[0] + a.args[1] * sympy.sympify(a.args[2])
        is_next = m.sizes.equal(end, b.args[0])
        return m.make("arange", args, shape, a.dtype, a.device) if is_next else None
    return None


def cat(m: Terms, t: Term) -> Rights:
    parts, dim = t.args
    if any(x.dtype != t.dtype for x in parts):
        same = [x if x.dtype == t.dtype else m.cast(x, t.dtype, t.device) for x in parts]
        yield m.cat(same, dim, t.shape, t)
        return
    joined = pieces(m, t, dim)
    if joined:
        yield joined[0] if len(joined) == 1 else m.cat(joined, dim, t.shape, t)
    kept = [x for x in parts if len(x.shape) == len(t.shape) and x.shape[dim] != 0]
    if len(kept) == 1:
        yield kept[0]


def slice_of_cat(m: Terms, t: Term) -> Rights:
    x, dim, start, end, _ = t.args
    if x.op != "cat":
        return
    if x.args[1] != dim:
        yield m.cat([m.slice(part, dim, start, end) for part in x.args[0]], x.args[1], t.shape, t)
        return
    below, above, kept, offset = m.sizes.at_most, m.sizes.equal, [], sympy.Integer(0)
    for part in x.args[0]:
        after = offset + part.shape[dim]
        if not (below(after, start) or below(end, offset)):
            ends = (sympy.Max(start, offset), sympy.Min(end, after))
            edges = [next((edge for edge in (offset, after, start, end) if above(e, edge)), None)
                     for e in ends]  # fmt: skip
            if None in edges:
                return
            kept.append(m.slice(part, dim, edges[0] - offset, edges[1] - offset))
        offset = after
    if kept:
        yield kept[0] if len(kept) == 1 else m.cat(kept, dim, t.shape, t)


def slice_of_permute(m: Terms, t: Term) -> Rights:
    x, dim, start, end, _ = t.args
    if x.op == "permute":
        yield m.permute(m.slice(x.args[0], x.args[1][dim], start, end), x.args[1])


def slice_of_reshape(m: Terms, t: Term) -> Rights:
    """The dimension is the first, but for ones, of those that one dimension was split into."""
    x, dim, start, end, _ = t.args
    if x.op != "reshape":
        return
    inner = x.args[0]
    for axis, size in enumerate(inner.shape):
        lead = [s for s in inner.shape[:axis] if s != 1]
        if lead != [s for s in x.shape[:dim] if s != 1]:
            continue
        for count in range(len(x.shape) - dim):
            if m.sizes.equal(sympy.Mul(*x.shape[dim : dim + count + 1]), size):
                width = sympy.Mul(*x.shape[dim + 1 : dim + count + 1])
                yield m.reshape(m.slice(inner, axis, start * width, end * width), t.shape)


def slice_of_linear(m: Terms, t: Term) -> Rights:
    x, dim, start, end, _ = t.args
    if x.op != "aten.linear.default":
        return
    inputs, weight, bias = x.args
    if dim == len(x.shape) - 1:
        weight = m.slice(weight, 0, start, end)
        bias = None if bias is None else m.slice(bias, 0, start, end)
    else:
        inputs = m.slice(inputs, dim, start, end)
    yield m.make(x.op, (inputs, weight, bias), t.shape, t.dtype, t.device)


VIEWS = operators(
    "view reshape _unsafe_view flatten.using_ints unflatten.int unsqueeze squeeze squeeze.dim "
    "squeeze.dims view_as reshape_as _reshape_alias ravel"
)
ORDERS = operators(
    "transpose.int t mT permute movedim.int moveaxis.int swapaxes swapdims adjoint mH numpy_T"
)


def only_row(m: Terms, t: Term) -> Rights:
    x, row, dim, place = t.args
    if x.shape == t.shape and x.shape[dim] == 1 and place in (0, -1) and row.dtype == x.dtype:
        yield m.reshape(row, t.shape)


def every_row(m: Terms, t: Term) -> Rights:
    x, rows, *_ = t.args
    is_whole = t.args[5:] in ((), (1,)) and rows.shape == x.shape == t.shape
    if is_whole and rows.dtype == x.dtype:
        yield rows


SHAPES = {
    "view": (VIEWS, as_reshape),
    "reshape": ({"reshape"}, reshape),
    "transpose": (ORDERS, as_permute),
    "permute": ({"permute"}, permute),
    "broadcast": (operators("expand expand_as broadcast_to"), as_expand),
    "repeat": (operators("repeat"), repeat),
    "expand": ({"expand"}, expand),
    "split": ({"item"}, split),
    "clamp-slice": (operators("slice.Tensor"), clamp_slice),
    "slice": ({"slice"}, slice_),
    "select": (operators("select.int"), select),
    "no-elements": (None, no_elements),
    "concat": (operators("cat concat concatenate"), concat),
    "hstack": (operators("hstack vstack"), concat),
    "stack": (operators("stack"), stack),
    "cat-empty": ({"cat"}, cat),
    "slice-of-cat": ({"slice"}, slice_of_cat),
    "slice-of-permute": ({"slice"}, slice_of_permute),
    "slice-of-reshape": ({"slice"}, slice_of_reshape),
    "slice-of-linear": ({"slice"}, slice_of_linear),
    "only-row": (operators("select_scatter"), only_row),
    "every-row": (operators("slice_scatter"), every_row),
}
"""Law → the operators at the head of its left side (None: any), and its right sides."""
