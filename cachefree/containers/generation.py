"""A rewritten model behind the ``generate`` of the model that it was made from."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from cachefree.errors import CacheFreeError, Refusal
from cachefree.structure import flatten

__all__ = ["with_generate"]

_GRANTED = ("attention_mask", "position_ids")
_DECODERS_MASK = "decoder_attention_mask"
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
    inputs, its encoder, its parameters. The model itself is not modified.

    Args:
        model: A model with a ``generate`` that calls the model, such as a ``PreTrainedModel``.
        rewritten: What `cachefree.rewrite` made of it.

    Returns:
        A shallow copy of the model; ``copy.generate(...)`` runs the one graph.

    Raises:
        CacheFreeError: the model has no ``generate``.
    """
    if not callable(getattr(model, "generate", None)):
        raise CacheFreeError(
            Refusal(
                f"{type(model).__name__} has no generate().",
                why="It belongs to the model: transformers gives it to models that can generate, "
                "and older versions give it to others.",
                remedy="Pass the model that has it, such as a ...ForCausalLM; or call "
                "load_onnx(...).generate.",
            )
        )
    generating = copy.copy(model)
    for name in ("_forward_hooks", "_forward_pre_hooks"):  # the graph holds what they did
        generating.__dict__[name] = type(getattr(model, name))()

    @functools.wraps(model.forward)
    def forward(*args: Any, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        needed = frozenset(rewritten.calling.parameters)
        given = {name: value for name, value in kwargs.items() if not _is_said(name, value, needed)}
        if given.get("use_cache") is False and "use_cache" not in needed:
            raise CacheFreeError(
                Refusal(
                    "Generation asks for no cache (use_cache=False).",
                    why="The one graph always has one.",
                    remedy="Leave use_cache out, or generate with the model itself.",
                )
            )
        result = rewritten(*args, **_completed(rewritten, needed, given))
        if isinstance(logits_to_keep, int) and logits_to_keep:
            result["logits"] = result["logits"][:, -logits_to_keep:]
        return result

    generating.__dict__["forward"] = forward
    return generating


def _is_said(name: str, value: Any, needed: frozenset[str]) -> bool:
    """Whether an argument says no more than what holds without it."""
    if name in _SAID:
        return value is _SAID[name]
    is_mask = name == _DECODERS_MASK and isinstance(value, torch.Tensor) and value.dim() == 2
    return is_mask and name not in needed and bool((value == 1).all())


def _completed(rewritten: Any, needed: frozenset[str], given: dict[str, Any]) -> dict[str, Any]:
    """The call with the mask of no padding and the positions that follow the past.

    Generation leaves out what it takes for granted.
    """
    missing = [name for name in _GRANTED if name in needed and given.get(name) is None]
    tokens, cache = given.get("input_ids"), given.get("past_key_values")
    if missing and tokens is None:
        return {**given, **dict(_for_encoder(rewritten, missing, given))}
    if not missing or not isinstance(tokens, torch.Tensor):
        return given
    batch, new = tokens.shape[:2]
    past = 0 if cache is None else _length(cache, missing)
    made = {
        "attention_mask": lambda: tokens.new_ones(batch, past + new),
        "position_ids": lambda: torch.arange(past, past + new, device=tokens.device).expand(
            batch, -1
        ),
    }
    return {**given, **{name: made[name]() for name in missing}}


def _for_encoder(
    rewritten: Any, missing: list[str], given: dict[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The mask of no padding over the encoder's states, where there is one row for each token."""
    whole = rewritten.encoder_call
    if whole is None or missing != ["attention_mask"]:
        return
    specs = {spec.path: spec for spec in whole.whole.interface.inputs}
    states = next(
        (leaf for leaf in flatten(given.get(whole.argument))[0] if isinstance(leaf, torch.Tensor)),
        None,
    )
    mask = specs.get("attention_mask")
    if states is not None and mask is not None and mask.shape == whole.states.shape[:2]:
        yield "attention_mask", torch.ones(states.shape[:2], dtype=mask.dtype, device=states.device)


def _length(cache: Any, missing: list[str]) -> int:
    """How many tokens are past."""
    length = getattr(cache, "get_seq_length", None)
    if length is None:
        raise CacheFreeError(
            Refusal(
                f"{' and '.join(missing)} is left out, and a {type(cache).__name__} does not say "
                "how many tokens are past.",
                why="Its class has no get_seq_length(), as the caches of older transformers.",
                remedy=f"Give {' and '.join(missing)}.",
            )
        )
    return int(length())
