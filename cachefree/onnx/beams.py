"""Beam search, as transformers does it, so that the tokens are the same."""

from __future__ import annotations

from typing import Any

import torch

from cachefree.onnx.stepping import Stepper

__all__ = ["search"]

_NEVER = -1.0e9


def search(stepper: Stepper, options: Any) -> torch.Tensor:
    """Continues token ids by the beam whose mean log probability is the highest.

    The rules are those of ``transformers.GenerationMixin._beam_search``: K (1 + ends) candidates
    are kept at each step, those that end among the first K are finished, and the search is over
    when no running beam can become better than the worst finished one.

    Args:
        stepper: At the prompt.
        options: Of the generation.

    Returns:
        Token ids, the prompt before them; rows that end early are filled up.
    """
    beams = _Beams(stepper, options)
    for step in range(options.max_new_tokens):
        if not beams.step(stepper, is_last=step + 1 == options.max_new_tokens):
            break
        if options.progress is not None:
            options.progress(step + 1, options.max_new_tokens)
    return beams.best(stepper.axis)


class _Beams:
    def __init__(self, stepper: Stepper, options: Any) -> None:
        self.options = options
        self.count = options.num_beams
        prompt = stepper.new if stepper.axis == 1 else stepper.new.T
        self.dtype, prompt = prompt.dtype, prompt.long()
        self.batch, self.prompt = prompt.shape
        shape = (self.batch, self.count, self.prompt + options.max_new_tokens)
        self.running = torch.full(shape, options.fill)
        self.running[:, :, : self.prompt] = prompt[:, None]
        self.sequences = self.running.clone()
        self.lengths = torch.zeros(shape[:2], dtype=torch.int64)
        self.running_scores = torch.zeros(shape[:2])
        self.running_scores[:, 1:] = _NEVER
        self.scores = torch.full(shape[:2], _NEVER)
        self.is_finished = torch.zeros(shape[:2], dtype=torch.bool)
        self.is_open = torch.ones(self.batch, 1, dtype=torch.bool)
        self.ends = torch.tensor(options.eos, dtype=torch.int64)
        self.new = 0
        self.is_first = True

    def step(self, stepper: Stepper, *, is_last: bool) -> bool:
        """One token for each beam; whether to go on."""
        scores = stepper.scores(self.options.prefill_chunk if self.is_first else None)
        if self.is_first:  # one row a prompt was run, and each is the first of its beams
            scores = scores.repeat_interleave(self.count, 0)
        kept = max(2, 1 + len(self.ends)) * self.count
        vocabulary = scores.shape[-1]
        total = scores.log_softmax(-1).view(self.batch, self.count, -1)
        total = (total + self.running_scores[:, :, None]).view(self.batch, -1)
        best, places = total.topk(min(kept, total.shape[-1]))
        parents, tokens = places // vocabulary, places % vocabulary
        candidates = _gather(self.running, parents)
        candidates[:, :, self.prompt + self.new] = tokens
        hits = torch.isin(tokens, self.ends) | is_last
        running = best + hits.float() * _NEVER
        chosen = running.topk(self.count)[1]
        self.running, self.running_scores = _gather(candidates, chosen), _gather(running, chosen)
        self._finish(candidates, best, hits)
        self.new += 1
        possible = self.running_scores[:, :1] / self.new**self.options.length_penalty
        worst = torch.where(self.is_finished, self.scores.amin(1, keepdim=True), _NEVER)
        self.is_open &= (possible > worst).any(-1, keepdim=True)
        is_full = bool(self.is_finished.all()) and self.options.early_stopping
        if not bool(self.is_open.any()) or is_full or bool(hits.all()):
            return False
        self._go_on(stepper, _gather(parents, chosen))
        return True

    def _finish(self, candidates: torch.Tensor, best: torch.Tensor, hits: torch.Tensor) -> None:
        is_top = torch.arange(hits.shape[1]) < self.count
        done = hits & is_top
        scores = best / (self.new + 1) ** self.options.length_penalty
        full = self.is_finished.all(-1, keepdim=True) & self.options.early_stopping
        scores = scores + (full.float() + (~self.is_open).float() + (~done).float()) * _NEVER
        merged = torch.cat([self.scores, scores], 1)
        places = merged.topk(self.count)[1]
        lengths = torch.full(hits.shape, self.new + 1)
        self.sequences = _gather(torch.cat([self.sequences, candidates], 1), places)
        self.lengths = _gather(torch.cat([self.lengths, lengths], 1), places)
        self.scores = _gather(merged, places)
        self.is_finished = _gather(torch.cat([self.is_finished, done], 1), places)

    def _go_on(self, stepper: Stepper, parents: torch.Tensor) -> None:
        each = 1 if self.is_first else self.count
        parents = torch.zeros_like(parents) if self.is_first else parents
        rows = (torch.arange(self.batch)[:, None] * each + parents).flatten()
        self.is_first = False
        stepper.reorder(rows)
        tokens = self.running[:, :, self.prompt + self.new - 1].reshape(-1)
        stepper.add(tokens.to(self.dtype).unsqueeze(stepper.axis))

    def best(self, axis: int) -> torch.Tensor:
        """The best beam of each prompt."""
        length = self.prompt + int(self.lengths[:, 0].max())
        ids = self.sequences[:, 0, :length].to(self.dtype)
        return ids if axis == 1 else ids.T.contiguous()


def _gather(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """``values[b, places[b, i]]``."""
    while places.dim() < values.dim():
        places = places.unsqueeze(-1)
    return torch.take_along_dim(values, places, dim=1)
