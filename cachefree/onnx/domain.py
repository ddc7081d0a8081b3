"""Whether the tensors of a call are what an interface takes, and what its size symbols are then."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch

from cachefree.errors import DomainError, Refusal
from cachefree.sizes import compiled, preimage, size_symbol
from cachefree.spec import InputSpec, Interface

__all__ = ["check_domain", "concrete", "read_sizes"]


def read_sizes(interface: Interface, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The sizes of a call.

    Args:
        interface: What the inputs are.
        tensors: Input name → tensor; inputs that are left out are not looked at.

    Returns:
        Symbol → size, for all that the tensors tell; a past that no tensor tells of is 0.

    Raises:
        DomainError: a dtype, rank or size does not fit, all of them listed.
    """
    given = [(spec, tensors[spec.name]) for spec in interface.inputs if spec.name in tensors]
    refusals = [refusal for spec, tensor in given if (refusal := _wrong_kind(spec, tensor))]
    if refusals:
        raise DomainError(*refusals)
    sizes, origin = _plain_sizes(given)
    _solved_sizes(given, sizes, origin)
    for name in interface.past_symbols:
        sizes.setdefault(name, 0)
    refusals = [
        refusal for spec, tensor in given for refusal in _wrong_sizes(spec, tensor, sizes, origin)
    ]
    if refusals:
        raise DomainError(*refusals)
    return sizes


def check_domain(
    interface: Interface, sizes: Mapping[str, int], *, is_first: bool | None = None
) -> None:
    """Refuses sizes outside the domain.

    Args:
        interface: What the domain is of.
        sizes: The size of each symbol.
        is_first: Whether the cache is the neutral one; None where that is not known.

    Raises:
        DomainError: no region of the domain holds at these sizes.
    """
    if not interface.domain.holds(sizes, is_first=is_first):
        said = ", ".join(f"{name} = {size}" for name, size in sizes.items())
        raise DomainError(
            Refusal(
                f"A call with {said} is outside the domain.",
                why="The one graph was shown to be the model where one of these holds:\n         "
                + "\n         ".join(map(str, interface.domain.regions_of(is_first))),
                remedy="Call inside the domain, or rewrite the model with such inputs as examples.",
            )
        )


def concrete(shape: Sequence[Any], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A shape with numbers for its symbols."""
    return tuple(_number(size, sizes) for size in shape)


def _number(size: Any, sizes: Mapping[str, int]) -> int:
    if type(size) is int:
        return size
    if isinstance(size, sympy.Symbol):
        return sizes[size.name]
    return int(compiled(size)(sizes))


@functools.lru_cache(maxsize=4096)
def _symbols(size: Any) -> tuple[str, ...]:
    return tuple(symbol.name for symbol in size.free_symbols)


def _wrong_kind(spec: InputSpec, tensor: torch.Tensor) -> Refusal | None:
    if tensor.dtype != spec.dtype:
        expected, given = str(spec.dtype), str(tensor.dtype)
        return Refusal(
            f"{spec.name} has dtype {given}; {expected} is expected.",
            remedy=f"Pass {spec.name}.to({expected}).",
        )
    if tensor.dim() != len(spec.shape):
        return Refusal(
            f"{spec.name} has {tensor.dim()} dimensions, shape {tuple(tensor.shape)}; "
            f"{len(spec.shape)} are expected: {_shape_text(spec)}."
        )
    return None


def _shape_text(spec: InputSpec) -> str:
    return f"({', '.join(map(str, spec.shape))})"


def _plain_sizes(
    given: Sequence[tuple[InputSpec, torch.Tensor]],
) -> tuple[dict[str, int], dict[str, str]]:
    sizes: dict[str, int] = {}
    origin: dict[str, str] = {}
    for spec, tensor in given:
        for axis, size in enumerate(spec.shape):
            if isinstance(size, sympy.Symbol) and size.name not in sizes:
                sizes[size.name] = tensor.shape[axis]
                origin[size.name] = f"axis {axis} of {spec.name}"
    return sizes, origin


def _free(size: Any) -> set[Any]:
    return size.free_symbols if isinstance(size, sympy.Basic) else set()


def _solved_sizes(
    given: Sequence[tuple[InputSpec, torch.Tensor]], sizes: dict[str, int], origin: dict[str, str]
) -> None:
    """Symbols that stand in sums only: ``past`` from a mask of length ``past + query``."""
    for spec, tensor in given:
        for axis, size in enumerate(spec.shape):
            if not isinstance(size, sympy.Basic) or isinstance(size, sympy.Symbol):
                continue
            unknown = set(_symbols(size)) - sizes.keys()
            symbol = size_symbol(next(iter(unknown), ""))
            if len(unknown) == 1 and not sympy.diff(size, symbol).is_Integer:
                holding = {s for spec, _ in given for s in spec.shape if symbol in _free(s)}
                if len(holding) > 1:
                    continue
                found = preimage(size, symbol, sizes, tensor.shape[axis])
                if found is not None:
                    sizes[symbol.name] = found
                    origin[symbol.name] = f"axis {axis} of {spec.name}"
            elif len(unknown) == 1:
                rest = size.subs({size_symbol(name): value for name, value in sizes.items()})
                solutions = sympy.solve(sympy.Eq(rest, tensor.shape[axis]), symbol)
                if len(solutions) == 1 and solutions[0].is_Integer and solutions[0] >= 0:
                    sizes[symbol.name] = int(solutions[0])
                    origin[symbol.name] = f"axis {axis} of {spec.name}"


def _wrong_sizes(
    spec: InputSpec, tensor: torch.Tensor, sizes: Mapping[str, int], origin: Mapping[str, str]
) -> list[Refusal]:
    refusals = []
    for axis, (size, expected) in enumerate(
        zip(spec.shape, concrete(spec.shape, sizes), strict=True)
    ):
        if expected != tensor.shape[axis]:
            symbols = sorted(_symbols(size)) if isinstance(size, sympy.Basic) else []
            told = "; ".join(
                f"{name} is {sizes[name]} by {origin.get(name, 'default')}"
                for name in symbols
                if name in sizes
            )
            refusals.append(
                Refusal(
                    f"Axis {axis} of {spec.name} is {tensor.shape[axis]}; {expected} is expected.",
                    why=f"{spec.name} has shape {_shape_text(spec)}"
                    + (f", and {told}." if told else "."),
                )
            )
    return refusals
