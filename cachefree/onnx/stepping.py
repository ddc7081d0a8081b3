"""The calls of a generation: a prompt, whole or in parts, and then a token a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cachefree.errors import DomainError, Refusal
from cachefree.onnx.metadata import FileDescription
from cachefree.onnx.prompts import token_ids
from cachefree.onnx.roles import is_mask, is_position
from cachefree.sizes import size_symbol
from cachefree.spec import InputSpec

__all__ = ["Stepper", "take_rows"]

_QUERY = size_symbol("query")
_BATCH = size_symbol("batch")


class Stepper:
    """Calls a decoder with the tokens that are new, and keeps its cache.

    Args:
        decoder: See `generate`.
        description: What the file says of itself.
        input_ids: The prompt.
        inputs: The other inputs for it, by name.

    Attributes:
        axis: The axis of the tokens.
        batch: B.
    """

    def __init__(
        self,
        decoder: Any,
        description: FileDescription,
        input_ids: Any,
        inputs: Mapping[str, Any],
    ) -> None:
        self.decoder = decoder
        self.description = description
        self.tokens, self.axis = _token_input(description)
        self.new = token_ids(input_ids, self.tokens.dtype)
        if self.new.dim() != 2 or 0 in self.new.shape:
            raise DomainError(
                Refusal(
                    f"The prompt has shape {tuple(self.new.shape)}; it needs a token in each row.",
                    remedy="Give token ids of shape (batch, tokens), one token at least.",
                )
            )
        self.batch = self.new.shape[1 - self.axis]
        length = self.new.shape[self.axis]
        self.others = _Inputs(description, self.tokens, length, 1 - self.axis, self.batch, inputs)
        self.cache: dict[str, torch.Tensor] = {}

    def scores(self, chunk: int | None = None) -> torch.Tensor:
        """Runs the tokens that are new; the scores of what comes next, BV."""
        length = self.new.shape[self.axis]
        chunk = length if chunk is None else chunk
        outputs: Mapping[str, torch.Tensor] = {}
        for start in range(0, length, chunk):
            end = min(start + chunk, length)
            part = self.new.narrow(self.axis, start, end - start)
            others = self.others.values if chunk >= length else self.others.part(start, end, length)
            outputs = self.decoder(**{self.tokens.name: part}, **others, **self.cache)
            self.cache = self.decoder.next_cache(outputs)
        return _last_scores(outputs[str(self.description.logits)], self.description).float().cpu()

    def add(self, new: torch.Tensor) -> None:
        """Goes on to the next call."""
        self.new = new
        self.others.step()

    def reorder(self, rows: torch.Tensor) -> None:
        """Takes rows of the batch, some perhaps twice, in the cache and in the inputs."""
        if torch.equal(rows, torch.arange(self.batch)):
            return
        self.cache = self.decoder.reordered(self.cache, rows)
        self.others.reorder(rows)
        self.batch = len(rows)


def take_rows(value: torch.Tensor, spec: InputSpec, rows: torch.Tensor, batch: int) -> torch.Tensor:
    """Rows of a tensor along the axis of the batch; one without such an axis as it is."""
    for axis, size in enumerate(spec.shape):
        if _BATCH in getattr(size, "free_symbols", ()):
            each = value.shape[axis] // batch
            places = (rows[:, None] * each + torch.arange(each)).flatten()
            return value.index_select(axis, places.to(value.device))
    return value


def _token_input(description: FileDescription) -> tuple[InputSpec, int]:
    spec = next(
        (spec for spec in description.interface.inputs if spec.name == description.tokens), None
    )
    if (
        spec is None
        or description.logits is None
        or len(spec.shape) != 2
        or _QUERY not in spec.shape
    ):
        raise DomainError(
            Refusal(
                "This graph cannot generate tokens.",
                why=(
                    "It has no input of token ids, or no output with a score for each token of the"
                    " vocabulary."
                ),
                remedy=(
                    "Call it step by step; next_cache(outputs) gives the cache for the next call."
                ),
            )
        )
    return spec, spec.shape.index(_QUERY)


def _last_scores(logits: torch.Tensor, description: FileDescription) -> torch.Tensor:
    """The scores of the last token: BV."""
    spec = next(spec for spec in description.interface.outputs if spec.name == description.logits)
    if _QUERY in spec.shape:
        logits = logits.select(spec.shape.index(_QUERY), -1)
    return logits.reshape(-1, logits.shape[-1])


class _Inputs:
    """The inputs besides the tokens and the cache, from call to call."""

    def __init__(
        self,
        description: FileDescription,
        tokens: InputSpec,
        length: int,
        batch_axis: int,
        batch: int,
        given: Mapping[str, Any],
    ) -> None:
        self.specs = [s for s in description.interface.inputs if not s.is_cache and s is not tokens]
        self.batch = batch
        self.values: dict[str, Any] = {
            spec.name: given[name]
            for spec in self.specs
            for name in dict.fromkeys((spec.name, spec.path))
            if name in given
        }
        unknown = given.keys() - {name for spec in self.specs for name in (spec.name, spec.path)}
        if unknown:
            raise DomainError(f"The graph has no input {', '.join(sorted(unknown))}.")
        for spec in self.specs:
            if spec.name not in self.values and is_mask(spec):
                self.values[spec.name] = torch.ones(batch, length, dtype=spec.dtype)
        for spec in self.specs:
            if spec.name not in self.values and is_position(spec):
                self.values[spec.name] = self._positions(spec, length)

    def _positions(self, spec: InputSpec, length: int) -> torch.Tensor:
        masks = [self.values[mask.name] for mask in self.specs if is_mask(mask)]
        rows = (
            (masks[0].long().cumsum(-1) - 1).clamp(min=0)
            if masks
            else torch.arange(length).expand(self.batch, -1)
        )
        positions = rows.to(spec.dtype)
        if len(spec.shape) == 1:
            return positions[0]
        return positions.T.contiguous() if spec.shape.index(_QUERY) == 0 else positions

    def reorder(self, rows: torch.Tensor) -> None:
        """Takes rows of the batch, some perhaps twice."""
        for spec in self.specs:
            if spec.name in self.values:
                value = torch.as_tensor(self.values[spec.name])
                self.values[spec.name] = take_rows(value, spec, rows, self.batch)
        self.batch = len(rows)

    def part(self, start: int, end: int, length: int) -> dict[str, Any]:
        """What belongs to the tokens of a prompt from ``start`` to ``end``."""
        part = dict(self.values)
        for spec in self.specs:
            value = part.get(spec.name)
            for axis, size in enumerate(spec.shape if value is not None else ()):
                assert value is not None
                if size == _QUERY and value.shape[axis] == length:
                    part[spec.name] = value = value.narrow(axis, start, end - start)
                elif _QUERY in getattr(size, "free_symbols", ()):
                    part[spec.name] = value = value.narrow(axis, 0, end)
        return part

    def step(self) -> None:
        """Goes on to the next call, with one new token."""
        for spec in self.specs:
            value = self.values.get(spec.name)
            if value is None:
                continue
            if is_mask(spec):
                self.values[spec.name] = torch.cat([value, value.new_ones(value.shape[0], 1)], 1)
            elif is_position(spec):
                self.values[spec.name] = value.narrow(spec.shape.index(_QUERY), -1, 1) + 1
            elif any(_QUERY in getattr(size, "free_symbols", ()) for size in spec.shape):
                raise DomainError(
                    Refusal(
                        f"What {spec.name} is for the next token is not known.",
                        remedy=(
                            "Call the decoder step by step; next_cache(outputs) gives the cache for"
                            " the next call."
                        ),
                    )
                )
