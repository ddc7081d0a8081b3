"""Models in which no cache is found, models that do not run, and calls of a wrong kind."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .case import RefusalCase, frames, seeded
from .gpt import GPTConfig, NanoGPT
from .refused_branches import Decoder
from .sentinels import FrameDecoder


class Stateless(Decoder):
    """A decoder that recomputes everything at each call."""

    def forward(self, ids):
        return super().forward(ids)[0]


class TakesButDoesNotReturn(Decoder):
    """The past is read, and the present is thrown away."""

    def forward(self, ids, past=None):
        return super().forward(ids, past)[0]


class ReturnsButDoesNotTake(Decoder):
    """The keys and values are returned for inspection only."""

    def forward(self, ids):
        return super().forward(ids)


class IgnoresItsPast(Decoder):
    """The argument was kept for compatibility, and nothing reads it."""

    def forward(self, ids, past=None):
        return super().forward(ids, None)


class TwoMemories(Decoder):
    """A learned prompt and an earlier dialogue have the same form, and each may be left out."""

    def forward(self, ids, prompt=None, dialogue=None):
        x = self.emb(ids)
        states = []
        for i in range(len(self.qkv)):
            q, k, v = self.heads_of(i, x)
            for earlier in (dialogue, prompt):
                if earlier is not None:
                    k = torch.cat((earlier[i][0], k), dim=2)
                    v = torch.cat((earlier[i][1], v), dim=2)
            states.append((k, v))
            mask = self.visible(q.shape[2], k.shape[2], None)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + self.proj[i](y.transpose(1, 2).flatten(2))
        return self.head(x), states


class FirstLayersOnly(Decoder):
    """Only the first layer may go without a past, so that a soft prompt can be put above it."""

    def forward(self, ids, past=None):
        past = list(past) if past is not None else [None] * len(self.qkv)
        x = self.emb(ids)
        present = []
        for i, layer_past in enumerate(past):
            y, kv = self.attend(i, x, layer_past)
            x = x + y
            present.append(kv)
        return self.head(x), present


class SparseReadout(Decoder):
    """A pruned readout in a sparse layout."""

    def __init__(self):
        super().__init__()
        kept = torch.randn(33, 16) * (torch.rand(33, 16) > 0.7)
        self.readout = nn.Parameter(kept.to_sparse_coo(), requires_grad=False)

    def finish(self, x, past):
        flat = x.reshape(-1, self.dim)
        return torch.sparse.mm(self.readout, flat.t()).t().reshape(*x.shape[:2], -1)


class QuantisedReadout(Decoder):
    """A readout in eight bits, as post-training quantisation leaves it."""

    def __init__(self):
        super().__init__()
        weight = torch.quantize_per_tensor(torch.randn(33, 16), 0.05, 0, torch.qint8)
        self.register_buffer("readout", weight)

    def finish(self, x, past):
        return x @ self.readout.dequantize().t()


def sparse_model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SparseReadout().eval()


IDS = torch.tensor([[3, 1, 4], [1, 5, 9]])
TOKEN = torch.tensor([[2], [6]])
gpt = seeded(lambda: NanoGPT(GPTConfig()))


def _past(layers=2, batch=2, length=4, dtype=torch.float32, device="cpu"):
    def entry():
        return torch.ones(batch, 2, length, 8, device=device).to(dtype)

    return [(entry(), entry()) for _ in range(layers)]


def _wrong_rank(rewritten):
    return rewritten(TOKEN, [(k[0], v[0]) for k, v in _past()])


def _first_layer_only(rewritten):
    return rewritten(TOKEN, [*_past(layers=1), None])


def _values_left_out(rewritten):
    return rewritten(TOKEN, [(k, None) for k, _ in _past()])


def _wrong_call(name, then, *says):
    return RefusalCase(
        name, gpt, error="DomainError", says=("past_kvs", *says), example_inputs=(IDS,), then=then
    )


class GatedMLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.gate = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def scripted_gpt():
    model = NanoGPT(GPTConfig())
    for block in model.transformer.h:
        block.mlp = torch.jit.script(GatedMLP(16, 24))
    return model


@torch.jit.script
def scripted_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight, bias).relu()


@torch.jit.script
def scripted_scale(x: torch.Tensor) -> torch.Tensor:
    if torch.jit.is_scripting() and x.shape[1] > 4:
        return x * 2
    return x


@torch.jit.script
def scripted_cap(x: torch.Tensor) -> torch.Tensor:
    if torch.jit.is_scripting() and bool(x.sum() > 4):
        return x.tanh()
    return x


class ScalesInAScript(nn.Linear):
    def forward(self, x):
        return scripted_scale(super().forward(x))


class CapsInAScript(nn.Linear):
    def forward(self, x):
        return scripted_cap(super().forward(x))


def gpt_with_scripted_function(layer: type[nn.Linear]):
    model = NanoGPT(GPTConfig())
    model.transformer.h[0].mlp = layer(16, 16)
    return model


def dynamically_quantised_gpt():
    from torch.ao.quantization import quantize_dynamic

    return quantize_dynamic(NanoGPT(GPTConfig()), {nn.Linear}, dtype=torch.qint8)


REFUSALS = (
    RefusalCase(
        "scripted_submodules",
        seeded(scripted_gpt),
        error="CaptureError",
        says=(
            "The modules 'transformer.h.0.mlp', 'transformer.h.1.mlp' are TorchScript",
            "Put the module that was scripted or traced in its place.",
        ),
        example_inputs=(IDS,),
    ),
    RefusalCase(
        "scripted_function_of_sizes",
        seeded(lambda: gpt_with_scripted_function(ScalesInAScript)),
        error="CaptureError",
        says=(
            "The scripted function 'scripted_scale' cannot be captured.",
            "return scripted_scale(super().forward(x))",
            "It reads a size.",
        ),
        example_inputs=(IDS,),
    ),
    RefusalCase(
        "scripted_function_of_values",
        seeded(lambda: gpt_with_scripted_function(CapsInAScript)),
        error="CaptureError",
        says=("The scripted function 'scripted_cap'", "return scripted_cap(", "without values"),
        example_inputs=(IDS,),
    ),
    RefusalCase(
        "dynamically_quantised",
        dynamically_quantised_gpt,
        error="CaptureError",
        says=("are quantized (Linear)", "more", "Rewrite the model as it was"),
        example_inputs=(IDS,),
    ),
    RefusalCase("no_cache", seeded(Stateless), error="CacheNotFoundError", says=("ids",)),
    RefusalCase(
        "present_is_not_returned",
        seeded(TakesButDoesNotReturn),
        error="CacheNotFoundError",
        says=("past",),
        example_inputs=(IDS,),
    ),
    RefusalCase(
        "past_is_not_taken",
        seeded(ReturnsButDoesNotTake),
        error="CacheNotFoundError",
        says=("carry",),
        example_inputs=(IDS,),
    ),
    RefusalCase(
        "past_is_not_read",
        seeded(IgnoresItsPast),
        error="CacheFreeError",
        says=("past",),
        example_inputs=(IDS,),
    ),
    RefusalCase(
        "two_candidates",
        seeded(TwoMemories),
        error="CacheNotFoundError",
        says=("prompt", "dialogue", "cache="),
        example_inputs=(IDS,),
    ),
    RefusalCase(
        "named_cache_is_no_argument",
        gpt,
        error="CacheNotFoundError",
        says=("past_key_values", "past_kvs"),
        example_inputs=(IDS,),
        rewrite_options={"cache": "past_key_values"},
    ),
    RefusalCase(
        "example_of_a_wrong_width",
        seeded(FrameDecoder),
        error="CaptureError",
        says=("self.prenet(mel)", "sentinels.py"),
        example_inputs=(frames(5)(2, 0, 3, torch.Generator().manual_seed(0)),),
    ),
    RefusalCase(
        "example_with_an_unknown_keyword",
        gpt,
        error="CaptureError",
        says=("input_ids",),
        example_inputs={"input_ids": IDS},
    ),
    RefusalCase(
        "sparse_parameter",
        sparse_model,
        error="CacheFreeError",
        says=("sparse", "readout"),
        example_inputs=(IDS,),
    ),
    RefusalCase(
        "quantised_buffer",
        seeded(QuantisedReadout),
        error="CacheFreeError",
        says=("quanti", "readout"),
        example_inputs=(IDS,),
    ),
    RefusalCase(
        "past_of_some_layers_only",
        seeded(FirstLayersOnly),
        error="DomainError",
        says=("past",),
        example_inputs=(IDS,),
        then=_first_layer_only,
    ),
    _wrong_call("past_of_the_first_layer_only", _first_layer_only),
    _wrong_call("past_without_values", _values_left_out),
    _wrong_call("past_of_a_wrong_rank", _wrong_rank, "rank"),
    _wrong_call("past_of_another_batch", lambda rewritten: rewritten(TOKEN, _past(batch=3))),
    _wrong_call("past_of_too_few_layers", lambda rewritten: rewritten(TOKEN, _past(layers=1))),
    _wrong_call("past_of_too_many_layers", lambda rewritten: rewritten(TOKEN, _past(layers=3))),
    _wrong_call(
        "past_of_integers", lambda rewritten: rewritten(TOKEN, _past(dtype=torch.int64)), "int64"
    ),
    _wrong_call(
        "past_of_another_dtype",
        lambda rewritten: rewritten(TOKEN, _past(dtype=torch.float64)),
        "float64",
    ),
    _wrong_call(
        "past_on_another_device", lambda rewritten: rewritten(TOKEN, _past(device="meta")), "meta"
    ),
)
