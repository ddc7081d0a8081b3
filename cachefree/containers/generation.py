"""A rewritten model behind the ``generate`` of the model that it was made from."""

from __future__ import annotations

import copy
import functools
from typing import Any, TypeVar

import torch
from torch import nn

__all__ = ["with_generate"]

_GRANTED = ("attention_mask", "position_ids")
M = TypeVar("M", bound=nn.Module)

# What generation says on every call: results as objects, with their cache and no more.
_SAID = {
    "return_dict": True,
    "use_cache": True,
    "output_attentions": False,
    "output_hidden_states": False,
}


def with_generate(model: M, rewritten: Any) -> M:
    """The model with the rewritten one in the place of its ``forward``.

    Everything else is the model's own: its configuration, its ``generate`` and how that prepares
    inputs, its parameters. The model itself is not modified.

    Args:
        model: A model with a ``generate`` that calls the model, such as a ``PreTrainedModel``.
        rewritten: What `cachefree.rewrite` made of it.

    Returns:
        A shallow copy of the model; ``copy.generate(...)`` runs the one graph.
    """
    generating = copy.copy(model)
    for name in ("_forward_hooks", "_forward_pre_hooks"):  # the graph holds what they did
        generating.__dict__[name] = type(getattr(model, name))()

    needed = frozenset(rewritten.calling.parameters)

    @functools.wraps(model.forward)
    def forward(*args: Any, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        given = {
            name: value
            for name, value in kwargs.items()
            if not (name in _SAID and value is _SAID[name])
        }
        result = rewritten(*args, **_completed(needed, given))
        if isinstance(logits_to_keep, int) and logits_to_keep:
            result["logits"] = result["logits"][:, -logits_to_keep:]
        return result

    generating.__dict__["forward"] = forward
    return generating


def _completed(needed: frozenset[str], given: dict[str, Any]) -> dict[str, Any]:
    """The call with the mask of no padding and the positions that follow the past.

    Generation leaves out what it takes for granted.
    """
    tokens, cache = given.get("input_ids"), given.get("past_key_values")
    missing = [name for name in _GRANTED if name in needed and given.get(name) is None]
    if not missing or not isinstance(tokens, torch.Tensor):
        return given
    batch, new = tokens.shape[:2]
    past = 0 if cache is None else int(cache.get_seq_length())
    made = {
        "attention_mask": lambda: tokens.new_ones(batch, past + new),
        "position_ids": lambda: torch.arange(past, past + new, device=tokens.device).expand(
            batch, -1
        ),
    }
    return {**given, **{name: made[name]() for name in missing}}
