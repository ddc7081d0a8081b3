"""Text generation with a cache: the first call has none, every later call carries one token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cachefree.errors import DomainError, Refusal
from cachefree.onnx.beams import search
from cachefree.onnx.metadata import FileDescription
from cachefree.onnx.stepping import Stepper

__all__ = ["Options", "choose_tokens", "generate"]


@dataclass(frozen=True)
class Options:
    """How tokens are chosen, see `OnnxDecoder.generate`."""

    max_new_tokens: int
    eos: tuple[int, ...] = ()
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    pad: int | None = None
    seed: int | None = None
    prefill_chunk: int | None = None
    streamer: Any = None
    progress: Callable[[int, int], None] | None = None

    def check(self) -> None:
        """Refuses options that contradict one another, before anything runs."""
        if self.num_beams < 1 or (self.num_beams > 1 and self.do_sample):
            raise DomainError(
                Refusal(
                    f"num_beams={self.num_beams} with do_sample={self.do_sample} is not done.",
                    why="Beams are searched, and not drawn.",
                    remedy="Use num_beams=1 to draw tokens, or leave do_sample out.",
                )
            )
        if self.prefill_chunk is not None and self.prefill_chunk < 1:
            raise DomainError(
                Refusal(
                    f"prefill_chunk={self.prefill_chunk} is no number of tokens.",
                    remedy="Give 1 or more, or leave it out for the whole prompt at once.",
                )
            )
        if self.num_beams > 1 and self.streamer is not None:
            raise DomainError(
                Refusal(
                    "A beam search has no tokens to stream.",
                    why="Which beam is the best is known at its end.",
                    remedy="Leave streamer= out, or use num_beams=1.",
                )
            )

    @property
    def fill(self) -> int:
        """What stands behind the end of a row."""
        if self.pad is not None:
            return self.pad
        return self.eos[0] if self.eos else -1


def generate(
    decoder: Any,
    description: FileDescription,
    input_ids: torch.Tensor,
    inputs: Mapping[str, Any],
    options: Options,
) -> torch.Tensor:
    """Continues token ids, as `OnnxDecoder.generate` says.

    ``decoder`` is called by input names, gives a dict by output name, and has ``next_cache`` and
    ``reordered``; the ``description`` says which input takes the tokens and which output scores
    them.
    """
    options.check()
    stepper = Stepper(decoder, description, input_ids, inputs)
    if options.num_beams > 1:
        return search(stepper, options)
    generator = torch.Generator()
    if options.seed is not None:
        generator.manual_seed(options.seed)
    else:
        generator.seed()
    axis = stepper.axis
    ids = stepper.new
    finished = torch.zeros(stepper.batch, dtype=torch.bool)
    ends = torch.tensor(options.eos, dtype=torch.int64)
    if options.streamer is not None:
        options.streamer.put(ids)
    for step in range(options.max_new_tokens):
        scores = stepper.scores(options.prefill_chunk)
        chosen = (
            choose_tokens(scores, options.temperature, options.top_k, options.top_p, generator)
            if options.do_sample
            else scores.argmax(-1)
        )
        if options.eos:
            chosen = chosen.masked_fill(finished, options.fill)
            finished |= torch.isin(chosen, ends)
        new = chosen.to(ids.dtype).unsqueeze(axis)
        ids = torch.cat([ids, new], axis)
        if options.streamer is not None:
            options.streamer.put(chosen)
        if options.progress is not None:
            options.progress(step + 1, options.max_new_tokens)
        if options.eos and bool(finished.all()):
            break
        stepper.add(new)
    if options.streamer is not None:
        options.streamer.end()
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
