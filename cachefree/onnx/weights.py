"""Weights that are not in the model: found in checkpoints, matched by name, checked all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from cachefree.errors import CacheFreeError, Refusal, raise_all
from cachefree.fakes import has_no_values
from cachefree.onnx.checkpoints import Stored, listed, stored_weights

__all__ = ["Matched", "Weights", "matched_weights"]


@dataclass(frozen=True)
class Weights:
    """Where a model's weights are, and how they become the model's.

    Attributes:
        source: A safetensors file, a torch checkpoint, an index of shards, a folder that holds one
            of these, a mapping from names to tensors (a ``state_dict``), or a list of these.
        rename: The model's name of each stored one: a mapping, or a function. None: names are the
            model's, or differ from them by one prefix, the same for all.
        cast: What to do with a weight of another dtype than the model's: ``"stream"`` converts it
            while it is written, ``"graph"`` keeps the stored one and casts it in the graph. None:
            it is an error.
        strict: Whether each weight of the model must be stored, and no other. If not, the model's
            own values serve where a weight is not stored, and further ones are left out.
    """

    source: Any
    rename: Mapping[str, str] | Callable[[str], str] | None = None
    cast: Literal["stream", "graph"] | None = None
    strict: bool = True


@dataclass(frozen=True)
class Matched:
    """The stored weight of each tensor that a graph reads.

    Attributes:
        stored: The graph's name of a tensor → where it is stored. What is not in it has its values
            in the model.
        cast: What to do where the dtypes differ.
    """

    stored: dict[str, Stored]
    cast: Literal["stream", "graph"] | None

    def value(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The values of one tensor of the model, on the CPU."""
        stored = self.stored.get(name)
        return tensor if stored is None else stored.load().to(tensor.dtype)


def matched_weights(weights: Any, rewritten: Any) -> Matched:
    """Finds each tensor of the graphs in ``weights``; nothing is read but names and sizes.

    Args:
        weights: A `Weights`, or its ``source``.
        rewritten: What ``cachefree.rewrite`` gave.

    Raises:
        CacheFreeError: all at once: the weights that are missing, that the model does not have,
            and those of another shape or dtype.
    """
    if not isinstance(weights, Weights):
        weights = Weights(weights)
    names = _names(rewritten)
    by_name = {name: tensor for tensor, alike in names for name in alike}
    stored = _renamed(stored_weights(weights.source), weights.rename, set(by_name))
    needed = dict(_needed(rewritten))
    found: dict[str, Stored] = {}
    refusals: list[Refusal] = []
    for tensor, alike in names:
        here = [stored[name] for name in alike if name in stored]
        used = [name for name in alike if name in needed]
        if here:
            refusals += _misfits(alike[0], tensor, here[0], weights.cast)
            found.update(dict.fromkeys(used, here[0]))
        elif used and has_no_values(tensor):
            refusals.append(_missing(used[0], tensor, is_saved=_is_saved(rewritten, alike)))
        elif weights.strict and used and _is_saved(rewritten, alike):
            refusals.append(_missing(used[0], tensor, is_saved=True))
    refusals += [
        _missing(name, tensor, is_saved=False)
        for name, tensor in needed.items()
        if name not in by_name and has_no_values(tensor)
    ]
    extra = sorted(stored.keys() - by_name.keys())
    if weights.strict and extra:
        refusals.append(
            Refusal(
                f"The model has no {listed(extra)}.",
                remedy="Give Weights(..., rename=...) where it has them under other names, "
                "Weights(..., strict=False) to leave them out.",
            )
        )
    raise_all(CacheFreeError, refusals)
    return Matched(found, weights.cast)


def _names(rewritten: Any) -> list[tuple[torch.Tensor, list[str]]]:
    """Each parameter and buffer with all of its names: tied ones have several."""
    seen: dict[int, tuple[torch.Tensor, list[str]]] = {}
    for owner in (rewritten, *_modules(rewritten)):
        for name, tensor in (
            *owner.named_parameters(remove_duplicate=False),
            *owner.named_buffers(remove_duplicate=False),
        ):
            names = seen.setdefault(id(tensor), (tensor, []))[1]
            if name not in names:
                names.append(name)
    return list(seen.values())


