"""The kinds of a cache in ONNX: each equals the model at every past, batch and chunking."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cachefree
from cachefree.onnx import OnnxDecoder, load_onnx, to_onnx

from .assertions import same
from .models.case import ModelCase, calls, left_padding, seeded, tokens
from .models.gpt import GPTConfig, NanoGPT
from .models.positions import MPT
from .models.rotary import Llama, ModelArgs, RMSNorm

CHUNKS = ((1, 1, 1), (3, 1, 2), (4, 3, 1, 2), (2, 5))
GROUPED, SCATTERED = "GroupQueryAttention", "TensorScatter, Attention"


class Padded(nn.Module):
    """Torch's own attention under a mask of truth values; a padded token sees nothing at all."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.norm = nn.Embedding(20, 16), RMSNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 20)

    def forward(self, ids, attention_mask, past=None):
        b, n = ids.shape
        q, k, v = (
            part.view(b, n, 2, 8).transpose(1, 2)
            for part in self.qkv(self.norm(self.emb(ids))).chunk(3, -1)
        )
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        total = k.shape[2]
        seen = torch.ones(n, total, dtype=torch.bool, device=ids.device).tril(total - n)
        seen = seen[None, None] & attention_mask[:, None, None, :].bool()
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.out(y.transpose(1, 2).reshape(b, n, 16)), (k, v)


class Capped(nn.Module):
    """Scores that are soft-capped, then hidden by the lowest number, in einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.qkv, self.out = nn.Embedding(20, 16), nn.Linear(16, 48), nn.Linear(16, 20)

    def forward(self, ids, past=None):
        b, n = ids.shape
        q, k, v = (part.view(b, n, 2, 8) for part in self.qkv(self.emb(ids)).chunk(3, -1))
        if past is not None:
            k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
        total = k.shape[1]
        scores = torch.tanh(torch.einsum("bthd,bshd->bhts", q, k) / 2.0) * 5.0
        hidden = torch.ones(n, total, dtype=torch.bool, device=ids.device).triu(total - n + 1)
        weights = scores.masked_fill(hidden, torch.finfo(torch.float32).min).softmax(-1)
        y = torch.einsum("bhts,bshd->bthd", weights, v)
        return self.out(y.reshape(b, n, 16)), (k, v)


def padding(batch: int, past: int, query: int, generator: torch.Generator) -> dict[str, Any]:
    return {"attention_mask": left_padding(batch, past, query)}


def case(name: str, build: Callable[[], nn.Module], example: Any = None, **how: Any) -> ModelCase:
    return ModelCase(
        name,
        seeded(build),
        **calls(tokens(20), cache="past", **how),
        patterns=(),
        example_inputs=example,
    )


IDS = torch.tensor([[4, 8, 15], [16, 2, 3]])
MODELS = {
    # the model, what its slots are over shared buffers
    "gpt": (
        ModelCase(
            "gpt",
            seeded(lambda: NanoGPT(GPTConfig(n_layer=1))),
            **calls(tokens(20), cache="past_kvs"),
            patterns=(),
        ),
        GROUPED,
    ),
    "llama": (
        ModelCase(
            "llama",
            seeded(lambda: Llama(ModelArgs(n_layers=1, dim=32))),
            **calls(tokens(20), cache="past_key_values"),
            patterns=(),
        ),
        GROUPED,
    ),
    "alibi": (
        ModelCase(
            "alibi",
            seeded(lambda: MPT(n_layers=1)),
            **calls(tokens(20), cache="past_key_values"),
            patterns=(),
        ),
        SCATTERED,
    ),
    "padded": (
        case("padded", Padded, {"ids": IDS, "attention_mask": torch.ones_like(IDS)}, also=padding),
        GROUPED,
    ),
    "capped": (case("capped", Capped, {"ids": IDS}), GROUPED),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    found, kernel = MODELS[request.param]
    module = found.build()
    return found, module, cachefree.rewrite(module, found.example_inputs, check="off"), kernel


def check(found: ModelCase, module: nn.Module, runtime: OnnxDecoder, like: Any) -> None:
    """Every chunking of a sequence, for several batches, against the model."""
    for chunks in CHUNKS:
        for batch in (1, 2, 3):
            outputs = expected = None
            past = 0
            for new in chunks:
                mine, theirs = (
                    draw(found, before, batch, past, new) for before in (outputs, expected)
                )
                outputs = runtime(*mine[0], **mine[1])
                with torch.no_grad():
                    expected = module(*theirs[0], **theirs[1])
                same(outputs, expected, f"{chunks}, batch {batch}, past {past}")
                past += new


def draw(found: ModelCase, before: Any, batch: int, past: int, new: int) -> Any:
    generator = torch.Generator().manual_seed(7)
    if before is None:
        return found.prefill(batch, new, generator)
    return found.step(before, batch, past, new, generator)


@pytest.mark.parametrize("kind", ["attention", "shared"])
def test_each_kind_is_the_model(model: Any, kind: Any, tmp_path: Path) -> None:
    found, module, rewritten, kernel = model
    runtime = load_onnx(to_onnx(rewritten, tmp_path / "m.onnx", kv=kind), like=rewritten)
    due = kernel if kind == "shared" else "Attention"
    if kind == "attention" and found.name in ("alibi", "capped"):
        assert not runtime.kv.kernels  # rows lie otherwise than the operator takes them
        assert "rows are not (batch, heads, rows, size)" in str(runtime.kv)
    else:
        assert not runtime.kv.reasons, str(runtime.kv)
        assert set(runtime.kv.kernels.values()) == {due}
    check(found, module, runtime, rewritten)
    if kind == "shared":
        assert runtime._shared is not None
        assert runtime._shared.buffers.copies == 0  # each call went on in the buffers of the last
