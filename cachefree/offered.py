"""What the inputs that a model offers leave out: masks, positions, and its decoder's own tokens.

A model that is offered tokens alone makes masks and positions itself, and an encoder–decoder makes
the decoder's tokens from the encoder's. Both are right for one text without padding only, and for
the first call only.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["completions", "main_inputs", "resized_as_told"]

BATCH, QUERY = 3, 5
_DECODERS_TOKENS = re.compile(r"^(decoder|dec|target|tgt)_(input_)?(ids|tokens)$")
_DECODERS_MASK = re.compile(r"^(decoder|dec|target|tgt)_\w*mask$")
_LENGTHS = (64, 400, 4000)
_SAMPLES = (8000, 64)  # of a sound, of which an encoder makes far fewer rows
_MOST_LAYERS = 3
_FEATURES = re.compile(r"mel|feature_size|feat_dim|input_dim|freq")
_USUAL_FEATURES = (80, 128, 64, 40)

Inputs = dict[str, Any]


def completions(model: nn.Module, offered: Mapping[str, Any]) -> Iterator[tuple[Inputs, str]]:
    """Offered inputs with what they leave out, likeliest first, and what was added in words.

    The mask of a decoder whose encoder is inside is left out: it is causal without one, and
    generation gives none.
    """
    accepted = inspect.signature(model.forward).parameters
    decoders = next((name for name in accepted if _DECODERS_TOKENS.match(name)), None)
    given = dict(offered)
    if decoders is not None:
        kept = {name: value for name, value in given.items() if not _DECODERS_MASK.match(name)}
        if decoders not in kept:
            sizes = next((v.shape for v in kept.values() if isinstance(v, torch.Tensor)), (BATCH,))
            device = next((v.device for v in kept.values() if isinstance(v, torch.Tensor)), None)
            kept[decoders] = torch.empty((sizes[0], QUERY), dtype=torch.int64, device=device)
        yield from _with_masks(accepted, kept, given)
        yield kept, _added(kept, given)
    yield from _with_masks(accepted, given, given)


def _with_masks(
    accepted: Mapping[str, Any], inputs: Inputs, offered: Inputs
) -> Iterator[tuple[Inputs, str]]:
    tokens = inputs.get("input_ids")
    if not isinstance(tokens, torch.Tensor):
        return
    for names in (("attention_mask", "position_ids"), ("attention_mask",), ("position_ids",)):
        added = [
            name
            for name in names
            if name in accepted
            # tokenizers give masks as integers, whatever the model offers
            and getattr(inputs.get(name), "dtype", torch.bool) is torch.bool
        ]
        if added:
            found = {**inputs, **{name: torch.empty_like(tokens) for name in added}}
            yield found, _added(found, offered)


def _added(inputs: Inputs, offered: Inputs) -> str:
    changed = [name for name, value in inputs.items() if value is not offered.get(name)]
    return f"{' and '.join(changed)} given for every token" if changed else ""


def main_inputs(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[Inputs]:
    """What an encoder of sounds or pictures could take, from its first layers.

    A model that says what its main input is (``main_input_name``), and that it is no token ids,
    takes numbers there.
    """
    name = getattr(model, "main_input_name", None)
    accepted = inspect.signature(model.forward).parameters
    if not isinstance(name, str) or name not in accepted or name.endswith("ids"):
        return
    for shape in dict.fromkeys(_shapes(model)):
        yield {name: torch.empty(shape, dtype=dtype, device=device)}


def _shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Linear))]
    for layer in layers[:_MOST_LAYERS]:
        is_sound = isinstance(layer, nn.Conv1d) and layer.in_channels == 1
        for length in _SAMPLES if is_sound else _LENGTHS:
            if isinstance(layer, nn.Conv2d):
                for size in _image_sizes(model):
                    yield (BATCH, layer.in_channels, *size)
                for features in _feature_sizes(model) if layer.in_channels == 1 else ():
                    yield (BATCH, length, features)  # a spectrogram, its channel added inside
            elif isinstance(layer, nn.Conv1d) and layer.in_channels > 1:
                yield (BATCH, layer.in_channels, length)
                yield (BATCH, length, layer.in_channels)
            elif isinstance(layer, nn.Conv1d):
                yield (BATCH, length)
                yield (BATCH, 1, length)
            else:
                yield (BATCH, length, layer.in_features)


def _image_sizes(model: nn.Module) -> Iterator[tuple[int, int]]:
    pending = [getattr(model, "config", None)]
    while pending:
        config = pending.pop()
        size = getattr(config, "image_size", None)
        if isinstance(size, int):
            yield (size, size)
        elif isinstance(size, (tuple, list)) and len(size) == 2:
            yield (int(size[0]), int(size[1]))
        parts = vars(config).values() if hasattr(config, "__dict__") else ()
        pending += [part for part in parts if hasattr(part, "model_type")]
    yield (64, 64)


def _feature_sizes(model: nn.Module) -> Iterator[int]:
    """How many features a sound has at a time: what a configuration says, else the usual."""
    pending = [getattr(model, "config", None)]
    while pending:
        values = getattr(pending.pop(), "__dict__", {})
        yield from (
            value
            for name, value in values.items()
            if _FEATURES.search(name) and type(value) is int and value > 1
        )
        pending += [part for part in values.values() if hasattr(part, "model_type")]
    yield from _USUAL_FEATURES


def resized_as_told(inputs: Inputs, message: str) -> Iterator[Inputs]:
    """The inputs with a size that an error's text says is another: "to be of length 64, found 7".

    Args:
        inputs: What did not run.
        message: What the model raised.
    """
    numbers = list(dict.fromkeys(int(number) for number in re.findall(r"\b\d{1,6}\b", message)))
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            continue
        for axis in range(value.dim() - 1, 0, -1):
            if value.shape[axis] not in numbers:
                continue
            for number in numbers:
                if number not in (0, 1, value.shape[axis]):
                    shape = list(value.shape)
                    shape[axis] = number
                    yield {**inputs, name: value.new_empty(shape)}
