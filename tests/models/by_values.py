"""Decoders whose code asks for the values of a mask, to leave it out where it hides nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY, DIM = 19, 8


class MaskedUnlessFull(nn.Module):
    """No mask where all tokens are seen and a causal flag does; else one that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, DIM)
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.head = nn.Linear(DIM, VOCABULARY)

    def is_full(self, mask: torch.Tensor) -> Any:
        return torch.all(mask == 1)

    def added(self, mask: torch.Tensor, new: int, all_: int) -> torch.Tensor | None:
        if self.is_full(mask) and (new == 1 or new == all_):
            return None
        lowest = torch.finfo(torch.float32).min
        hidden = torch.full((new, all_), lowest).triu(all_ - new + 1)
        return hidden.expand(mask.shape[0], 1, new, all_).masked_fill(
            mask[:, None, None] == 0, lowest
        )

    def forward(
        self, ids: torch.Tensor, attention_mask: torch.Tensor, past: Any = None
    ) -> tuple[torch.Tensor, Any]:
        q, k, v = (part.unsqueeze(1) for part in self.qkv(self.tokens(ids)).chunk(3, -1))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        new, all_ = q.shape[2], k.shape[2]
        mask = self.added(attention_mask, new, all_)
        is_causal = mask is None and new > 1
        x = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal)
        return self.head(x.squeeze(1)), (k, v)


class AnyHidden(MaskedUnlessFull):
    """Asks the other way round, by a method, of a view, and takes the answer out of the tensor."""

    def is_full(self, mask: torch.Tensor) -> Any:
        return not (mask.view(mask.shape[0], -1) != 1).any().item()


class Truths(MaskedUnlessFull):
    """The mask is one of truths."""

    def is_full(self, mask: torch.Tensor) -> Any:
        return mask.all()


class NotHidden(MaskedUnlessFull):
    """Whether none is hidden, of truths."""

    def is_full(self, mask: torch.Tensor) -> Any:
        return not torch.any(~mask)


class ContainsZero(MaskedUnlessFull):
    """Asks whether a number is in the mask, which is one of truths."""

    def is_full(self, mask: torch.Tensor) -> Any:
        return 0 not in mask


class HidesZeros(MaskedUnlessFull):
    """A causal mask, and the zeros of the one given where there are any; of integers."""

    def is_full(self, mask: torch.Tensor) -> Any:
        return mask.all()

    def seen(self, mask: torch.Tensor) -> torch.Tensor:
        return mask.bool()

    def added(self, mask: torch.Tensor, new: int, all_: int) -> torch.Tensor | None:
        causal = torch.ones(1, 1, new, all_, dtype=torch.bool).tril(all_ - new)
        return causal if self.is_full(mask) else causal & self.seen(mask)[:, None, None]


class HidesItsZeros(HidesZeros):
    """Asks whether 0 is in it."""

    def is_full(self, mask: torch.Tensor) -> Any:
        return 0 not in mask


class HidesUntrue(HidesZeros):
    """Asks whether any is not true."""

    def is_full(self, mask: torch.Tensor) -> Any:
        return not (~mask.bool()).any()


class HidesAllButOnes(HidesZeros):
    """A wrong sibling: what is neither 0 nor 1 is hidden, too, if something is 0."""

    def seen(self, mask: torch.Tensor) -> torch.Tensor:
        return mask == 1


class MakesItsMask(MaskedUnlessFull):
    """Where no mask is given, one of ones is made, and then asked about."""

    def forward(
        self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None, past: Any = None
    ) -> tuple[torch.Tensor, Any]:
        if attention_mask is None:
            all_ = ids.shape[1] + (0 if past is None else past[0].shape[2])
            attention_mask = torch.ones(ids.shape[0], all_, dtype=torch.long)
        return super().forward(ids, attention_mask, past)


class MakesAndWrites(MaskedUnlessFull):
    """The mask that is made is written to before it is asked about."""

    def forward(
        self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None, past: Any = None
    ) -> tuple[torch.Tensor, Any]:
        if attention_mask is None:
            all_ = ids.shape[1] + (0 if past is None else past[0].shape[2])
            attention_mask = torch.ones(ids.shape[0], all_, dtype=torch.long)
            attention_mask[:, 0] = ids[:, 0] > 3
        return super().forward(ids, attention_mask, past)


class DoublesWhereFull(MaskedUnlessFull):
    """A wrong sibling: the path of a full mask computes something else."""

    def forward(
        self, ids: torch.Tensor, attention_mask: torch.Tensor, past: Any = None
    ) -> tuple[torch.Tensor, Any]:
        logits, present = super().forward(ids, attention_mask, past)
        return (2 * logits if torch.all(attention_mask == 1) else logits), present


class DoublesLaterWhereFull(MaskedUnlessFull):
    """A wrong sibling: only later calls do."""

    def forward(
        self, ids: torch.Tensor, attention_mask: torch.Tensor, past: Any = None
    ) -> tuple[torch.Tensor, Any]:
        logits, present = super().forward(ids, attention_mask, past)
        if past is not None and torch.all(attention_mask == 1):
            logits = 2 * logits
        return logits, present


class SeesAllWhereFull(MaskedUnlessFull):
    """A wrong sibling: a full mask is left out where the causal flag is not enough."""

    def added(self, mask: torch.Tensor, new: int, all_: int) -> torch.Tensor | None:
        return None if self.is_full(mask) else super().added(mask, new, all_)


class OneIsSeen(MaskedUnlessFull):
    """Neither answer tells what every element is."""

    def is_full(self, mask: torch.Tensor) -> Any:
        return (mask == 1).any()


class WrittenBefore(MaskedUnlessFull):
    """What is asked about was written to, so that it is no input any more."""

    def is_full(self, mask: torch.Tensor) -> Any:
        seen = mask == 1
        seen[:, 0] = True
        return seen.all()


class WrittenAsData(MaskedUnlessFull):
    """What is asked about was written to through ``.data``, which counts no writes."""

    def is_full(self, mask: torch.Tensor) -> Any:
        seen = mask == 1
        seen.data[:, 0] = True
        return seen.all()


class CopyWrittenAsData(MaskedUnlessFull):
    """The whole mask is read under another shape, and then written to through ``.data``."""

    def is_full(self, mask: torch.Tensor) -> Any:
        mask = mask[:, None]
        mask[:, :, :1].data.fill_(1)
        return (mask == 1).all()


class TwoNumbers(MaskedUnlessFull):
    """Asks whether all is 1, and then whether all is 0."""

    def is_full(self, mask: torch.Tensor) -> Any:
        return torch.all(mask == 1) or torch.all(mask == 0)


class KeepsATable(MaskedUnlessFull):
    """Keeps a table of turns, and a longer one from the first call that needs it."""

    def __init__(self, rows: int = 16) -> None:
        super().__init__()
        self.register_buffer("turns", self.made(rows), persistent=False)

    def made(self, rows: int) -> torch.Tensor:
        return torch.outer(torch.arange(rows).float(), torch.arange(1, 4).float()).cos()

    def forward(
        self, ids: torch.Tensor, attention_mask: torch.Tensor, past: Any = None
    ) -> tuple[torch.Tensor, Any]:
        all_ = ids.shape[1] + (0 if past is None else past[0].shape[2])
        if all_ > self.turns.shape[0]:
            self.turns = self.made(all_)
        logits, present = super().forward(ids, attention_mask, past)
        return logits + self.turns[all_ - ids.shape[1] : all_].sum(-1, keepdim=True), present
