"""The demo: train a small GPT, rewrite it, export one ONNX file, generate the same text twice.

`python -m cachefree.demo` takes about two minutes on two cores. `--large` does the same for a model
of GPT-2-small's size with random weights, where there is nothing to train.
"""

import argparse
import math
import pydoc_data.topics
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import cachefree
from cachefree.demo_model import GPT, GPTConfig
from cachefree.onnx.storage import files_of, new_folder

SMALL = GPTConfig(vocabulary=0, context=128, layers=5, heads=4, width=128)
LARGE = GPTConfig(vocabulary=50257, context=1024, layers=12, heads=12, width=768)
PROMPT = "A function definition "
TEXTS_PER_STEP = 14


@dataclass(frozen=True)
class Generated:
    """The tokens of one greedy run, and how long it took."""

    tokens: list[int]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second, the first call among them."""
        return len(self.tokens) / self.seconds


class CharacterCorpus:
    """Python's own documentation, a line a paragraph, as one row of character numbers."""

    def __init__(self) -> None:
        topics = "\n\n".join(pydoc_data.topics.topics.values())
        paragraphs = re.split(r"\n\s*\n", topics)
        text = "\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
        self.alphabet = sorted(set(text))
        self._number = {character: number for number, character in enumerate(self.alphabet)}
        self.row = self.encode(text)

    def encode(self, text: str) -> Tensor:
        """Give the numbers of the characters of `text`, one axis."""
        return torch.tensor([self._number[character] for character in text])

    def decode(self, tokens: list[int]) -> str:
        """Give the text of `tokens`."""
        return "".join(self.alphabet[token] for token in tokens)

    def draw(self, batch: int, length: int) -> Tensor:
        """Give `batch` random pieces of `length` characters, BS."""
        starts = torch.randint(len(self.row) - length, (batch, 1))
        return self.row[starts + torch.arange(length)]


def start_from_waves(model: GPT) -> None:
    """Start the learned positions from sinusoids, which a minute of training cannot find."""
    context, width = model.positions.weight.shape
    frequencies = torch.exp(-math.log(10_000) * torch.arange(0, width, 2) / width)
    angles = torch.arange(context)[:, None] * frequencies
    with torch.no_grad():
        model.positions.weight.copy_(0.2 * torch.cat([angles.sin(), angles.cos()], dim=1))
        nn.init.normal_(model.tokens.weight, std=0.1)


