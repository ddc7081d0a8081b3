"""The weights of one stage: its own and no others, found in a checkpoint or in the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from cachefree.errors import CacheFreeError, Refusal
from cachefree.fakes import has_no_values
from cachefree.onnx.weights import matched_weights
from cachefree.scale.parts import Part
from cachefree.spec import CacheSlot

__all__ = ["load"]


def load(
    part: Part,
    rewritten: Any,
    slots: Sequence[CacheSlot],
    weights: Any,
    device: torch.device,
    shard: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Gives a stage the values of its weights; the model's own are left as they are.

    Args:
        part: The stage.
        rewritten: What ``cachefree.rewrite`` gave.
        slots: The stage's slots of the cache.
        weights: As in `cachefree.to_onnx`; None for the model's own.
        device: Where they go.
        shard: What is kept of each weight; None for all of it.

    Returns:
        Parameter or buffer → its values, for what the stage's neutral cache is computed of.

    Raises:
        CacheFreeError: all at once: what is missing, cut off, or of another shape or dtype.
    """
    recipes = {
        slot.past.path: rewritten.calling.neutrals[slot.past.path]
        for slot in slots
        if slot.past.path in rewritten.calling.neutrals
    }
    neutral = {name for recipe in recipes.values() for name in recipe.attributes}
    own = _Own(part.graph_module, rewritten, recipes)
    matched = None if weights is None else matched_weights(weights, own)
    values: dict[str, torch.Tensor] = {}
    for name in dict.fromkeys([*part.weights, *sorted(neutral)]):
        tensor = _value(rewritten, name, matched, device)
        if name in neutral:
            values[name] = tensor
        if name in part.weights:
            _put(part.graph_module, name, tensor if shard is None else shard(name, tensor))
    return values


def _value(rewritten: Any, name: str, matched: Any, device: torch.device) -> torch.Tensor:
    """A weight where it is to be computed with."""
    tensor = _attribute(rewritten.graph_module, name)
    if matched is not None and name in matched.stored:
        # a copy: what is read of the file later would be of a file that may have changed
        return matched.value(name, tensor).to(device, copy=True)  # type: ignore[no-any-return]
    if has_no_values(tensor):
        raise CacheFreeError(
            Refusal(
                f"{name} has no values.",
                why="The model is on the meta device, or its weights are fake.",
                remedy="Give its weights: pipeline(rewritten, weights=path).",
            )
        )
    return tensor.detach().to(device)


class _Own:
    """A stage as `matched_weights` looks at a model: all names, but only its own needs."""

    encoder_interface = None

    def __init__(self, module: fx.GraphModule, rewritten: Any, recipes: dict[str, Any]) -> None:
        self.graph_module = module
        self.calling = _Neutrals(recipes, rewritten.graph_module)
        self._whole = rewritten

    def named_parameters(self, **options: Any) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._whole.named_parameters(**options)

    def named_buffers(self, **options: Any) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._whole.named_buffers(**options)

    def state_dict(self, **options: Any) -> Any:
        return self._whole.state_dict(**options)


class _Neutrals:
    def __init__(self, neutrals: dict[str, Any], module: nn.Module) -> None:
        self.neutrals = neutrals
        self.module = module

    def attribute(self, name: str) -> torch.Tensor:
        return _attribute(self.module, name)


def _attribute(module: nn.Module, name: str) -> torch.Tensor:
    path, _, last = name.rpartition(".")
    found: torch.Tensor = getattr(module.get_submodule(path), last)
    return found


def _put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, last = name.rpartition(".")
    holder = module.get_submodule(path)
    if last in holder._parameters:
        holder._parameters[last] = nn.Parameter(tensor, requires_grad=False)
    else:
        holder._buffers[last] = tensor
