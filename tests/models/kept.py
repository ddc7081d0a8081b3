"""Decoders that keep their cache elsewhere than in arguments and results, as people write them."""

from __future__ import annotations

import dataclasses
import math
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .case import seeded

VOCABULARY, WIDTH, HEADS, LONGEST = 33, 16, 2, 64


def heads(x):
    return x.view(*x.shape[:2], HEADS, -1).transpose(1, 2)


def attend(q, k, v):
    n, m = q.shape[2], k.shape[2]
    visible = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return (scores.masked_fill(~visible, -1e9).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Projections(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def qkv(self, x):
        return heads(self.query(x)), heads(self.key(x)), heads(self.value(x))


class Decoder(nn.Module):
    layer: type[nn.Module] = Projections

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(VOCABULARY, WIDTH)
        self.pos = nn.Embedding(LONGEST, WIDTH)
        self.layers = nn.ModuleList([self.layer() for _ in range(2)])
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def embed(self, ids, past):
        return self.emb(ids) + self.pos(torch.arange(past, past + ids.shape[1], device=ids.device))


# Attributes of the modules.


class KeepingAttention(Projections):
    def __init__(self):
        super().__init__()
        self.cache_k = None
        self.cache_v = None

    def forward(self, x):
        q, k, v = self.qkv(x)
        if self.cache_k is not None:
            k = torch.cat((self.cache_k, k), 2)
            v = torch.cat((self.cache_v, v), 2)
        self.cache_k, self.cache_v = k, v
        return self.out(attend(q, k, v))


class KeepingDecoder(Decoder):
    """Each attention keeps its keys and values, and the model counts positions."""

    layer = KeepingAttention

    def __init__(self):
        super().__init__()
        self.offset = 0

    def reset(self):
        self.offset = 0
        for layer in self.layers:
            layer.cache_k = layer.cache_v = None

    def forward(self, ids):
        x = self.embed(ids, self.offset)
        for layer in self.layers:
            x = x + layer(x)
        self.offset += ids.shape[1]
        return self.head(x)


class ListDecoder(Decoder):
    """A list of pairs on the model, empty at first, with a flag beside it."""

    def __init__(self):
        super().__init__()
        self.cache = []
        self.started = False

    def reset(self):
        self.cache, self.started = [], False

    def forward(self, ids):
        x = self.embed(ids, self.cache[0][0].shape[2] if self.started else 0)
        for i, layer in enumerate(self.layers):
            q, k, v = layer.qkv(x)
            if self.started:
                k = torch.cat((self.cache[i][0], k), 2)
                v = torch.cat((self.cache[i][1], v), 2)
                self.cache[i] = (k, v)
            else:
                self.cache.append((k, v))
            x = x + layer.out(attend(q, k, v))
        self.started = True
        return self.head(x)


# Preallocated buffers.


class RowsAttention(Projections):
    """A plain tensor and a buffer, written at a position, as the reference code of a model does."""

    def __init__(self):
        super().__init__()
        self.cache_k = torch.zeros(4, LONGEST, HEADS, WIDTH // HEADS)
        self.register_buffer("cache_v", torch.zeros(4, LONGEST, HEADS, WIDTH // HEADS))

    def forward(self, x, start_pos):
        b, n, _ = x.shape
        q = heads(self.query(x))
        k = self.key(x).view(b, n, HEADS, -1)
        v = self.value(x).view(b, n, HEADS, -1)
        self.cache_k = self.cache_k.to(q)
        self.cache_v = self.cache_v.to(q)
        self.cache_k[:b, start_pos : start_pos + n] = k
        self.cache_v[:b, start_pos : start_pos + n] = v
        keys = self.cache_k[:b, : start_pos + n]
        values = self.cache_v[:b, : start_pos + n]
        return self.out(attend(q, keys.transpose(1, 2), values.transpose(1, 2)))


class RowsDecoder(Decoder):
    """The caller counts: ``model(tokens, start_pos)``."""

    layer = RowsAttention

    def forward(self, tokens, start_pos: int):
        x = self.embed(tokens, start_pos)
        for layer in self.layers:
            x = x + layer(x, start_pos)
        return self.head(x)


class InferringDecoder(RowsDecoder):
    """Decorated, as inference code is: a conversion that converts nothing gives another tensor."""

    @torch.inference_mode()
    def forward(self, tokens: torch.Tensor, start_pos: int):
        return super().forward(tokens, start_pos)


class NarrowDecoder(Decoder):
    """The model counts, and copies into a narrowed buffer."""

    def __init__(self):
        super().__init__()
        for name in ("keys", "values"):
            self.register_buffer(
                name, torch.zeros(2, 4, HEADS, LONGEST, WIDTH // HEADS), persistent=False
            )
        self.k0, self.k1 = (self.keys[i].clone() for i in range(2))
        self.v0, self.v1 = (self.values[i].clone() for i in range(2))
        self.length = 0

    def reset(self):
        self.length = 0

    def forward(self, ids):
        b, n = ids.shape
        x = self.embed(ids, self.length)
        for layer, kept_k, kept_v in zip(
            self.layers, (self.k0, self.k1), (self.v0, self.v1), strict=True
        ):
            q, k, v = layer.qkv(x)
            kept_k[:b].narrow(2, self.length, n).copy_(k)
            kept_v[:b].narrow(2, self.length, n).copy_(v)
            end = self.length + n
            x = x + layer.out(attend(q, kept_k[:b, :, :end], kept_v[:b, :, :end]))
        self.length += n
        return self.head(x)


class FixedCache(nn.Module):
    def __init__(self, batch, length):
        super().__init__()
        self.register_buffer("k_cache", torch.zeros(batch, HEADS, length, WIDTH // HEADS))
        self.register_buffer("v_cache", torch.zeros(batch, HEADS, length, WIDTH // HEADS))

    def update(self, input_pos, k, v):
        k_out, v_out = self.k_cache, self.v_cache
        k_out[:, :, input_pos] = k
        v_out[:, :, input_pos] = v
        return k_out, v_out


class FixedAttention(Projections):
    def __init__(self):
        super().__init__()
        self.kv_cache = FixedCache(2, 32)

    def forward(self, x, mask, input_pos):
        q, k, v = self.qkv(x)
        k, v = self.kv_cache.update(input_pos, k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


class FixedDecoder(Decoder):
    """Positions are a tensor, and attention sees the whole buffer behind a mask."""

    layer = FixedAttention

    def __init__(self):
        super().__init__()
        self.register_buffer("causal_mask", torch.ones(32, 32, dtype=torch.bool).tril())

    def forward(self, idx, input_pos):
        mask = self.causal_mask[None, None, input_pos]
        x = self.emb(idx) + self.pos(input_pos)
        for layer in self.layers:
            x = x + layer(x, mask, input_pos)
        return self.head(x)


# Dicts that the caller passes and the call fills.


class IncrementalAttention(Projections):
    def __init__(self):
        super().__init__()
        self.instance = str(uuid.uuid4())

    def forward(self, x, incremental_state=None):
        q, k, v = self.qkv(x)
        if incremental_state is not None:
            name = f"{self.instance}.attn_state"
            saved = incremental_state.get(name)
            if saved is not None:
                k = torch.cat((saved["prev_key"], k), 2)
                v = torch.cat((saved["prev_value"], v), 2)
            incremental_state[name] = {"prev_key": k, "prev_value": v}
        return self.out(attend(q, k, v))


class IncrementalDecoder(Decoder):
    """Nested, by names that are drawn when the model is made."""

    layer = IncrementalAttention

    def forward(self, tokens, incremental_state=None):
        x = self.emb(tokens)
        for layer in self.layers:
            x = x + layer(x, incremental_state)
        return self.head(x)


class NumberedDecoder(Decoder):
    """By the number of the layer; and the dict comes back too."""

    def forward(self, ids, kv_cache):
        x = self.embed(ids, kv_cache[0][0].shape[2] if 0 in kv_cache else 0)
        for i, layer in enumerate(self.layers):
            q, k, v = layer.qkv(x)
            if i in kv_cache:
                k = torch.cat((kv_cache[i][0], k), 2)
                v = torch.cat((kv_cache[i][1], v), 2)
            kv_cache[i] = (k, v)
            x = x + layer.out(attend(q, k, v))
        return self.head(x), kv_cache


class HookedDecoder(Decoder):
    """Hooks on the projections fill a dict by module, and the model reads its length."""

    def install_kv_cache_hooks(self):
        cache, hooks = {}, []

        def save_to_cache(module, _, output):
            if module not in cache:
                cache[module] = output
            else:
                cache[module] = torch.cat((cache[module], output), dim=1).detach()
            return cache[module]

        for layer in self.layers:
            hooks.append(layer.key.register_forward_hook(save_to_cache))
            hooks.append(layer.value.register_forward_hook(save_to_cache))
        return cache, hooks

    def forward(self, x, kv_cache=None):
        offset = next(iter(kv_cache.values())).shape[1] if kv_cache else 0
        x = self.emb(x) + self.pos.weight[offset : offset + x.shape[-1]]
        for layer in self.layers:
            x = x + layer.out(attend(*layer.qkv(x)))
        return self.head(x)


# Objects of a class of their own.


class KeyValueStore:
    def __init__(self):
        self.keys, self.values, self.seen = [], [], 0

    def update(self, k, v, layer):
        if layer == 0:
            self.seen += k.shape[2]
        if len(self.keys) <= layer:
            self.keys.append(k)
            self.values.append(v)
        else:
            self.keys[layer] = torch.cat((self.keys[layer], k), 2)
            self.values[layer] = torch.cat((self.values[layer], v), 2)
        return self.keys[layer], self.values[layer]


@dataclasses.dataclass
class LayerState:
    key: torch.Tensor | None = None
    value: torch.Tensor | None = None


@dataclasses.dataclass
class DecoderState:
    layers: list[LayerState] = dataclasses.field(
        default_factory=lambda: [LayerState(), LayerState()]
    )


class StoreDecoder(Decoder):
    def forward(self, ids, cache: KeyValueStore | None = None):
        x = self.embed(ids, cache.seen if cache is not None else 0)
        for i, layer in enumerate(self.layers):
            q, k, v = layer.qkv(x)
            if cache is not None:
                k, v = cache.update(k, v, i)
            x = x + layer.out(attend(q, k, v))
        return self.head(x)


class DataclassDecoder(Decoder):
    """A dataclass for each layer, None inside at first."""

    def forward(self, ids, state: DecoderState):
        first = state.layers[0].key
        x = self.embed(ids, 0 if first is None else first.shape[2])
        for layer, kept in zip(self.layers, state.layers, strict=True):
            q, k, v = layer.qkv(x)
            if kept.key is not None:
                k = torch.cat((kept.key, k), 2)
                v = torch.cat((kept.value, v), 2)
            kept.key, kept.value = k, v
            x = x + layer.out(attend(q, k, v))
        return self.head(x)


# Methods other than forward.


class SteppingDecoder(Decoder):
    def step(self, ids, past=None):
        x = self.embed(ids, past[0][0].shape[2] if past is not None else 0)
        present = []
        for i, layer in enumerate(self.layers):
            q, k, v = layer.qkv(x)
            if past is not None:
                k = torch.cat((past[i][0], k), 2)
                v = torch.cat((past[i][1], v), 2)
            present.append((k, v))
            x = x + layer.out(attend(q, k, v))
        return self.head(x), present

    def prefill(self, ids):
        return self.step(ids)

    def decode(self, ids, past):
        return self.step(ids, past)


class KeepingPair(SteppingDecoder):
    """The pair keeps the cache on the model."""

    def __init__(self):
        super().__init__()
        self.kv = None

    def reset(self):
        self.kv = None

    def prefill(self, ids):
        logits, self.kv = self.step(ids)
        return logits

    def decode(self, ids):
        logits, self.kv = self.step(ids, self.kv)
        return logits


# How they are called: `begin` starts a sequence and gives a function of (ids, start), and what the
# caller holds.

Say = Callable[[torch.Tensor, int], torch.Tensor]


def _alone(model: Any) -> tuple[Say, Any]:
    model.reset()
    return lambda ids, start: model(ids), None


def _at_position(model: Any) -> tuple[Say, Any]:
    return lambda ids, start: model(ids, start), None


def _at_positions(model: Any) -> tuple[Say, Any]:
    if hasattr(model, "reset"):
        model.reset()
    return lambda ids, start: model(ids, torch.arange(start, start + ids.shape[1])), None


def _with_dict(model: Any) -> tuple[Say, Any]:
    held: dict[Any, Any] = {}
    return lambda ids, start: model(ids, held), held


def _returning_dict(model: Any) -> tuple[Say, Any]:
    held: dict[Any, Any] = {}

    def say(ids: torch.Tensor, start: int) -> torch.Tensor:
        logits, given = model(ids, held)
        assert given is held
        return logits

    return say, held


def _with(make: Callable[[], Any]) -> Callable[[Any], tuple[Say, Any]]:
    def begin(model: Any) -> tuple[Say, Any]:
        held = make()
        return lambda ids, start: model(ids, held), held

    return begin


def _hooked(model: Any) -> tuple[Say, Any]:
    held = {}
    if isinstance(model, HookedDecoder):
        for layer in model.layers:
            layer.key._forward_hooks.clear()
            layer.value._forward_hooks.clear()
        held, _ = model.install_kv_cache_hooks()
    return lambda ids, start: model(ids, kv_cache=held), list(held.values())


def _stepping(model: Any) -> tuple[Say, Any]:
    held = [None]

    def say(ids: torch.Tensor, start: int) -> torch.Tensor:
        logits, held[0] = model.step(ids, held[0])
        return logits

    return say, held


def _in_two_methods(model: Any) -> tuple[Say, Any]:
    held = [None]

    def say(ids: torch.Tensor, start: int) -> torch.Tensor:
        logits, held[0] = model.decode(ids, held[0]) if start else model.prefill(ids)
        return logits

    return say, held


def _kept_in_two_methods(model: Any) -> tuple[Say, Any]:
    model.reset()
    return lambda ids, start: model.decode(ids) if start else model.prefill(ids), None


@dataclasses.dataclass(frozen=True)
class KeptCase:
    """A model that `cachefree.rewrite` lifts.

    `begin` starts a sequence on the model, on what `rewrite` gives for it, or on what `load_onnx`
    gives; `example` makes the inputs of a first call from the model.
    """

    name: str
    build: Callable[[], nn.Module]
    begin: Callable[[Any], tuple[Say, Any]]
    example: Callable[[Any], Any] = lambda model: None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    batches: tuple[int, ...] = (1, 2)
    labels: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


IDS = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])

KEPT: tuple[KeptCase, ...] = (
    KeptCase("attributes", seeded(KeepingDecoder), _alone, labels=("layers.0.cache_k", "offset")),
    KeptCase("list_and_flag", seeded(ListDecoder), _alone, labels=("started", "cache[0]")),
    KeptCase(
        "rows_at_start_pos",
        seeded(RowsDecoder),
        _at_position,
        lambda model: (IDS, 0),
        labels=("layers.1.cache_v",),
    ),
    KeptCase(
        "rows_in_inference_mode",
        seeded(InferringDecoder),
        _at_position,
        labels=("layers.1.cache_v",),
    ),
    KeptCase("narrowed_rows", seeded(NarrowDecoder), _alone, labels=("k0", "length")),
    KeptCase(
        "fixed_buffer_at_positions",
        seeded(FixedDecoder),
        _at_positions,
        lambda model: (IDS, torch.arange(4)),
        batches=(2,),
        labels=("layers.0.kv_cache.k_cache",),
    ),
    KeptCase("dict_by_uuid", seeded(IncrementalDecoder), _with_dict),
    KeptCase("dict_by_number", seeded(NumberedDecoder), _returning_dict, labels=("kv_cache[0]",)),
    KeptCase(
        "dict_by_module_from_hooks",
        seeded(HookedDecoder),
        _hooked,
        lambda model: {"x": IDS, "kv_cache": model.install_kv_cache_hooks()[0]},
    ),
    KeptCase("store", seeded(StoreDecoder), _with(KeyValueStore), labels=("cache.seen",)),
    KeptCase(
        "dataclasses",
        seeded(DataclassDecoder),
        _with(DecoderState),
        lambda model: (IDS, DecoderState()),
        labels=("state.layers[0].key",),
    ),
    KeptCase("step", seeded(SteppingDecoder), _stepping, options={"method": "step"}),
    KeptCase(
        "prefill_and_decode",
        seeded(SteppingDecoder),
        _in_two_methods,
        options={"method": ("prefill", "decode")},
    ),
    KeptCase(
        "prefill_and_decode_keep",
        seeded(KeepingPair),
        _kept_in_two_methods,
        options={"method": ("prefill", "decode")},
        labels=("kv",),
    ),
)
