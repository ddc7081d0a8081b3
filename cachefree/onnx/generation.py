"""Text generation with a cache: the first call has none, every later call carries one token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch

from cachefree.errors import DomainError, Refusal
from cachefree.onnx.metadata import FileDescription
from cachefree.sizes import size_symbol
from cachefree.spec import InputSpec

__all__ = ["choose_tokens", "generate"]

_QUERY = size_symbol("query")


def generate(
    decoder: Any,
    description: FileDescription,
    input_ids: torch.Tensor,
    inputs: Mapping[str, Any],
    max_new_tokens: int,
    *,
    eos_token_id: int | None,
    do_sample: bool,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
) -> torch.Tensor:
    """Continues token ids, as `OnnxDecoder.generate` says.

    ``decoder`` is called by input names, gives a dict by output name, and has ``next_cache``; the
    ``description`` says which input takes the tokens and which output scores them.
    """
    tokens, axis = _token_input(description)
    generator = torch.Generator()
    if seed is not None:
        generator.manual_seed(seed)
    else:
        generator.seed()
    ids = input_ids.cpu()
    others = _Inputs(description, tokens, ids.shape[axis], 1 - axis, ids.shape[1 - axis], inputs)
    outputs = None
    finished = torch.zeros(ids.shape[1 - axis], dtype=torch.bool)
    new = ids
    for _ in range(max_new_tokens):
        cache: dict[str, torch.Tensor] = {} if outputs is None else decoder.next_cache(outputs)
        outputs = decoder(**{tokens.name: new}, **others.values, **cache)
        scores = _last_scores(outputs[description.logits], description).float().cpu()
        chosen = (
            choose_tokens(scores, temperature, top_k, top_p, generator)
            if do_sample
            else scores.argmax(-1)
        )
        if eos_token_id is not None:
            chosen = chosen.masked_fill(finished, eos_token_id)
            finished |= chosen == eos_token_id
        new = chosen.to(ids.dtype).unsqueeze(axis)
        ids = torch.cat([ids, new], axis)
        if eos_token_id is not None and bool(finished.all()):
            break
        others.step()
    return ids


def choose_tokens(
    scores: torch.Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> torch.Tensor:
    """Draws a token for each row.

    Args:
        scores: Logits, BV.
        temperature: Divides them; positive.
        top_k: Keep the K likeliest.
        top_p: Keep the likeliest whose probability together reaches this (nucleus sampling,
            arXiv:1904.09751).
        generator: The random state.

    Returns:
        Token ids, B.
    """
    if temperature <= 0:
        raise ValueError(
            f"temperature is {temperature}; it must be positive (do_sample=False takes the"
            " likeliest)"
        )
    scores = scores / temperature
    if top_k is not None:
        least = scores.topk(min(top_k, scores.shape[-1]), dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if top_p is not None:
        ordered, order = scores.softmax(-1).sort(-1, descending=True)
        is_beyond = ordered.cumsum(-1) - ordered >= top_p
        is_beyond[:, 0] = False
        scores = scores.masked_fill(is_beyond.scatter(-1, order, is_beyond), -torch.inf)
    return torch.multinomial(scores.softmax(-1), 1, generator=generator).squeeze(-1)


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
            if spec.name not in self.values and _is_mask(spec):
                self.values[spec.name] = torch.ones(batch, length, dtype=spec.dtype)
        for spec in self.specs:
            if spec.name not in self.values and _is_position(spec):
                self.values[spec.name] = self._positions(spec, length)

    def _positions(self, spec: InputSpec, length: int) -> torch.Tensor:
        masks = [self.values[mask.name] for mask in self.specs if _is_mask(mask)]
        rows = (
            (masks[0].long().cumsum(-1) - 1).clamp(min=0)
            if masks
            else torch.arange(length).expand(self.batch, -1)
        )
        positions = rows.to(spec.dtype)
        if len(spec.shape) == 1:
            return positions[0]
        return positions.T.contiguous() if spec.shape.index(_QUERY) == 0 else positions

    def step(self) -> None:
        """Goes on to the next call, with one new token."""
        for spec in self.specs:
            value = self.values.get(spec.name)
            if value is None:
                continue
            if _is_mask(spec):
                self.values[spec.name] = torch.cat([value, value.new_ones(value.shape[0], 1)], 1)
            elif _is_position(spec):
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


def _is_mask(spec: InputSpec) -> bool:
    """Whether it says for each past and new token if it counts: shape (batch, past + query)."""
    return (
        len(spec.shape) == 2
        and isinstance(spec.shape[1], sympy.Add)
        and _QUERY in spec.shape[1].free_symbols
    )


def _is_position(spec: InputSpec) -> bool:
    return "pos" in spec.path and not spec.dtype.is_floating_point and _QUERY in spec.shape
