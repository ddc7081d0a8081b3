"""Decoders with cache branches, written by hand, and how each is called.

The GPT is the demo's own. The Llama-shaped one has rotary positions, grouped-query attention,
root-mean-square norms and a gated perceptron. Both are built at any size, on any device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from cachefree.demo_model import GPT, GPTConfig, KeyValue

__all__ = ["GPT", "GPTConfig", "KeyValue", "Llama", "LlamaConfig", "gpt", "llama"]


@dataclass(frozen=True)
class LlamaConfig:
    vocabulary: int = 256
    layers: int = 4
    heads: int = 4
    key_heads: int = 2
    width: int = 64
    hidden: int = 128

    @property
    def head_size(self) -> int:
        return self.width // self.heads


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the halves of `x`, BHSD, by the angles of its positions, SD."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class LlamaAttention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.key_heads = config.heads, config.key_heads
        size = config.head_size
        self.q = nn.Linear(config.width, config.heads * size, bias=False)
        self.k = nn.Linear(config.width, config.key_heads * size, bias=False)
        self.v = nn.Linear(config.width, config.key_heads * size, bias=False)
        self.out = nn.Linear(config.heads * size, config.width, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        batch, new, _ = x.shape
        q = self.q(x).view(batch, new, self.heads, -1).transpose(1, 2)
        k = self.k(x).view(batch, new, self.key_heads, -1).transpose(1, 2)
        v = self.v(x).view(batch, new, self.key_heads, -1).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        seen = 0
        if past is not None:
            seen = past[0].shape[2]
            k = torch.cat([past[0], k], dim=2)
            v = torch.cat([past[1], v], dim=2)
        mask = torch.ones(new, seen + new, dtype=torch.bool, device=x.device).tril(seen)
        y = functional.scaled_dot_product_attention(q, self.share(k), self.share(v), attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(batch, new, -1)), (k, v)

    def share(self, x: Tensor) -> Tensor:
        """Give each key head to its group of query heads: B, key heads, T, D to BHTD."""
        batch, heads, length, size = x.shape
        group = self.heads // heads
        x = x[:, :, None].expand(batch, heads, group, length, size)
        return x.reshape(batch, self.heads, length, size)


class LlamaBlock(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.norm_1 = RMSNorm(config.width)
        self.attention = LlamaAttention(config)
        self.norm_2 = RMSNorm(config.width)
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        y, present = self.attention(self.norm_1(x), cos, sin, past)
        x = x + y
        y = self.norm_2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y)), present


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(LlamaBlock(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(
        self, input_ids: Tensor, past: list[KeyValue] | None = None
    ) -> tuple[Tensor, list[KeyValue]]:
        start = past[0][0].shape[2] if past is not None else 0
        new, size = input_ids.shape[1], self.config.head_size
        device = input_ids.device
        positions = torch.arange(start, start + new, device=device, dtype=torch.float32)
        steps = torch.arange(0, size, 2, device=device, dtype=torch.float32)
        angles = torch.outer(positions, 10_000 ** (-steps / size))
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = angles.cos(), angles.sin()
        x = self.tokens(input_ids)
        present = []
        for number, block in enumerate(self.blocks):
            x, layer_present = block(x, cos, sin, past[number] if past is not None else None)
            present.append(layer_present)
        return self.head(self.norm(x)), present


def gpt(layers: int = 4, width: int = 64, heads: int = 4, vocabulary: int = 256) -> GPT:
    torch.manual_seed(0)
    sizes = GPTConfig(vocabulary, context=4096, layers=layers, heads=heads, width=width)
    return GPT(sizes).eval()


def llama(layers: int = 4, width: int = 64, heads: int = 4, vocabulary: int = 256) -> Llama:
    torch.manual_seed(0)
    sizes = LlamaConfig(vocabulary, layers, heads, max(heads // 4, 1), width, hidden=3 * width)
    return Llama(sizes).eval()
