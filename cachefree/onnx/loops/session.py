"""A file that generates by itself, on ONNX Runtime."""

from __future__ import annotations

import torch

from cachefree.errors import CacheFreeError, DomainError, Refusal
from cachefree.onnx.loops.turns import turns_inside
from cachefree.onnx.metadata import FileDescription
from cachefree.onnx.prompts import token_ids
from cachefree.onnx.roles import is_mask
from cachefree.onnx.runtime import TensorSession

__all__ = ["OnnxGenerator"]


class OnnxGenerator:
    """A whole generation in one file. Made by `load_onnx` of what ``to_onnx(loop=…)`` wrote.

    Attributes:
        session: The ``onnxruntime.InferenceSession``.
    """

    def __init__(
        self,
        session: TensorSession,
        description: FileDescription,
        beams: int,
        ends: tuple[int, ...],
    ) -> None:
        self._session = session
        self._description = description
        self._beams = beams
        self._ends = ends
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
            DomainError: the ids or the mask have another shape or dtype, there is padding that the
                model takes no mask for, or a call of the decoder is outside the domain.
        """
        ids = token_ids(input_ids, torch.int64)
        given = torch.ones_like(ids) if attention_mask is None else attention_mask
        mask = token_ids(given, torch.int64)
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
        if not mask.all() and not any(map(is_mask, self._description.interface.inputs)):
            raise DomainError(
                Refusal(
                    "There is padding, and the model takes no mask.",
                    why="It would take the padding for tokens.",
                    remedy="Generate from one prompt at a time, or from prompts of one length.",
                )
            )
        rows, length = ids.shape
        inside, outside = turns_inside(
            self._description, rows * self._beams, length, max_new_tokens
        )
        if outside is not None and (self._beams > 1 or not inside):
            raise outside
        found = self._run(ids, mask, inside)
        if outside is not None and not self._has_ended(found[:, length:], inside):
            raise outside
        return found

    def _has_ended(self, new: torch.Tensor, most: int) -> bool:
        """Whether a generation is over before the turns that it may take, or with the last one."""
        ends = torch.tensor(self._ends, dtype=torch.int64)
        return new.shape[1] < most or bool(torch.isin(new, ends).any(1).all())

    def _run(self, ids: torch.Tensor, mask: torch.Tensor, count: int) -> torch.Tensor:
        inputs = (ids.numpy(), mask.numpy(), torch.tensor(count).numpy())
        names = ("input_ids", "attention_mask", "max_new_tokens")
        try:
            (found,) = self.session.run(["sequences"], dict(zip(names, inputs, strict=True)))
        except Exception as error:
            raise CacheFreeError(
                Refusal(
                    "ONNX Runtime could not run the loop.",
                    why=str(error).split("\n")[0],
                    remedy=f"The prompt was {tuple(ids.shape)}, and {count} tokens due.",
                )
            ) from error
        return torch.from_numpy(found)
