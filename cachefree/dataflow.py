"""Where the tensors of a path come from: which call of a torch function made each of them.

Two paths that call the same functions of tensors of the same sizes may still differ in *which*
tensors they hand on. So every call is written down with the sources of its operands:

- ``("call", n, k)``: the k-th tensor that call number n returned;
- ``("seen", n, k)``: none returned it; it is the k-th such tensor that call number n was given;
- ``("input", path)``: the model was called with it;
- ``("own", id)``: a tensor of the model, or any other that is no fake one;
- ``("of", name, sources)``: what an attribute such as ``x.T`` gives.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["Dataflow", "Source", "resolved"]

Source = tuple[Any, ...]


class Dataflow:
    """The source of every tensor of a run."""

    def __init__(self) -> None:
        self._sources: dict[int, tuple[weakref.ref[torch.Tensor], Source]] = {}
        self._seen = (-1, 0)  # the call that was given tensors that none returned, and how many

    def put(self, tensor: torch.Tensor, source: Source) -> None:
        """Says where a tensor comes from."""
        self._sources[id(tensor)] = (weakref.ref(tensor), source)

    def of(self, value: Any, call: int) -> Any:
        """The sources of the tensors of an operand, in its tuples and lists; None for the rest.

        Args:
            value: The operand.
            call: The number of the call that it is an operand of.
        """
        if isinstance(value, torch.Tensor):
            return self._of_tensor(value, call)
        if isinstance(value, (tuple, list)):
            return tuple([self.of(part, call) for part in value])
        return None

    def _of_tensor(self, tensor: torch.Tensor, call: int) -> Source:
        known, source = self._sources.get(id(tensor), (None, ()))
        if known is None or known() is not tensor:  # an identity may be given out twice
            source = ("own", id(tensor))
            if isinstance(tensor, FakeTensor):
                self._seen = (call, self._seen[1] + 1 if self._seen[0] == call else 0)
                source = ("seen", *self._seen)
            self.put(tensor, source)
        return source

    def made(self, result: Any, call: int, operands: Iterable[Any]) -> dict[int, Source]:
        """Writes down what a call returned.

        Returns:
            Which of the tensors that it returned are operands of its own, such as
            ``x.contiguous()`` where ``x`` is.
        """
        given = {id(tensor) for operand in operands for tensor in _tensors(operand)}
        same = {}
        for k, tensor in enumerate(_tensors(result)):
            if id(tensor) in given:
                same[k] = self._of_tensor(tensor, call)
            else:
                self.put(tensor, ("call", call, k))
        return same

    def derived(self, result: Any, name: str, call: int, operands: Iterable[Any]) -> None:
        """Writes down what a function returned that is no call of the path."""
        parts = list(_tensors(result))
        if not parts:
            return
        operands = list(operands)
        given = {id(tensor) for operand in operands for tensor in _tensors(operand)}
        source = tuple(self.of(operand, call) for operand in operands)
        for k, tensor in enumerate(parts):
            if id(tensor) not in given:
                self.put(tensor, ("of", name, k, source))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def is_own(source: Source) -> bool:
    """Whether a source is a tensor of the model, or made of such without a call."""
    if source[0] != "of":
        return bool(source[0] == "own")
    return all(part is None or is_own(part) for part in source[3])


def resolved(sources: Any, same: Mapping[Source, Source]) -> Any:
    """Sources with those that are the same tensor as another one replaced.

    Args:
        sources: As `Dataflow.of` gives them.
        same: Source → the source of the tensor that it is.
    """
    if not same or not isinstance(sources, tuple):
        return sources
    if sources[:1] in (("call",), ("seen",), ("own",), ("input",)):
        while sources in same:
            sources = same[sources]
        return sources
    return tuple([resolved(part, same) for part in sources])
