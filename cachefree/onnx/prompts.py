"""The tokens that a generation starts from, as a tensor."""

from __future__ import annotations

from typing import Any

import torch

from cachefree.errors import DomainError, Refusal

__all__ = ["token_ids"]


def token_ids(value: Any, dtype: torch.dtype) -> torch.Tensor:
    """Token ids on the CPU: a tensor as it is, an array or lists of integers in the dtype.

    Raises:
        DomainError: it is no tensor, or lists that are of several lengths or hold something else.
    """
    if isinstance(value, torch.Tensor):
        return value.cpu()
    try:
        made = torch.as_tensor(value)
        is_whole = not (made.dtype.is_floating_point or made.dtype.is_complex)
        is_whole = is_whole and made.dtype is not torch.bool
    except (TypeError, ValueError, RuntimeError):
        is_whole = False
    if not is_whole:
        raise DomainError(
            Refusal(
                f"The prompt is {type(value).__name__}, which holds no token ids.",
                why="Token ids are whole numbers, as many in each row.",
                remedy="Give a tensor or lists of shape (batch, tokens); a tokenizer makes them of "
                'text: generate(tokenizer(text, return_tensors="pt").input_ids).',
            )
        )
    return made.to(dtype)
