"""Where an encoder ends inside a model: the one value through which its inputs reach the decoder.

A model that takes the encoder's inputs and the decoder's in one call is parted there, so that the
one graph is the decoder and does not run the encoder again on later calls.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import sympy
import torch

from cachefree.terms import Term, operands, topological

__all__ = ["Encoder", "bottleneck", "is_needed_whole"]

aten = torch.ops.aten
STATES = "encoder_hidden_states"

_PAIRS = (
    "matmul",
    "bmm",
    "baddbmm",
    "mm",
    "scaled_dot_product_attention",
    "einsum",
)
_SEQUENTIAL = (
    "conv1d",
    "conv2d",
    "conv3d",
    "convolution",
    "conv_transpose1d",
    "gru",
    "lstm",
    "rnn_tanh",
    "rnn_relu",
    "cumsum",
    "fft_fft",
    "avg_pool1d",
    "max_pool1d",
)


@dataclass(frozen=True)
class Encoder:
    """The encoder's part of a model.

    Attributes:
        inputs: What it takes.
        output: What it gives, as a value of the model's own path.
        states: The input of the one graph that takes it.
        only: Inputs that nothing but the encoder uses.
        is_needed_whole: Whether the one graph reads the states on later calls too.
    """

    inputs: tuple[Term, ...]
    output: Term
    states: Term
    only: tuple[Term, ...]
    is_needed_whole: bool

    def only_it_reads(self, outputs: Sequence[Term]) -> bool:
        """Whether the one graph still reads nothing that the encoder alone is to read."""
        return not set(self.only) & set(topological(outputs))


def bottleneck(values: Sequence[Term], decoders: Iterable[Term]) -> Term | None:
    """The last value that every way from inputs to ``values`` goes through, if it is an encoder's.

    Args:
        values: What the cache is filled with from the encoder.
        decoders: Inputs that are no encoder's.

    Returns:
        None where there is none, or where no row is mixed with others on the way to it: what comes
        before is then a projection of the rows, and no encoder.
    """
    order = [term for term in topological(values) if term.op != "attribute"]
    moved = _that_depend_on_inputs(order)
    if any(term in moved for term in decoders):
        return None
    order = [term for term in order if term in moved]
    place = {term: number for number, term in enumerate(order)}
    furthest = -1  # how far an edge from what comes before reaches
    found: list[Term] = []
    reach = _reach(order, place, values)
    for number, term in enumerate(order):
        if furthest <= number and term.op != "input":
            found.append(term)
        furthest = max(furthest, reach[term])
    mixers = [term for term in order if _mixes_rows(term, moved)]
    if not mixers:
        return None
    ends = [term for term in found if place[term] >= place[mixers[-1]] and _is_states(term)]
    own = [term for term in ends if _belongs(term, mixers[-1], values[0])]
    return own[-1] if own else next(iter(ends), None)


def _is_states(term: Term) -> bool:
    return (
        term.shape is not None
        and len(term.sizes) > 2
        and term.dtype is not None
        and term.dtype.is_floating_point
    )


def _belongs(term: Term, mixer: Term, value: Term) -> bool:
    """Whether a term is of the encoder's module, by where the decoder's own terms are."""
    path = _module(mixer)
    return _common(_module(term), path) > _common(_module(value), path)


def _module(term: Term) -> list[str]:
    return term.line.module.split(".") if term.line is not None and term.line.module else []


def _common(one: list[str], other: list[str]) -> int:
    """The number of leading names that two module paths share."""
    return next(
        (number for number, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )


def _that_depend_on_inputs(order: Iterable[Term]) -> set[Term]:
    moved: set[Term] = set()
    for term in order:
        if term.op == "input" or any(operand in moved for operand in operands(term)):
            moved.add(term)
    return moved


def _reach(
    order: Sequence[Term], place: dict[Term, int], values: Sequence[Term]
) -> dict[Term, int]:
    """The place of the last use of each term; what is asked for is used at the end."""
    reach = {term: place[term] for term in order}
    for number, term in enumerate(order):
        for operand in operands(term):
            if operand in reach:
                reach[operand] = number
    reach.update({value: len(order) for value in values if value in reach})
    return reach


def _mixes_rows(term: Term, moved: set[Term]) -> bool:
    name = term.name.split(".")[0]
    inner = [operand for operand in operands(term) if operand in moved]
    return (name in _PAIRS and len(inner) > 1) or (name in _SEQUENTIAL and bool(inner))


def is_needed_whole(
    states: Term, outputs: Sequence[Term], lengths: Collection[sympy.Symbol]
) -> bool:
    """Whether the states are read other than by the cut that leaves the rows out that are past.

    Args:
        states: The input that stands for them.
        outputs: The one graph's outputs.
        lengths: The numbers of rows that are past: where a cut begins.
    """
    pending, seen = list(outputs), set(outputs)
    while pending:
        term = pending.pop()
        if term is states:
            return True
        is_cut = term.op is aten.slice.Tensor and term.args[0] is states
        if is_cut and term.args[2] in lengths and term.args[3] in term.args[0].sizes:
            continue
        for operand in operands(term):
            if operand not in seen:
                seen.add(operand)
                pending.append(operand)
    return False