def train(model: GPT, corpus: CharacterCorpus, steps: int) -> float:
    """Train `model` on pieces of `corpus`; give the mean loss of the last steps, nats a character.

    The layers' matrices go to Muon, which learns from far fewer characters; the rest to AdamW.
    """
    matrices = [weight for weight in model.blocks.parameters() if weight.dim() == 2]
    in_matrices = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in in_matrices]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=0.03, weight_decay=0.01),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95)),
    ]

    def rate(step: int) -> float:
        """Warm up for a tenth of the steps, then follow half a cosine down to zero."""
        return min(1.0, 10 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    mean_loss = math.log(model.config.vocabulary)
    with tqdm(total=steps, desc="training", unit="step") as bar:
        for _ in range(steps):
            pieces = corpus.draw(TEXTS_PER_STEP, model.config.context + 1)
            logits, _ = model(pieces[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1), pieces[:, 1:].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            mean_loss += 0.05 * (loss.item() - mean_loss)
            bar.set_postfix(loss=f"{mean_loss:.2f}", refresh=False)
            bar.update()
    return mean_loss


def draw_noise(new_tokens: int, vocabulary: int, temperature: float) -> Tensor:
    """Draw Gumbel noise, SV, once for every runtime: the largest logit plus noise is a sample."""
    uniform = torch.rand(new_tokens, vocabulary, generator=torch.Generator().manual_seed(0))
    return -temperature * torch.log(-torch.log(uniform.clamp(1e-9, 1 - 1e-7)))


@torch.no_grad()
def generate(decoder: Callable[..., Any], prompt: Tensor, noise: Tensor) -> Generated:
    """Generate a token for each row of `noise`: one call without a cache, then one a token with it.

    The token is the most likely one where the noise is zero.
    """
    start = time.perf_counter()
    logits, past = decoder(prompt)
    tokens = [int((logits[0, -1] + noise[0]).argmax())]
    for token_noise in noise[1:]:
        logits, past = decoder(torch.tensor([tokens[-1:]]), past)
        tokens.append(int((logits[0, -1] + token_noise).argmax()))
    return Generated(tokens, time.perf_counter() - start)


def warmed_up_generation(decoder: Callable[..., Any], prompt: Tensor, noise: Tensor) -> Generated:
    """Generate after a short first run that nobody times."""
    generate(decoder, prompt, noise[:4])
    return generate(decoder, prompt, noise)


def describe(model: GPT) -> str:
    """Give the sizes of `model` in one line."""
    parameters = sum(weight.numel() for weight in model.parameters())
    sizes = model.config
    return (
        f"{parameters / 1e6:.1f} million parameters: {sizes.layers} layers, {sizes.width} wide, "
        f"{sizes.heads} heads, context {sizes.context}, vocabulary {sizes.vocabulary}"
    )


def heading(text: str) -> None:
    """Print a heading."""
    print(f"\n== {text}")


def prepare(large: bool, steps: int) -> tuple[GPT, Tensor, Callable[[list[int]], str]]:
    """Give the model, a prompt, BS, and how to show tokens."""
    torch.manual_seed(0)
    if large:
        heading("A GPT of GPT-2-small's size with random weights")
        model = GPT(LARGE).eval()
        print(describe(model))
        return model, torch.randint(LARGE.vocabulary, (1, 16)), str
    heading("A character GPT, trained on the documentation that comes with Python")
    corpus = CharacterCorpus()
    config = GPTConfig(**{**vars(SMALL), "vocabulary": len(corpus.alphabet)})
    model = GPT(config)
    start_from_waves(model)
    print(describe(model))
    loss = train(model, corpus, steps)
    print(f"loss {loss:.2f} nats a character")
    return model.eval(), corpus.encode(PROMPT)[None], corpus.decode


def main(arguments: list[str] | None = None) -> Path:
    """Run the demo from the command line; give the path of the graph that it wrote."""
    parser = argparse.ArgumentParser(prog="python -m cachefree.demo", description=__doc__)
    parser.add_argument("--large", action="store_true", help="124 million random weights instead")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="where the file goes")
    parser.add_argument("--steps", type=int, default=350, help="steps of training")
    parser.add_argument("--tokens", type=int, default=100, help="how many tokens to generate")
    parser.add_argument("--temperature", type=float, default=0.4, help="0: the most likely token")
    options = parser.parse_args(arguments)

    model, prompt, show = prepare(options.large, options.steps)
    new_tokens = min(options.tokens, model.config.context - prompt.shape[1] + 1)

    heading("cachefree.rewrite(model)")
    start = time.perf_counter()
    rewritten = cachefree.rewrite(model)
    print(f"{time.perf_counter() - start:.1f} s\n")
    print(rewritten.report)

    heading("cachefree.to_onnx(rewritten, path)")
    path: Path = options.out / ("gpt-large.onnx" if options.large else "gpt-small.onnx")
    start = time.perf_counter()
    with new_folder(options.out):
        cachefree.to_onnx(rewritten, path)
    print(f"{path}, {time.perf_counter() - start:.1f} s")
    onnx_decoder = cachefree.load_onnx(path, like=rewritten, providers=["CPUExecutionProvider"])

    heading(f"{new_tokens} tokens, drawn with the same random numbers in torch and ONNX Runtime")
    noise = draw_noise(new_tokens, model.config.vocabulary, options.temperature)
    by_torch, by_onnxruntime = (
        warmed_up_generation(decoder, prompt, noise) for decoder in (model, onnx_decoder)
    )
    print(show(prompt[0].tolist() + by_onnxruntime.tokens))
    if by_torch.tokens != by_onnxruntime.tokens:
        raise SystemExit(
            f"The tokens differ.\n  torch:        {by_torch.tokens}"
            f"\n  ONNX Runtime: {by_onnxruntime.tokens}"
        )
    print("\nThe tokens of torch and of ONNX Runtime are equal.")

    heading("Sizes and speed")
    weights = sum(weight.nbytes for weight in model.parameters()) / 1e6
    print(f"weights in memory         {weights:8.1f} MB")
    for file in files_of(path):
        print(f"{file.name:25} {file.stat().st_size / 1e6:8.1f} MB")
    print(f"torch, the model itself   {by_torch.tokens_per_second:8.0f} tokens/s")
    print(f"ONNX Runtime, one graph   {by_onnxruntime.tokens_per_second:8.0f} tokens/s")
    return path


if __name__ == "__main__":
    main()
