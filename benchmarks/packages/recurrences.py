"""Recurrent and memory models of packages: states, memories of segments, first calls in chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.packages.entry import (
    VOCABULARY,
    WIDTH,
    Entry,
    Say,
    passed,
    stand_in_for,
    without_init,
)

V, D = VOCABULARY, WIDTH
SEGMENTS = ((4, 4, 4), (4, 4, 2), (4, 1))


def _compressive() -> nn.Module:
    from compressive_transformer_pytorch import CompressiveTransformer

    return CompressiveTransformer(
        num_tokens=V, dim=D, depth=2, seq_len=4, mem_len=4, cmem_len=4, cmem_ratio=2, heads=2
    )


def _block_recurrent() -> nn.Module:
    from block_recurrent_transformer_pytorch import BlockRecurrentTransformer

    return BlockRecurrentTransformer(
        num_tokens=V, dim=D, depth=2, dim_head=8, heads=2, max_seq_len=4, block_width=4,
        recurrent_layers=(2,),
    )  # fmt: skip


def _recurrent_memory(**options: Any) -> nn.Module:
    from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer

    return RecurrentMemoryTransformer(
        num_tokens=V, num_memory_tokens=2, dim=D, depth=2, dim_head=8, heads=2, seq_len=8,
        causal=True, **options,
    )  # fmt: skip


def _segments(*names: str, **always: Any) -> Any:
    """All that follows the first result is passed on under these names."""

    def begin(model: Any, whole: torch.Tensor) -> Say:
        held: dict[str, Any] = {}

        def say(start: int, stop: int) -> Any:
            result, *kept = model(whole[:, start:stop], **always, **held)
            held.update(zip(names, kept, strict=False))
            return result

        return say

    return begin


MEMORIES = (
    Entry(
        "compressive-transformer-pytorch", "CompressiveTransformer", "P5 mems, compressed",
        _compressive, passed("memories"), lambda x: (x[:, :4],), lengths=SEGMENTS,
    ),
    Entry(
        "block-recurrent-transformer-pytorch", "BlockRecurrentTransformer", "P5, P8 states",
        _block_recurrent, _segments("xl_memories", "states", return_memories_and_states=True),
        lambda x: {"x": x[:, :4], "return_memories_and_states": True}, lengths=((4, 4, 4),),
    ),
    Entry(
        "recurrent-memory-transformer-pytorch", "RecurrentMemoryTransformer", "P5, P22 rows around",
        _recurrent_memory, _segments("read_memories"), lambda x: (x,), lengths=SEGMENTS,
    ),
    Entry(
        "recurrent-memory-transformer-pytorch", "RecurrentMemoryTransformer, xl memories",
        "P5, P22 rows around",
        lambda: _recurrent_memory(use_xl_memories=True, xl_mem_len=6),
        _segments("read_memories", "xl_memories"), lambda x: (x,), lengths=SEGMENTS,
    ),
)  # fmt: skip


def _reinvent(kind: str) -> nn.Module:
    without_init("reinvent_models")
    stand_in_for("rdkit", "reinvent_chemistry")
    from reinvent_models.reinvent_core.models.model import RNN

    return RNN(V, layer_size=D, num_layers=2, cell_type=kind, embedding_layer_size=D)


def _xlstm(**options: Any) -> nn.Module:
    from xlstm import (
        mLSTMBlockConfig,
        mLSTMLayerConfig,
        xLSTMLMModel,
        xLSTMLMModelConfig,
    )

    config = xLSTMLMModelConfig(
        vocab_size=V, embedding_dim=D, num_blocks=2, context_length=32, add_embedding_dropout=False,
        mlstm_block=mLSTMBlockConfig(
            mlstm=mLSTMLayerConfig(conv1d_kernel_size=4, qkv_proj_blocksize=4, num_heads=2)
        ),
        **options,
    )  # fmt: skip
    return xLSTMLMModel(config)


def _stepped(model: Any, whole: torch.Tensor) -> Say:
    held: dict[str, Any] = {}
    step = model.step if hasattr(model, "step") else model

    def say(start: int, stop: int) -> Any:
        result, held["state"] = step(whole[:, start:stop], **held)
        return result

    return say


STATES = (
    *(
        Entry(
            "reinvent-models", f"RNN, {kind}", "P8 state of a recurrent network",
            lambda kind=kind: _reinvent(kind), passed("hidden_state"), lambda x: (x,),
        )
        for kind in ("gru", "lstm")
    ),
    Entry(
        "xlstm", "xLSTMLMModel.step", "P8, P20, dict of dicts", _xlstm, _stepped,
        lambda x: (x[:, :1],), {"method": "step"}, lengths=((1, 1, 1, 1),),
    ),
)  # fmt: skip

ENTRIES: tuple[Entry, ...] = (*MEMORIES, *STATES)
