"""Dimensions of size 1: what is computed element by element does not need them.

Tried where a path for one token is unequal otherwise: such a path leaves out the tokens' dimension,
which the general path has.
"""

from __future__ import annotations

from typing import Any

from cachefree.laws.alone import EACH_ALONE
from cachefree.laws.law import Law, Rewriter
from cachefree.terms import Term

__all__ = ["ONES_LAWS"]


def _without_ones(term: Term, rewriter: Rewriter) -> Term | None:
    terms = [arg for arg in term.args if isinstance(arg, Term)]
    if any(arg.dtype is None or arg.dtype.is_complex for arg in (term, *terms)):
        return None  # which parts of a complex result are nan depends on where it lies
    rank = len(term.sizes)
    ones = {axis - rank for axis, size in enumerate(term.sizes) if size == 1}

    def shape_of(arg: Term) -> tuple[Any, ...]:
        sizes = [size for axis, size in enumerate(arg.sizes, -len(arg.sizes)) if axis not in ones]
        while sizes and sizes[0] == 1:
            sizes.pop(0)
        return tuple(sizes)

    shapes = {arg: shape_of(arg) for arg in terms}
    is_number = any(not shapes[arg] and arg.sizes for arg in terms)
    if is_number and len({arg.dtype for arg in terms}) > 1:
        return None  # a tensor of no dimensions counts less where dtypes meet
    if all(shapes[arg] == arg.sizes for arg in terms):
        return None
    args = tuple(
        rewriter.build("reshape", (arg, shapes[arg]), shapes[arg], arg)
        if isinstance(arg, Term) and shapes[arg] != arg.sizes
        else arg
        for arg in term.args
    )
    shape = tuple(size for size in term.sizes if size != 1)
    bare = rewriter.build(term.op, args, shape, term)
    return rewriter.build("reshape", (bare, term.shape), term.shape, term)


ONES_LAWS: tuple[Law, ...] = (
    Law(
        "ones-of-elements",
        "f(x, y) = reshape(f(x', y'))  where x' and y' lack the dimensions of size 1 of the "
        "result;  f computes each element alone, no complex one;  not where dtypes differ and x' "
        "has no dimension",
        "exact",
        (*EACH_ALONE, "cast"),
        _without_ones,
    ),
)
