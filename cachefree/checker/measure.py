"""Whether terms have the sizes and dtypes that are written beside them: torch says so.

Every operator is run on tensors without storage, at sizes of the region.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any

import sympy
import torch

from cachefree.checker.terms import Term, Truth

__all__ = ["mismeasured"]

META = torch.device("meta")


def mismeasured(terms: Sequence[Term], point: Mapping[Any, int]) -> str | None:
    """The first term whose sizes or dtype are others than are written; None where none is."""
    values: dict[Term, Any] = {}
    numbers: dict[Any, Any] = {}
    read = {term.args for term in terms if term.op == "item"}

    def given(arg: Any) -> Any:
        if isinstance(arg, Term):
            return values[arg]
        if isinstance(arg, tuple):
            return [given(part) for part in arg]
        if isinstance(arg, Truth):
            return bool(arg)
        if isinstance(arg, str) and ":" in arg:
            kind, _, name = arg.partition(":")
            return META if kind == "device" else getattr(torch, name.removeprefix("torch."))
        if isinstance(arg, sympy.Basic):
            if arg not in numbers:
                number = arg.subs(point)
                numbers[arg] = int(number) if number.is_integer else float(number)
            return numbers[arg]
        return arg

    for term in terms:
        try:
            found = _run(term, [given(arg) for arg in term.args], given(term.shape or ()))
        except Exception as error:  # noqa: BLE001 - whatever torch says of it
            return f"{term.op} does not run: {str(error).splitlines()[0]}"
        # laws leave copies out, so that a view may be of what lies otherwise in memory
        values[term] = found.contiguous() if isinstance(found, torch.Tensor) else found
        several = term.parts if term.shape is None else [term.shape]
        noted = [tuple(given(shape)) for shape in several]
        # kernels differ in what they keep for a backward pass, which nothing reads
        is_read = [not isinstance(found, tuple) or (term, k) in read for k in range(len(noted))]
        if _differ(found, noted, is_read):
            return f"{term.op} is written to have the sizes {several} and has others"
        if term.shape is not None and found.dtype != term.dtype:
            return f"{term.op} is written to be {term.dtype} and is {found.dtype}"
    return None


def _differ(found: Any, noted: list[tuple[int, ...]], is_read: list[bool]) -> bool:
    """Whether results have other sizes than are noted, of those that are read."""
    results = [found] if isinstance(found, torch.Tensor) else list(found)
    if len(results) != len(noted):
        return True
    pairs = compress(zip(results, noted, strict=True), is_read)
    return any(tuple(result.shape) != sizes for result, sizes in pairs)


def _run(term: Term, args: list[Any], shape: list[int]) -> Any:
    op = term.op
    if op in ("input", "attribute", "constant"):
        return torch.empty(shape, dtype=term.dtype, device=META)
    if op == "full":
        return torch.empty(args[0], dtype=args[2], device=META)
    if op == "arange":
        if args[1] < 0 or term.dtype.is_floating_point:
            raise ValueError("a range of that many")
        return torch.empty(args[1], dtype=args[3], device=META)
    if op == "slice":
        source, dim, start, end, step = args
        if not 0 <= start <= end <= source.shape[dim] or step != 1:
            raise ValueError("the bounds are outside")
        return source.narrow(dim, start, end - start)
    if op == "cat":
        if len({part.dim() for part in args[0] if part.shape != (0,)}) > 1:
            raise ValueError("ranks differ")
        return torch.cat(args[0], args[1])
    if op in ("reshape", "permute", "expand"):
        return getattr(args[0], op)(args[1])
    if op == "cast":
        return args[0].to(args[1])
    if op == "item":
        return args[0][args[1]]
    _, name, overload = op.split(".")
    called = getattr(getattr(torch.ops.aten, name), overload)
    pairs = list(zip(called._schema.arguments, args, strict=True))
    plain = [value for argument, value in pairs if not argument.kwarg_only]
    named = {argument.name: value for argument, value in pairs if argument.kwarg_only}
    return called(*plain, **named)
