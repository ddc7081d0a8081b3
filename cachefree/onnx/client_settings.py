"""What other programs read about a graph: its sizes, its end of text, the names of its cache."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from cachefree.onnx.names import Names
from cachefree.sizes import size_symbol
from cachefree.spec import Interface

__all__ = ["Shown", "genai_settings", "generation_settings", "model_settings"]

_DECODER_TYPE = "granite"
_SEQ2SEQ_TYPE = "marian"
"""Clients refuse a `model_type` that they do not know, and read no more of it than the sizes of the
cache. A model that is none of transformers' own is written under these, whose sizes are plain: so
many heads, each of so many numbers, for keys and values alike."""
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_DECODER_INPUTS = frozenset({"input_ids", "attention_mask", "position_ids"})
_CROSS_INPUTS = frozenset({"input_ids", "encoder_hidden_states", "encoder_attention_mask"})
_KEY = re.compile(r"past_key_values\.\d+\.(?:decoder\.)?key")
_SLOT = re.compile(r"past_key_values\.\d+\.(?:(?:de|en)coder\.)?(?:key|value)")


@dataclass(frozen=True)
class Shown:
    """What a client sees of one graph, and of the encoder's graph beside it.

    Attributes:
        interface: Its inputs and outputs.
        names: Their names.
        encoder: The names of the encoder's inputs and outputs; None where there is no encoder.
        vocabulary: V, where it is known.
    """

    interface: Interface
    names: Names
    encoder: Names | None = None
    vocabulary: int | None = None

    @property
    def keys(self) -> list[Sequence[Any]]:
        """The shapes of the past keys, a layer each."""
        rows = zip(self.names.inputs, self.interface.inputs, strict=True)
        return [spec.shape for name, spec in rows if _KEY.fullmatch(name)]

    @property
    def plain(self) -> list[str]:
        """The inputs that are no cache."""
        rows = zip(self.names.inputs, self.interface.inputs, strict=True)
        return [name for name, spec in rows if not spec.is_cache]

    @property
    def is_known(self) -> bool:
        """Whether a program that knows decoders by their names has all that the graph takes."""
        rows = zip(self.names.inputs, self.interface.inputs, strict=True)
        has_slots = all(_SLOT.fullmatch(name) for name, spec in rows if spec.is_cache)
        slots = len(self.interface.cache)
        taken = _DECODER_INPUTS if self.encoder is None else _CROSS_INPUTS
        each = 2 if self.encoder is None else 4
        return (
            bool(self.keys)
            and has_slots
            and slots == each * len(self.keys)
            and taken.issuperset(self.plain)
            and "input_ids" in self.plain
            and self.names.logits == "logits"
            and (self.encoder is None or "last_hidden_state" in self.encoder.outputs)
        )

    @property
    def takes_sound(self) -> bool:
        """Whether the encoder takes features of a sound."""
        return self.encoder is not None and "input_features" in self.encoder.inputs


def model_settings(model: Any, shown: Shown) -> dict[str, Any]:
    """``config.json``: the model's own settings, or what the cache's shapes tell of it."""
    own = _settings(model, "config")
    if _is_of_transformers(getattr(model, "config", None)):
        return own
    config = {**own, **_sizes(shown), "architectures": [type(model).__name__]}
    if "model_type" not in config:
        config["model_type"] = own.get("model_type") or type(model).__name__.lower()
    elif own.get("model_type"):
        config["original_model_type"] = own["model_type"]
    # what a class of settings would put there is not the model's
    return {**dict.fromkeys((*_SPECIAL, "forced_eos_token_id")), **config}


def _is_of_transformers(settings: Any) -> bool:
    return type(settings).__module__.startswith("transformers.models.")


def _settings(model: Any, name: str) -> dict[str, Any]:
    """A model's own settings, those of them that JSON has."""
    settings: Any = getattr(model, name, None)
    found = settings.to_dict() if hasattr(settings, "to_dict") else {}
    if not isinstance(found, Mapping):
        return {}
    return {key: value for key, value in found.items() if value is None or _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(part) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float, bool))


def _sizes(shown: Shown) -> dict[str, Any]:
    """What the shapes tell: layers, heads, their size, the vocabulary."""
    found: dict[str, Any] = {} if shown.vocabulary is None else {"vocab_size": shown.vocabulary}
    keys = shown.keys
    if not keys or any(len(shape) != 4 for shape in keys):
        return found
    layers = len(keys)
    heads, size = (
        int(width) if sympy.sympify(width).is_Integer else None
        for width in (keys[0][1], keys[0][3])
    )
    found |= {"num_hidden_layers": layers, "num_key_value_heads": heads, "head_dim": size}
    is_even = len({(shape[1], shape[3]) for shape in keys}) == 1
    if not shown.is_known or not is_even or heads is None or size is None:
        return found
    found |= {"max_position_embeddings": _largest_length(shown.interface), "use_cache": True}
    if shown.encoder is None:
        return found | {
            "model_type": _DECODER_TYPE, "hidden_size": heads * size, "num_attention_heads": heads,
        }  # fmt: skip
    return found | {
        "model_type": _SEQ2SEQ_TYPE, "is_encoder_decoder": True, "d_model": heads * size,
        "encoder_layers": layers, "decoder_layers": layers, "encoder_attention_heads": heads,
        "decoder_attention_heads": heads, "decoder_vocab_size": shown.vocabulary,
    }  # fmt: skip


def _largest_length(interface: Interface) -> int:
    """How many tokens the domain has room for."""
    base = dict.fromkeys(interface.symbols, 1) | dict.fromkeys(interface.past_symbols, 0)
    lengths = [1 << power for power in range(1, 18)]
    query = str(size_symbol("query"))
    fits = [n for n in lengths if query in base and interface.domain.holds({**base, query: n})]
    return max(fits, default=lengths[-1])


def generation_settings(model: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """``generation_config.json``; what is not set is left out, since not every reader takes it."""
    found = {
        key: value
        for key, value in _settings(model, "generation_config").items()
        if value is not None
    }
    for key in _SPECIAL:
        if config.get(key) is not None:
            found.setdefault(key, config[key])
    return found


def genai_settings(
    file: str, shown: Shown, config: Mapping[str, Any], generation: Mapping[str, Any]
) -> dict[str, Any] | None:
    """``genai_config.json``; None where the cache is not keys and values a layer."""
    if not shown.is_known or shown.encoder is not None:
        return None
    _, heads, _, size = shown.keys[0]
    queries = config.get("num_attention_heads") or config.get("n_head") or int(heads)
    longest = config.get("max_position_embeddings") or _largest_length(shown.interface)
    ends = {
        key: generation[key]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        if generation.get(key) is not None
    }
    if "eos_token_id" in ends:
        end = ends["eos_token_id"]
        ends.setdefault("pad_token_id", end[0] if isinstance(end, list) else end)
    return {
        "model": {
            "type": "decoder",
            "context_length": longest,
            "vocab_size": shown.vocabulary or config.get("vocab_size"),
            **ends,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": file,
                "head_size": int(size),
                "hidden_size": config.get("hidden_size")
                or config.get("n_embd")
                or queries * int(size),
                "num_attention_heads": queries,
                "num_hidden_layers": len(shown.keys),
                "num_key_value_heads": int(heads),
                "inputs": {
                    **{name: name for name in shown.plain},
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": shown.names.logits,
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "past_present_share_buffer": False,
            "do_sample": False,
            "num_beams": 1,
            "max_length": longest,
        },
    }
