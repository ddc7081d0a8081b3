"""What happens between two calls of the decoder, as modules that torch.onnx writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from cachefree.onnx.loops.choices import Beam, Greedy

__all__ = ["BeamFinish", "BeamStart", "BeamStep", "GreedyStep", "Start"]

_NEVER = -1.0e9


class Start(nn.Module):
    """A neutral cache and a mask for a prompt.

    Args:
        slots: Each the sizes of a past, where None is the batch; its fill or values; its dtype.
        beams: How often each prompt is repeated.
    """

    def __init__(
        self, slots: Sequence[tuple[Sequence[int | None], Any, torch.dtype]], beams: int
    ) -> None:
        super().__init__()
        self.slots = list(slots)
        self.beams = beams
        for place, (_, neutral, _) in enumerate(slots):
            if isinstance(neutral, torch.Tensor):
                self.register_buffer(f"first_{place}", neutral)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        """Tokens (R, S), mask (R, S), finished (R), and the cache; R is the batch times beams."""
        if self.beams > 1:
            batch, length = ids.shape
            ids = ids.unsqueeze(1).expand(batch, self.beams, length).reshape(-1, length)
            mask = mask.unsqueeze(1).expand(batch, self.beams, length).reshape(-1, length)
        rows = ids.shape[0]
        cache = []
        for place, (sizes, neutral, dtype) in enumerate(self.slots):
            shape = [rows if size is None else size for size in sizes]
            if isinstance(neutral, torch.Tensor):
                cache.append(getattr(self, f"first_{place}").expand(shape).clone())
            else:
                cache.append(torch.full(shape, neutral, dtype=dtype))
        finished = torch.zeros(rows, dtype=torch.bool)
        return (ids.clone(), mask.clone(), finished, *cache)


class GreedyStep(nn.Module):
    """The likeliest tokens behind what is there."""

    def __init__(self, choice: Greedy) -> None:
        super().__init__()
        self.choice = choice

    def forward(
        self,
        logits: torch.Tensor,
        mask: torch.Tensor,
        sequences: torch.Tensor,
        finished: torch.Tensor,
    ) -> Any:
        """Whether to go on, the new tokens (R, 1), mask, sequences and finished rows."""
        tokens = logits[:, -1].float().argmax(-1)
        if self.choice.ends:
            tokens = torch.where(finished, self.choice.fill, tokens)
            finished = finished | _is_end(tokens, self.choice.ends)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        new = tokens.unsqueeze(1).to(sequences.dtype)
        go_on = ~finished.all()
        return go_on, new, mask, torch.cat([sequences, new], 1), finished.clone()


class BeamStart(nn.Module):
    """The beams before the first step: all are the prompt, and one of them counts."""

    def __init__(self, choice: Beam) -> None:
        super().__init__()
        self.beams = choice.num_beams

    def forward(self, ids: torch.Tensor) -> Any:
        """Running beams, their scores, finished ones, lengths, scores, which are, open prompts."""
        batch, length = ids.shape
        beams = ids.unsqueeze(1).expand(batch, self.beams, length)
        zeros = torch.zeros(batch, self.beams)
        later = torch.arange(self.beams) > 0
        scores = torch.where(later, _NEVER, zeros)
        never = zeros + _NEVER
        lengths = torch.zeros(batch, self.beams, dtype=torch.int64)
        is_finished = torch.zeros(batch, self.beams, dtype=torch.bool)
        is_open = torch.ones(batch, 1, dtype=torch.bool)
        return beams.clone(), scores, beams.clone(), lengths, never, is_finished, is_open


class BeamStep(nn.Module):
    """One token for each beam; see `cachefree.onnx.beams`."""

    def __init__(self, choice: Beam) -> None:
        super().__init__()
        self.choice = choice

    def forward(
        self,
        logits: torch.Tensor,
        mask: torch.Tensor,
        running: torch.Tensor,
        running_scores: torch.Tensor,
        sequences: torch.Tensor,
        lengths: torch.Tensor,
        scores: torch.Tensor,
        is_finished: torch.Tensor,
        is_open: torch.Tensor,
        step: torch.Tensor,
        count: torch.Tensor,
    ) -> Any:
        """Whether to go on, rows of the cache, tokens, mask, and the beams as `BeamStart` says."""
        choice, beams = self.choice, self.choice.num_beams
        batch, vocabulary = running.shape[0], logits.shape[-1]
        total = logits[:, -1].float().log_softmax(-1).reshape(batch, beams, vocabulary)
        total = (total + running_scores.unsqueeze(-1)).reshape(batch, beams * vocabulary)
        kept = min(max(2, 1 + len(choice.ends)) * beams, beams * vocabulary)
        best, places = total.topk(kept)
        parents, tokens = places // vocabulary, places % vocabulary
        candidates = torch.cat([_gather(running, parents), tokens.unsqueeze(-1)], -1)
        ended = _is_end(tokens, choice.ends) if choice.ends else tokens < 0
        hits = ended | (step + 1 >= count)
        kept_scores = best + hits.float() * _NEVER
        chosen = kept_scores.topk(beams)[1]
        new_running, new_scores = _gather(candidates, chosen), _gather(kept_scores, chosen)

        length = (step + 1).float() ** choice.length_penalty
        done = hits & (torch.arange(kept) < beams)
        full = is_finished.all(-1, keepdim=True) & choice.early_stopping
        due = (full.float() + (~is_open).float() + (~done).float()) * _NEVER + best / length
        filled = torch.full_like(sequences[:, :, :1], choice.fill)
        merged = torch.cat([scores, due], 1)
        first = merged.topk(beams)[1]
        sequences = _gather(torch.cat([torch.cat([sequences, filled], -1), candidates], 1), first)
        lengths = _gather(torch.cat([lengths, torch.zeros_like(tokens) + step + 1], 1), first)
        is_finished = _gather(torch.cat([is_finished, done], 1), first)
        scores = _gather(merged, first)

        worst = torch.where(is_finished, scores.amin(1, keepdim=True), _NEVER)
        is_open = is_open & (new_scores[:, :1] / length > worst).any(-1, keepdim=True)
        go_on = is_open.any() & ~hits.all()
        if choice.early_stopping:
            go_on = go_on & ~is_finished.all()
        rows = torch.arange(batch).unsqueeze(1) * beams + _gather(parents, chosen)
        rows = rows.reshape(-1)
        mask = torch.cat([mask[rows], torch.ones_like(mask[:, :1])], 1)
        new = new_running[:, :, -1].reshape(-1, 1)
        return (
            go_on, rows, new, mask, new_running, new_scores, sequences, lengths, scores,
            is_finished, is_open,
        )  # fmt: skip


class BeamFinish(nn.Module):
    """The best beam of each prompt."""

    def forward(
        self, sequences: torch.Tensor, lengths: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        """Token ids (B, L)."""
        seen = torch.arange(sequences.shape[2]) < ids.shape[1] + lengths[:, 0].max()
        return sequences[:, 0].index_select(1, seen.nonzero().squeeze(1))


def _is_end(tokens: torch.Tensor, ends: Sequence[int]) -> torch.Tensor:
    found = tokens == ends[0]
    for end in ends[1:]:
        found = found | (tokens == end)
    return found


def _gather(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """``values[b, places[b, i]]``."""
    if values.dim() == 3:
        places = places.unsqueeze(-1).expand(-1, -1, values.shape[2])
    return values.gather(1, places)
