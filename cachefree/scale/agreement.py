"""What the processes say of themselves and of a call, and what they agree on before it runs."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from cachefree.errors import CacheFreeError, DomainError, Refusal
from cachefree.onnx.domain import read_sizes
from cachefree.scale.links import Links
from cachefree.spec import Interface

__all__ = ["Said", "agreed", "same_in_all"]

Made = TypeVar("Made")


@dataclass(frozen=True)
class Said:
    """What one process knows of a call.

    Attributes:
        sizes: Symbol → size, for what its tensors tell.
        is_first: Whether it was given no cache; None where it has no slots.
        inputs: Name → a number that is another one for other values.
        refusals: Why it cannot make the call.
    """

    sizes: dict[str, int] = field(default_factory=dict)
    is_first: bool | None = None
    inputs: dict[str, int] = field(default_factory=dict)
    refusals: tuple[Refusal, ...] = ()

    @classmethod
    def of_call(cls, interface: Interface, given: Mapping[str, torch.Tensor]) -> Said:
        """What a stage's own inputs tell.

        Raises:
            DomainError: a dtype, rank or size does not fit.
        """
        sizes = read_sizes(interface, given)
        told = {
            str(symbol)
            for spec in interface.inputs
            if spec.name in given
            for size in spec.shape
            for symbol in getattr(size, "free_symbols", ())
        }
        own = [slot.past.name for slot in interface.cache]
        return cls(
            {name: size for name, size in sizes.items() if name in told},
            not any(name in given for name in own) if own else None,
            {
                spec.name: _checksum(given[spec.name])
                for spec in interface.inputs
                if not spec.is_cache
            },
        )


def agreed(said: Sequence[Said], whole: Interface) -> tuple[dict[str, int], bool]:
    """The sizes of a call, and whether it is a first one.

    Raises:
        DomainError: the same in every process: one of them cannot make the call, or they were given
            different ones.
    """
    refusals = [refusal for one in said for refusal in one.refusals]
    if refusals:
        raise DomainError(*dict.fromkeys(refusals))
    different = sorted(
        {name for one in said for name in one.inputs if one.inputs[name] != said[0].inputs[name]}
    )
    if different:
        raise DomainError(_unlike(f"{', '.join(different)} has other values in some processes"))
    firsts = {one.is_first for one in said} - {None}
    if len(firsts) > 1:
        raise DomainError(_unlike("a cache was given in some processes only"))
    is_first = firsts != {False}
    sizes: dict[str, int] = dict.fromkeys(whole.past_symbols, 0) if is_first else {}
    for one in said:
        for name, size in one.sizes.items():
            if sizes.setdefault(name, size) != size:
                raise DomainError(_unlike(f"{name} is {sizes[name]} in one and {size} in another"))
    return dict.fromkeys(whole.past_symbols, 0) | sizes, is_first


def _unlike(why: str) -> Refusal:
    return Refusal(
        "The processes did not make the same call.",
        why=f"In this call {why}.",
        remedy="Give every process the same inputs, and to each its own cache of the call before.",
    )


def _checksum(tensor: torch.Tensor) -> int:
    """A number that is another one for another shape, dtype or values."""
    held: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(held, zlib.crc32(f"{tuple(tensor.shape)} {tensor.dtype}".encode()))


def same_in_all(
    links: Links, made: Callable[[], Made], rewritten: Any, told: Any, *, are_own: bool
) -> Made:
    """What every process makes, once all have made theirs of the same model.

    Args:
        links: To the others.
        made: Makes it; it speaks to no other process.
        rewritten: The model.
        told: What else has to be the same.
        are_own: Whether the model's own weights are used.

    Raises:
        CacheFreeError: in every process, where one could not make its own, or made it of another
            model.
    """
    own: Made | None = None
    said, print_of = "", ""
    try:
        own = made()
        print_of = _fingerprint(rewritten, told, are_own=are_own)
    except Exception as error:  # noqa: BLE001 - told to all, and raised in all
        is_told = isinstance(error, CacheFreeError)
        said = str(error) if is_told else f"{type(error).__name__}: {error}"
    every = links.all_told((said, print_of))
    failed = [(number, text) for number, (text, _) in enumerate(every, start=1) if text]
    if failed:
        raise CacheFreeError(
            *(f"Stage {number} of {links.count} was not made: {text}" for number, text in failed)
        )
    if len({found for _, found in every}) > 1:
        raise CacheFreeError(
            Refusal(
                "The processes rewrote different models, or were told to part them differently.",
                why="Their parts are of one graph of one model.",
                remedy="Run the same script with the same model in each process: the same seed "
                "where its weights are random, or weights= for all.",
            )
        )
    assert own is not None
    return own


def _fingerprint(rewritten: Any, told: Any, *, are_own: bool) -> str:
    """Another text for another graph or plan, and for other weights where they are the model's."""
    lines = [str(rewritten.graph_module.graph), str(told)]
    if are_own:
        tensors = (*rewritten.named_parameters(), *rewritten.named_buffers())
        lines += [f"{name} {_checksum(tensor)}" for name, tensor in tensors]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