def _modules(rewritten: Any) -> tuple[Any, ...]:
    """The graphs that are written: the decoder's, and the encoder's where there is one."""
    has_encoder = rewritten.encoder_interface is not None
    return (rewritten.graph_module, *((rewritten.encoder,) if has_encoder else ()))


def _needed(rewritten: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor that a graph or a neutral element is computed of, by its name there."""
    for recipe in rewritten.calling.neutrals.values():
        for name in recipe.attributes:
            yield name, rewritten.calling.attribute(name)
    for module in _modules(rewritten):
        for node in module.graph.nodes:
            if node.op == "get_attr":
                name = str(node.target)
                path, _, last = name.rpartition(".")
                yield name, getattr(module.get_submodule(path), last)


def _is_saved(rewritten: Any, names: list[str]) -> bool:
    """Whether a ``state_dict`` of the model holds a tensor."""
    saved = rewritten.state_dict(keep_vars=True).keys()
    return any(name in saved for name in names)


def _renamed(stored: dict[str, Stored], rename: Any, names: set[str]) -> dict[str, Stored]:
    """The stored weights by the model's names."""
    if rename is None:
        return _without_prefix(stored, names)
    new = rename if callable(rename) else lambda name: rename.get(name, name)
    renamed: dict[str, Stored] = {}
    for name, weight in stored.items():
        name_in_model = new(name)
        if name_in_model in renamed:
            raise CacheFreeError(
                Refusal(
                    f"Two stored weights are both renamed to {name_in_model}: {name} and "
                    f"{renamed[name_in_model].name}."
                )
            )
        renamed[name_in_model] = weight
    return renamed


def _without_prefix(stored: dict[str, Stored], names: set[str]) -> dict[str, Stored]:
    """The same under the model's names where these differ by one prefix."""
    if not stored or stored.keys() & names:
        return stored
    one = min(stored, key=len)
    for name in names:
        if name.endswith("." + one):
            added = name[: -len(one)]
            longer = {added + key: weight for key, weight in stored.items()}
            if longer.keys() <= names:
                return longer
        if one.endswith("." + name):
            dropped = one[: -len(name)]
            if all(key.startswith(dropped) for key in stored):
                shorter = {key[len(dropped) :]: weight for key, weight in stored.items()}
                if shorter.keys() <= names:
                    return shorter
    return stored


def _misfits(
    name: str, tensor: torch.Tensor, stored: Stored, cast: str | None
) -> Iterator[Refusal]:
    if tuple(tensor.shape) != stored.shape:
        yield Refusal(
            f"{name} is {tuple(tensor.shape)} in the model, and {stored.shape} where it is stored.",
            remedy="Give the weights of this model's configuration.",
        )
    elif tensor.is_complex() or stored.dtype.is_complex:
        yield Refusal(
            f"{name} holds complex numbers, which ONNX cannot point at.",
            remedy="Leave it out with Weights(..., strict=False), and give the model its values.",
        )
    elif tensor.dtype != stored.dtype and cast is None:
        yield Refusal(
            f"{name} is {_said(tensor.dtype)} in the model, and {_said(stored.dtype)} where it is "
            "stored.",
            remedy='Build the model in that dtype, or give Weights(..., cast="stream") or "graph".',
        )


def _missing(name: str, tensor: torch.Tensor, *, is_saved: bool) -> Refusal:
    described = f"{_said(tensor.dtype)} of shape {tuple(tensor.shape)}"
    if is_saved:
        return Refusal(
            f"The weight {name}, {described}, is not stored.",
            remedy="Give the file that holds it, or Weights(..., rename=...) where it has another "
            "name there.",
        )
    return Refusal(
        f"The buffer {name}, {described}, has no values, and checkpoints do not hold it.",
        why="The model computes it when it is built, and it was built on the meta device.",
        remedy=f'Give its values as well: weights=[path, {{"{name}": tensor}}], or build the model '
        "so that its buffers are real.",
    )


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
