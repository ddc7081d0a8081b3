"""Tiny random models of transformers' architectures, from their configuration classes.

Sizes are set by the names of a configuration's attributes; what an architecture needs besides is
in `EXCEPTIONS`, as data.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

# By attribute name, wherever a configuration has it.
TINY: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "dim": 32,
    "embed_dim": 32,
    "word_embed_proj_dim": 32,
    "embedding_size": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "d_ff": 48,
    "d_inner": 48,
    "n_inner": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_layers": 1,
    "speech_encoder_layers": 1,
    "t2u_encoder_layers": 1,
    "t2u_decoder_layers": 1,
    "vocab_size_per_layer_input": 60,
    "hidden_size_per_layer_input": 16,
    "decoder_num_hidden_layers": 2,
    "encoder_num_hidden_layers": 1,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "rotary_dim": 4,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "n_ctx": 64,
    "max_source_positions": 64,
    "max_target_positions": 64,
    "max_seq_len": 64,
    "sliding_window": 6,
    "attention_window": 6,
    "window_size": 6,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "shared_expert_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "mamba_chunk_size": 8,
    "mamba_d_ssm": 64,
    "n_mamba_heads": 4,
    "mamba_headdim": 16,
    "state_size": 8,
    "ssm_state_size": 8,
    "chunk_size": 8,
    "time_step_rank": 4,
    "lru_width": 32,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "num_mel_bins": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "is_decoder": True,
    "use_cache": True,
}

# What an architecture needs besides: attributes by model type; None leaves the default.
_ALL_HEADS = {"num_key_value_heads": 4}
_EVERY_OTHER = {"attn_layer_period": 2, "attn_layer_offset": 1}
_LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    *("decoder_layers", "num_decoder_layers", "decoder_num_hidden_layers"),
)
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "axk1": _ALL_HEADS,
    "axk2": _ALL_HEADS,
    "bailing_hybrid": _ALL_HEADS,
    "bamba": {"attn_layer_indices": [1]},
    "cpmant": {"dim_head": 8, "prompt_length": 4},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": _ALL_HEADS,
    "deepseek_v3": _ALL_HEADS,
    "deepseek_v32": _ALL_HEADS,
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {**_ALL_HEADS, "per_layer_config": None},
    "dots3_note_text": _ALL_HEADS,
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "glm4_moe_lite": _ALL_HEADS,
    "glm_moe_dsa": _ALL_HEADS,
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "jamba": _EVERY_OTHER,
    "kimi_linear": _ALL_HEADS,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "nemotron_h": {"n_groups": 1},
    "prophetnet": {"num_encoder_layers": 2, "num_decoder_layers": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layer_types": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layer_types": ["linear_attention", "hybrid"], "hybrid_layer_ids": [1]},
    "longcat_flash": _ALL_HEADS,
    "minicpm3": _ALL_HEADS,
    "youtu": _ALL_HEADS,
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(cls: type[Any], layers: int = 2) -> Any:
    """A small configuration of a class, its own parts small too.

    Args:
        cls: A configuration's class.
        layers: How many layers, where all are of one kind; else one of each kind.
    """
    plain = cls()
    names = set(inspect.signature(cls.__init__).parameters) | set(plain.to_dict())
    given = {name: value for name, value in TINY.items() if name in names}
    given |= {name: layers for name in _LAYERS if name in names}
    if getattr(plain, "is_encoder_decoder", False):
        given.pop("is_decoder", None)  # what the model sets on its own parts
    kinds = list(dict.fromkeys(getattr(plain, "layer_types", None) or ()))
    if len(kinds) > 1 and "layer_types" in inspect.signature(cls.__init__).parameters:
        given |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    for name, part in (getattr(cls, "sub_configs", None) or {}).items():
        own = type(getattr(plain, name, None))  # where the class leaves it open which one
        part = own if hasattr(own, "sub_configs") else part
        if name in names and hasattr(part, "model_type") and part.model_type:
            given[name] = tiny_config(part, layers).to_dict()
    for name, value in EXCEPTIONS.get(cls.model_type, {}).items():
        if value is None:
            given.pop(name, None)
        else:
            given[name] = value
    kinds = given.get("layer_types") or given.get("block_types") or given.get("attn_layers") or ()
    if kinds or "attn_layer_period" in given or given.get("attn_layer_indices"):
        given["num_hidden_layers"] = max(len(kinds), 2)
    return cls(**given)


def architectures(kind: str) -> list[str]:
    """The model types of a task, from transformers' own mapping.

    Args:
        kind: ``"causal"``, ``"seq2seq"`` or ``"speech"``.
    """
    from transformers.models.auto import modeling_auto

    mapping = {
        "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "speech": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    }
    return list(mapping[kind])


def tiny_model(
    kind: str, name: str, sizes: Mapping[str, int] | None = None, layers: int = 2
) -> Any:
    """A small random model, in evaluation mode, its weights large enough to show a wrong cache.

    Args:
        kind: As `architectures` has it.
        name: The model type.
        sizes: Sizes of the configuration other than the usual ones.
        layers: As `tiny_config` has it.
    """
    import torch
    import transformers
    from transformers.models.auto import configuration_auto

    auto = {
        "causal": transformers.AutoModelForCausalLM,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
        "speech": transformers.AutoModelForSpeechSeq2Seq,
    }[kind]
    torch.manual_seed(0)
    config = tiny_config(configuration_auto.CONFIG_MAPPING[name], layers)
    if kind == "causal" and hasattr(config, "encoder_layers"):
        # a decoder alone counts the layers of its cache by the encoder's
        config.encoder_layers = config.decoder_layers
    for size, value in (sizes or {}).items():
        setattr(config, size, value)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() > 1:
                tensor.normal_(0, 0.2)
    return model
