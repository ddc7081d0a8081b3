"""A file that generates by itself, on ONNX Runtime."""

from __future__ import annotations

import torch

from cachefree.errors import CacheFreeError, DomainError, Refusal
from cachefree.onnx.runtime import TensorSession

__all__ = ["OnnxGenerator"]


class OnnxGenerator:
    """A whole generation in one file. Made by `load_onnx` of what ``to_onnx(loop=…)`` wrote.

    Attributes:
        session: The ``onnxruntime.InferenceSession``.
    """

    def __init__(self, session: TensorSession) -> None:
        self._session = session
        self.session = session.session

    def generate(
        self,
        input_ids: torch.Tensor,
        max_new_tokens: int = 20,
        *,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Continues token ids.

        Args:
            input_ids: Token ids, BS; padding stands on the left.
            max_new_tokens: How many tokens to add at most.
            attention_mask: 1 for tokens and 0 for padding, BS; None: no padding.

        Returns:
            The ids with the new ones behind them.

        Raises:
            DomainError: the ids or the mask have another shape or dtype.
        """
        ids = input_ids.cpu()
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask.cpu()
        if ids.dim() != 2 or 0 in ids.shape or mask.shape != ids.shape:
            raise DomainError(
                Refusal(
                    f"input_ids is {tuple(ids.shape)} and attention_mask {tuple(mask.shape)}.",
                    why="Both are (batch, tokens), with a token in each row at least.",
                    remedy="Pass both in that shape, or leave the mask out.",
                )
            )
        if ids.dtype != torch.int64 or mask.dtype != torch.int64 or max_new_tokens < 0:
            raise DomainError(
                Refusal(
                    f"input_ids is {ids.dtype}, attention_mask {mask.dtype}, max_new_tokens"
                    f" {max_new_tokens}.",
                    why="The file takes ids and masks of torch.int64, and 0 tokens or more.",
                    remedy="Pass input_ids.long() and attention_mask.long().",
                )
            )
        inputs = (ids.numpy(), mask.numpy(), torch.tensor(max_new_tokens).numpy())
        names = ("input_ids", "attention_mask", "max_new_tokens")
        try:
            (found,) = self.session.run(["sequences"], dict(zip(names, inputs, strict=True)))
        except Exception as error:
            raise CacheFreeError(
                Refusal(
                    "ONNX Runtime could not run the loop.",
                    why=str(error).split("\n")[0],
                    remedy=f"The prompt was {tuple(ids.shape)}, and {max_new_tokens} tokens due.",
                )
            ) from error
        return torch.from_numpy(found)
