"""Decoders whose code asks for values of masks and positions that it makes of sizes alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VOCABULARY, DIM, LONGEST = 19, 8, 40


class AsksOfItsMask(nn.Module):
    """A mask of what is later, put on where it hides anything."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, DIM), nn.Embedding(LONGEST, DIM)
        self.qkv, self.head = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, VOCABULARY)
        self.register_buffer("table", torch.ones(LONGEST))

    def masked(self, scores: torch.Tensor, ids: torch.Tensor, new: int, all_: int) -> torch.Tensor:
        hidden = torch.triu(torch.ones(new, all_, dtype=torch.uint8), 1 + all_ - new).bool()
        if hidden.any():
            scores = scores.masked_fill(hidden, -1e30)
        return scores

    def positions(self, past: int, new: int) -> torch.Tensor:
        return torch.arange(past, past + new)

    def forward(self, ids: torch.Tensor, past: Any = None) -> tuple[torch.Tensor, Any]:
        seen = 0 if past is None else past[0].shape[1]
        x = self.tokens(ids) + self.places(self.positions(seen, ids.shape[1]))
        q, k, v = self.qkv(x).chunk(3, -1)
        if past is not None:
            k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
        scores = self.masked(q @ k.transpose(1, 2), ids, q.shape[1], k.shape[1])
        return self.head(scores.softmax(-1) @ v), (k, v)


class OfAWindow(AsksOfItsMask):
    """Two comparisons of positions, and the question the other way round."""

    def masked(self, scores: torch.Tensor, ids: torch.Tensor, new: int, all_: int) -> torch.Tensor:
        query, key = torch.arange(all_ - new, all_)[:, None], torch.arange(all_)[None]
        seen = (key <= query) & (key > query - 4)
        return scores if torch.all(seen) else scores.masked_fill(~seen, -1e30)


class JoinsItsMask(AsksOfItsMask):
    """Ones for what is past, a triangle for what is new, written in place, and a sum."""

    def masked(self, scores: torch.Tensor, ids: torch.Tensor, new: int, all_: int) -> torch.Tensor:
        mask = torch.ones(ids.shape[0], new, new)
        mask.tril_()
        mask = torch.cat([torch.ones(ids.shape[0], new, all_ - new), mask], dim=-1)
        hidden = mask < 0.5
        return scores if hidden.sum() == 0 else scores.masked_fill(hidden, -1e30)


class Contains(AsksOfItsMask):
    """Whether a number is in the mask."""

    def masked(self, scores: torch.Tensor, ids: torch.Tensor, new: int, all_: int) -> torch.Tensor:
        seen = torch.ones(new, all_).tril(all_ - new)
        return scores.masked_fill(seen == 0, -1e30) if 0 in seen else scores


class OfSameLength(AsksOfItsMask):
    """Two triangles of small integers, like the tokens, added up."""

    def masked(self, scores: torch.Tensor, ids: torch.Tensor, new: int, all_: int) -> torch.Tensor:
        ones = scores.new_ones((new, all_), dtype=torch.uint8)
        shift = new - (all_ - 6) if all_ > 6 else new
        hidden = (torch.triu(ones, 1 + all_ - new) + torch.tril(ones, -shift)).bool()
        return scores.masked_fill(hidden, -1e30) if hidden.any().item() else scores


class AsksForTheLastPosition(AsksOfItsMask):
    """The largest position as a number, which bounds what may be asked for."""

    def positions(self, past: int, new: int) -> torch.Tensor:
        places = super().positions(past, new)
        if int(places.max()) + 1 > LONGEST:
            raise ValueError("too long")
        return torch.arange(places[-1].item() + 1)[past:]


class AnotherBeyond(AsksOfItsMask):
    """A mask of later rows that is written where there are any, and another path there."""

    def masked(self, scores: torch.Tensor, ids: torch.Tensor, new: int, all_: int) -> torch.Tensor:
        late = torch.zeros(all_)
        late[9:] = 1
        scores = super().masked(scores, ids, new, all_)
        return 2 * scores if late.any() else scores


class WithAnInput(AnotherBeyond):
    """One element is a token."""

    def masked(self, scores: torch.Tensor, ids: torch.Tensor, new: int, all_: int) -> torch.Tensor:
        late = torch.zeros(all_, all_)
        late.view(-1)[0] = ids[0, 0]
        return 2 * scores if late.any() else scores


class WithATable(AnotherBeyond):
    """The values are those of a buffer."""

    def masked(self, scores: torch.Tensor, ids: torch.Tensor, new: int, all_: int) -> torch.Tensor:
        return 2 * scores if self.table[:all_].any() else scores


class WrittenAsData(AnotherBeyond):
    """What is asked about was written to through ``.data``."""

    def masked(self, scores: torch.Tensor, ids: torch.Tensor, new: int, all_: int) -> torch.Tensor:
        late = torch.zeros(all_)
        late.data[:1] = ids[0, 0]
        return 2 * scores if late.any() else scores


class EveryFifth(AnotherBeyond):
    """A question whose answer is no bound of sizes that could be shown."""

    def masked(self, scores: torch.Tensor, ids: torch.Tensor, new: int, all_: int) -> torch.Tensor:
        return 2 * scores if (torch.arange(all_)[-1] % 5 == 4) else scores
