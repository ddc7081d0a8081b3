"""A loop over tokens that has one token, or none."""

from __future__ import annotations

from typing import Any

from cachefree.laws.law import Law, Rewriter
from cachefree.terms import SCAN, Term, operands, replace_operands, topological

__all__ = ["SCAN_LAWS"]


def _one_token(term: Term, rewriter: Rewriter) -> Term | None:
    scan, index = term.args
    if scan.op != SCAN or not rewriter.facts.equal(scan.args[0], 1):
        return None
    _, carried, first, rows, sources, following, given = scan.args
    values = dict(zip(carried, first, strict=True))
    for row, source in zip(rows, sources, strict=True):
        values[row] = rewriter.build("reshape", (source, row.sizes), row.sizes, row)
    result = (*following, *given)[index]
    value = _put_in(result, values, rewriter)
    if value is None or index < len(following):
        return value
    return rewriter.build("reshape", (value, term.sizes), term.sizes, term)


def _no_token(term: Term, rewriter: Rewriter) -> Term | None:
    scan, index = term.args
    if scan.op != SCAN or index >= len(scan.args[5]):
        return None  # what the rounds gave is empty, which is seen by its size
    if not rewriter.facts.equal(scan.args[0], 0):
        return None
    first: Term = scan.args[2][index]
    return first


def _put_in(body: Term, values: dict[Term, Term], rewriter: Rewriter) -> Term | None:
    """The body's value for what is carried to the one token, and its row."""
    done = dict(values)
    for below in topological([body]):
        if below in done:
            continue
        if not any(done[operand] is not operand for operand in operands(below)):
            done[below] = below
            continue
        if below.shape is None:
            return None  # an operator with several results is built by nobody here
        args: Any = replace_operands(
            below.args, lambda arg: done[arg] if isinstance(arg, Term) else arg
        )
        done[below] = rewriter.build(below.op, args, below.shape, below)
    return done[body]


SCAN_LAWS: tuple[Law, ...] = (
    Law(
        "one-token",
        "scan(1, body, h, x) = body(h, x[0])",
        "exact",
        ("item",),
        _one_token,
    ),
    Law(
        "no-token",
        "scan(0, body, h, x) = h",
        "exact",
        ("item",),
        _no_token,
    ),
)
"""What a loop over one token is: its body; and over none: what it starts from."""
