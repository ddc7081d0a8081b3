"""Arguments by name or in plain containers, as flat tensors by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from cachefree.errors import DomainError, Refusal
from cachefree.onnx.names import steps_of
from cachefree.spec import InputSpec, Interface

__all__ = ["bind_arguments"]


def bind_arguments(
    interface: Interface, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Finds each input's tensor in a call.

    Args:
        interface: The inputs, under their names in the file.
        args: Arguments by position, in the order of the model's own.
        kwargs: Arguments by input name, or by the model's own argument name in plain containers.

    Returns:
        Input name → tensor. Inputs of a cache that is left out are not in it.

    Raises:
        DomainError: an argument is unknown, missing, given twice, or made otherwise than the graph
            takes it.
    """
    arguments = _arguments(interface)
    if len(args) > len(arguments):
        raise DomainError(
            f"{len(args)} arguments were given by position; the graph takes {', '.join(arguments)}."
        )
    given: dict[str, torch.Tensor] = {}
    for name, value in [*zip(arguments, args, strict=False), *kwargs.items()]:
        found = dict(_tensors_of(name, value, interface, arguments))
        if twice := found.keys() & given.keys():
            raise DomainError(f"{', '.join(sorted(twice))} was given twice.")
        given.update(found)
    _check_complete(interface, given)
    return given


def _arguments(interface: Interface) -> dict[str, list[InputSpec]]:
    """The model's own arguments, in order, each with its tensors."""
    arguments: dict[str, list[InputSpec]] = {}
    for spec in interface.inputs:
        steps = steps_of(spec.path)
        arguments.setdefault(str(steps[0]) if steps else spec.name, []).append(spec)
    return arguments


def _tensors_of(
    name: str, value: Any, interface: Interface, arguments: Mapping[str, list[InputSpec]]
) -> Iterator[tuple[str, torch.Tensor]]:
    if value is None:
        return
    if any(spec.name == name for spec in interface.inputs) and not isinstance(
        value, (tuple, list, dict)
    ):
        yield name, _tensor(name, value)
        return
    specs = arguments.get(name)
    if specs is None:
        known = [spec.name for spec in interface.inputs]
        raise DomainError(
            Refusal(
                f"The graph has no input {name!r}.", remedy=f"Its inputs are {', '.join(known)}."
            )
        )
    leaves = {tuple(steps_of(name)[:1] + path): leaf for path, leaf in _leaves(value)}
    expected = {tuple(steps_of(spec.path)): spec.name for spec in specs}
    if leaves.keys() != expected.keys():
        raise DomainError(_difference(name, leaves, expected))
    for path, leaf in leaves.items():
        yield expected[path], _tensor(expected[path], leaf)


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[list[Any], Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, (*path, key))
    elif isinstance(value, (tuple, list)):
        for place, part in enumerate(value):
            yield from _leaves(part, (*path, place))
    elif value is not None:
        yield list(path), value


def _difference(name: str, leaves: Mapping[Any, Any], expected: Mapping[Any, str]) -> Refusal:
    def said(paths: Any) -> str:
        shown = sorted(".".join(map(str, path)) for path in paths)
        return ", ".join(shown[:4]) + (" …" if len(shown) > 4 else "")

    missing, more = expected.keys() - leaves.keys(), leaves.keys() - expected.keys()
    why = "; ".join(
        part
        for part in (missing and f"missing: {said(missing)}", more and f"not taken: {said(more)}")
        if part
    )
    return Refusal(f"{name} has {len(leaves)} tensors; {len(expected)} are expected.", why=why)


def _tensor(name: str, value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    if hasattr(value, "__array__"):
        return torch.as_tensor(value)
    raise DomainError(f"{name} is a {type(value).__name__}; a tensor is expected.")


def _check_complete(interface: Interface, given: Mapping[str, torch.Tensor]) -> None:
    missing = [
        spec.name for spec in interface.inputs if not spec.is_cache and spec.name not in given
    ]
    if missing:
        raise DomainError(
            f"The inputs {', '.join(missing)} are missing."
            if missing[1:]
            else f"{missing[0]} is missing."
        )
    cache = [spec.name for spec in interface.inputs if spec.is_cache]
    absent = [name for name in cache if name not in given]
    if absent and len(absent) < len(cache):
        shown = ", ".join(absent[:4]) + (" …" if len(absent) > 4 else "")
        raise DomainError(
            Refusal(
                f"The cache is there for some layers only: {len(absent)} of {len(cache)} tensors"
                " are missing.",
                why=f"missing: {shown}",
                remedy="Pass the whole cache, or none of it for the first call.",
            )
        )
