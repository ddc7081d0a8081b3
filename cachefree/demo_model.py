"""The decoder of the demo: a GPT with a key-value cache, written the way people write one.

Nothing here knows of `cachefree`. The first call has no cache, every later call carries one, and an
`if past is None` in each attention layer and at the positions tells the two apart.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

KeyValue = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a `GPT`; the defaults are those of the demo's small character model."""

    vocabulary: int = 128
    context: int = 256
    layers: int = 4
    heads: int = 6
    width: int = 192


class Attention(nn.Module):
    """Causal self-attention over the past and the new tokens."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, past: KeyValue | None = None) -> tuple[Tensor, KeyValue]:
        """Attend from `x`, BS(HD), to the past and to `x`; also give the longer cache, two BHTD."""
        batch, new, width = x.shape
        q, k, v = (
            part.view(batch, new, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(x).split(width, dim=2)
        )
        if past is None:
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            past_k, past_v = past
            seen = past_k.shape[2]
            k = torch.cat([past_k, k], dim=2)
            v = torch.cat([past_v, v], dim=2)
            mask = torch.ones(new, seen + new, dtype=torch.bool, device=x.device).tril(seen)
            y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(batch, new, width)), (k, v)


class Block(nn.Module):
    """One transformer layer, normalised before attention and before the two-layer perceptron."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm_2 = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * config.width, config.width),
        )

    def forward(self, x: Tensor, past: KeyValue | None = None) -> tuple[Tensor, KeyValue]:
        """Transform `x`, BSC, and give this layer's cache."""
        y, present = self.attention(self.norm_1(x), past)
        x = x + y
        return x + self.mlp(self.norm_2(x)), present


class GPT(nn.Module):
    """A decoder with learned positions and a list of one `(key, value)` per layer as its cache."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(
        self, input_ids: Tensor, past: list[KeyValue] | None = None
    ) -> tuple[Tensor, list[KeyValue]]:
        """Give the logits, BSV, of `input_ids`, BS, and the cache for the next call."""
        if past is None:
            start = 0
            past_of_layer: list[KeyValue | None] = [None] * len(self.blocks)
        else:
            start = past[0][0].shape[2]
            past_of_layer = list(past)
        new = input_ids.shape[1]
        positions = torch.arange(start, start + new, device=input_ids.device)
        x = self.tokens(input_ids) + self.positions(positions)
        present = []
        for block, layer_past in zip(self.blocks, past_of_layer, strict=True):
            x, layer_present = block(x, layer_past)
            present.append(layer_present)
        return self.head(self.norm(x)), present
