"""Decoders of packages in more fields: music, speech, translation, robots, language."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from benchmarks.packages.entry import (
    ONE_TOKEN,
    VOCABULARY,
    WIDTH,
    Entry,
    Say,
    frames,
    passed,
    stand_in_for,
    without_init,
)

V, D = VOCABULARY, WIDTH
SPARSE = {"sliding_window_size": 4, "compress_block_size": 4, "compress_block_sliding_stride": 2,
          "selection_block_size": 4, "num_selected_blocks": 2}  # fmt: skip


def _all_tokens(**always: Any) -> Any:
    """The caller passes all tokens, and the model cuts off those that the cache has."""

    def begin(model: Any, whole: torch.Tensor) -> Say:
        held: dict[str, Any] = {}

        def say(start: int, stop: int) -> Any:
            logits, held["cache"] = model(whole[:, :stop], return_cache=True, **always, **held)
            return logits[:, -1:]

        return say

    return begin


def _local() -> nn.Module:
    from local_attention.transformer import LocalTransformer

    return LocalTransformer(
        num_tokens=V, max_seq_len=32, dim=D, depth=2, local_attn_window_size=4, dim_head=8, heads=2
    )


def _sparse(**options: Any) -> nn.Module:
    from native_sparse_attention_pytorch.transformer import Transformer

    return Transformer(num_tokens=V, dim=D, depth=2, dim_head=8, heads=2, **options)


def _infini() -> nn.Module:
    from infini_transformer_pytorch import InfiniTransformer

    return InfiniTransformer(num_tokens=V, dim=D, depth=2, dim_head=8, heads=2)


def _infini_steps(model: Any, whole: torch.Tensor) -> Say:
    held: dict[str, Any] = {}

    def say(start: int, stop: int) -> Any:
        logits, held["cached_kv"], _ = model(whole[:, :stop], **held)
        return logits[:, -1:]

    return say


def _robot(name: str) -> nn.Module:
    stand_in_for("accelerate", "classifier_free_guidance_pytorch", "ema_pytorch",
                 "hl_gauss_pytorch", "adam_atan2_pytorch", "sentencepiece")  # fmt: skip
    without_init("q_transformer")
    from q_transformer import q_robotic_transformer

    options = {} if name == "TransformerAttention" else {"depth": 2}
    return getattr(q_robotic_transformer, name)(dim=D, dim_head=8, heads=2, causal=True, **options)


ATTENTION = (
    Entry(
        "local-attention", "LocalTransformer", "P5 window, P16", _local, _all_tokens(),
        lambda x: {"x": x, "return_cache": True}, lengths=ONE_TOKEN,
    ),
    Entry(
        "native-sparse-attention-pytorch", "Transformer, sparse", "P8, P16",
        lambda: _sparse(use_sparse_attn=True, sparse_attn_kwargs=SPARSE), _all_tokens(),
        lambda x: {"ids": x, "return_cache": True}, lengths=ONE_TOKEN,
    ),
    Entry(
        "infini-transformer-pytorch", "InfiniTransformer", "P1, P16", _infini, _infini_steps,
        lambda x: (x,), lengths=ONE_TOKEN,
    ),
    Entry(
        "q-transformer", "TransformerAttention", "P1 stacked",
        lambda: _robot("TransformerAttention"), passed("cache", return_cache=True),
        lambda x: {"x": x, "return_cache": True}, {}, frames(), ONE_TOKEN,
    ),
    Entry(
        "q-transformer", "Transformer", "P1 stacked, P16", lambda: _robot("Transformer"),
        _all_tokens(), lambda x: {"x": x, "return_cache": True}, {}, frames(), ONE_TOKEN,
    ),
)  # fmt: skip


def _moshi(**options: Any) -> nn.Module:
    stand_in_for("sentencepiece", "sphn", "sounddevice", "aiohttp", "bitsandbytes")
    without_init("moshi")
    without_init("moshi.modules")
    from moshi.modules.transformer import StreamingTransformer

    model = StreamingTransformer(D, 2, 2, dim_feedforward=32, causal=True, **options)
    model.streaming_forever(2)
    return model


def _kept(model: Any, whole: torch.Tensor) -> Say:
    if hasattr(model, "reset"):
        model.reset()
    else:
        model._stop_streaming()
        model.streaming_forever(len(whole))
    return lambda start, stop: model(whole[:, start:stop])


def _predictor() -> nn.Module:
    without_init("torchaudio")
    without_init("torchaudio.models")
    from torchaudio.models.emformer import Emformer

    sys.modules["torchaudio.models"].Emformer = Emformer  # type: ignore[attr-defined]
    from torchaudio.models.rnnt import _Predictor

    return _Predictor(V, D, D, 2, D, lstm_layer_norm=True)


def _lengths(x: torch.Tensor) -> torch.Tensor:
    return torch.full((len(x),), x.shape[1], dtype=torch.int32)


def _predicted(model: Any, whole: torch.Tensor) -> Say:
    held: dict[str, Any] = {}

    def say(start: int, stop: int) -> Any:
        new = whole[:, start:stop]
        result, _, held["state"] = model(new, _lengths(new), **held)
        return result

    return say


def _emformer(**options: Any) -> nn.Module:
    without_init("torchaudio")
    without_init("torchaudio.models")
    from torchaudio.models.emformer import Emformer

    return Emformer(D, 2, 32, 2, 4, left_context_length=6, right_context_length=2, **options)


def _streamed(model: Any, whole: torch.Tensor) -> Say:
    held: dict[str, Any] = {}
    infer = model.infer if hasattr(model, "infer") else model

    def say(start: int, stop: int) -> Any:
        new = whole[:, start : stop + 2]
        result, _, held["states"] = infer(new, _lengths(new), **held)
        return result

    return say


SPEECH = (
    Entry(
        "moshi", "StreamingTransformer", "P7 ring buffers at a tensor's count",
        lambda: _moshi(context=16), _kept, lambda x: (x,), {}, frames(),
    ),
    Entry(
        "moshi", "StreamingTransformer, rotary", "P7 ring buffers at a tensor's count",
        lambda: _moshi(context=16, positional_embedding="rope"), _kept, lambda x: (x,), {},
        frames(),
    ),
    Entry(
        "torchaudio", "RNN-T predictor", "P8, a loop over tokens", _predictor, _predicted,
        lambda x: (x, _lengths(x)),
    ),
    Entry(
        "torchaudio", "Emformer.infer", "P5, P8, a count in the state", _emformer, _streamed,
        lambda x: (torch.cat([x, x], 1)[:, :6], _lengths(x) + 1), {"method": "infer"}, frames(),
        ((4, 4, 4, 4),),
    ),
)  # fmt: skip


def _griffin() -> nn.Module:
    stand_in_for("flax", "jax", "jaxtyping", "sentencepiece", "orbax")
    without_init("recurrentgemma")
    without_init("recurrentgemma.torch")
    from recurrentgemma import common
    from recurrentgemma.torch.griffin import Griffin

    kinds = common.TemporalBlockType
    config = common.GriffinConfig(
        vocab_size=V, width=D, mlp_expanded_width=32, num_heads=2,
        block_types=(kinds.RECURRENT, kinds.ATTENTION), embeddings_scale_by_sqrt_dim=True,
        attention_window_size=8, logits_soft_cap=30.0,
    )  # fmt: skip
    return Griffin(config, device="cpu", dtype=torch.float32)


def _at_positions(model: Any, whole: torch.Tensor) -> Say:
    held: dict[str, Any] = {}

    def say(start: int, stop: int) -> Any:
        at = torch.arange(start, stop).expand(len(whole), -1)
        logits, held["cache"] = model(whole[:, start:stop], at, **held)
        return logits

    return say


LANGUAGE = (
    Entry(
        "recurrentgemma", "Griffin", "P8, ring of keys", _griffin, _at_positions,
        lambda x: (x, torch.arange(x.shape[1]).expand(len(x), -1)), lengths=ONE_TOKEN,
    ),
)  # fmt: skip

ENTRIES: tuple[Entry, ...] = (*ATTENTION, *SPEECH, *LANGUAGE)
