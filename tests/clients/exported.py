"""Small models in folders by `to_onnx(folder=True)`, with what eager torch generates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cachefree
from cachefree.demo_model import GPT, GPTConfig
from tests.models.encoder_decoder import TranslationDecoder

V = 60
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,;:!?-"
PROMPT = torch.tensor([[3, 17, 5, 41]])
ROWS = torch.tensor([[3, 17, 5, 41], [9, 9, 50, 2]])
START = 1


@dataclass(frozen=True)
class Exported:
    """A folder, and the model that it was written from."""

    folder: Path
    model: nn.Module


def varied(model: nn.Module, width: float = 0.4, places: float = 0.4) -> nn.Module:
    """A model whose likeliest token is not the same at every step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0.0, places if "pos" in name else width)
    return model.eval()


def own_decoder() -> nn.Module:
    model = GPT(GPTConfig(vocabulary=V, context=64, layers=2, heads=2, width=16))
    model.head.weight = nn.Parameter(torch.empty(V, 16))  # tied, it says again what it was told
    return varied(model)


class Translator(nn.Module):
    """An encoder and a decoder by one call, source and target tokens in."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, 16)
        self.mix = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.decoder = TranslationDecoder(V)

    def forward(self, source, source_mask, target, past=None):
        rows = self.mix(self.embed(source), src_key_padding_mask=source_mask == 0)
        return self.decoder(target, rows, source_mask, past)


def own_translator() -> nn.Module:
    return varied(Translator(), places=4.0)


def llama() -> nn.Module:
    import transformers

    sizes = transformers.LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return varied(transformers.LlamaForCausalLM(sizes))


def bart() -> nn.Module:
    import transformers

    sizes = transformers.BartConfig(
        vocab_size=V, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        decoder_start_token_id=START, forced_eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    return varied(transformers.BartForConditionalGeneration(sizes), places=2.0)


def whisper() -> nn.Module:
    import transformers

    sizes = transformers.WhisperConfig(
        vocab_size=V, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8,
        max_source_positions=20, max_target_positions=64, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, decoder_start_token_id=START, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    return varied(transformers.WhisperForConditionalGeneration(sizes))


EXAMPLES: dict[Callable[[], nn.Module], Any] = {
    own_translator: {
        "source": ROWS, "source_mask": torch.ones_like(ROWS), "target": ROWS[:, :3],
    },
}  # fmt: skip


def exported(build: Callable[[], nn.Module], folder: Path, **options: Any) -> Exported:
    """A model's folder; what is claimed of the rewrite is tested elsewhere."""
    model = build()
    rewritten = cachefree.rewrite(model, EXAMPLES.get(build), check="off")
    path = cachefree.to_onnx(rewritten, folder, folder=True, **options)
    return Exported(path.parent, model)


def continued(model: nn.Module, prompt: torch.Tensor, new: int, *first: torch.Tensor) -> Any:
    """The likeliest tokens by the model's own two paths, as rows of numbers."""
    ids, fresh, past = prompt, prompt, None
    with torch.no_grad():
        for _ in range(new):
            logits, past = model(*first, fresh, past)
            fresh = logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, fresh], 1)
    return ids.tolist()


def words(folder: Path) -> Path:
    """A tokenizer with one word for each token."""
    import tokenizers

    known = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{n}": n for n in range(3, V)}}
    model = tokenizers.models.WordLevel(known, unk_token="<pad>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}'
    )
    return folder
