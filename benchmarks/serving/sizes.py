"""The models that are served, at three sizes each, and how many processes measure each of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks import models
from benchmarks.serving.translator import Translator

__all__ = ["SIZES", "Sizes", "build", "cache_bytes", "weight_bytes"]


@dataclass(frozen=True)
class Sizes:
    """One size of every model.

    Attributes:
        layers: How many layers.
        width: The width of a token.
        heads: Heads of queries.
        vocabulary: Rows of the embedding.
        pasts: The past lengths at which a step is measured.
        rows: The encoder's rows at which a step is measured.
        prompt: Tokens of a prefill.
        steps: Decode steps in one process; the first fifth is left out.
        rounds: Processes that measure a case.
    """

    layers: int
    width: int
    heads: int
    vocabulary: int
    pasts: tuple[int, ...]
    rows: tuple[int, ...]
    prompt: int
    steps: int
    rounds: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


SIZES = {
    "tiny": Sizes(2, 64, 4, 256, (16, 64), (16, 64), 32, 10, 1),
    "short": Sizes(4, 512, 8, 8192, (64, 512), (64, 512), 64, 40, 3),
    "full": Sizes(12, 768, 12, 50257, (64, 512, 2048), (64, 512, 1500), 256, 60, 7),
}


def build(model: str, sizes: Sizes) -> Any:
    """A model with random weights.

    ``gpt`` and ``llama`` are written by hand, ``transformers`` is transformers' Llama, which other
    exporters take too, ``translator`` a decoder that attends to an encoder's states.
    """
    torch.manual_seed(0)
    if model == "translator":
        return Translator(sizes.vocabulary, sizes.layers // 2 or 1, sizes.width, sizes.heads).eval()
    if model == "transformers":
        import transformers

        config = transformers.LlamaConfig(
            vocab_size=sizes.vocabulary, hidden_size=sizes.width, num_hidden_layers=sizes.layers,
            intermediate_size=3 * sizes.width, num_attention_heads=sizes.heads,
            num_key_value_heads=max(sizes.heads // 4, 1), max_position_embeddings=4096,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config).eval()
    return getattr(models, model)(sizes.layers, sizes.width, sizes.heads, sizes.vocabulary)


def weight_bytes(model: Any) -> int:
    """The weights that a step reads; an embedding that is no head is read by a row alone."""
    heads = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Linear)}
    looked_up = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding) and id(module.weight) not in heads
    }
    read = {id(p): p for p in model.parameters() if id(p) not in looked_up}
    return sum(p.numel() * p.element_size() for p in read.values())


def cache_bytes(model: str, sizes: Sizes, past: int) -> int:
    """The keys and values that a step reads."""
    heads = sizes.heads if model == "gpt" else max(sizes.heads // 4, 1)
    return 2 * 4 * sizes.layers * past * heads * (sizes.width // sizes.heads)
