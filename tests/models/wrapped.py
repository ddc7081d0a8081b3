"""Decoders with something wrapped around or inside them: hooks, scripts, compiled parts."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from .case import ModelCase, calls, frames, seeded, tokens
from .gpt import MLP, GPTConfig, NanoGPT


def clamp_residual(module, args, output):
    hidden, kv = output
    return hidden.clamp(-4.0, 4.0), kv


def scale_input(module, args):
    return (args[0] * module.input_scale, *args[1:])


def hooked_gpt():
    """Activations are clamped after each block and scaled before the head, as for quantisation."""
    model = NanoGPT(GPTConfig())
    for block in model.transformer.h:
        block.register_forward_hook(clamp_residual)
    model.lm_head.input_scale = 0.7
    model.lm_head.register_forward_pre_hook(scale_input)
    return model


class ActivationRecorder:
    def __init__(self, model):
        self.seen = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.LayerNorm):
                module.register_forward_hook(self.make_hook(name))

    def make_hook(self, name):
        def hook(module, args, output):
            self.seen[name] = output.detach().abs().amax(dim=(0, 1))

        return hook


def recorded_gpt():
    """Hooks that keep the last activations of every norm, as profilers and probes do."""
    model = NanoGPT(GPTConfig(n_layer=1))
    model.recorder = ActivationRecorder(model)
    return model


def compiled_gpt():
    model = NanoGPT(GPTConfig())
    for block in model.transformer.h:
        block.mlp = torch.compile(MLP(GPTConfig()), backend="eager", dynamic=True)
    return model


class Profiled(NanoGPT):
    """Says to the profiler what it does."""

    def __init__(self):
        super().__init__(GPTConfig(n_layer=1))

    def forward(self, idx, past_kvs=None):
        with torch.profiler.record_function("decoder"):
            return super().forward(idx, past_kvs)


class SnakeBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(dim))
        self.query, self.key, self.value = (weight_norm(nn.Linear(dim, dim)) for _ in range(3))

    def forward(self, x, cache=None):
        x = x + (1.0 / (self.alpha + 1e-9)) * torch.sin(self.alpha * x).pow(2)
        q, k, v = self.query(x), self.key(x), self.value(x)
        if cache is not None:
            k, v = (torch.cat((old, new), 1) for old, new in zip(cache, (k, v)))
        t, s = q.shape[1], k.shape[1]
        mask = x.new_ones(t, s).tril(s - t).log()
        return x + torch.softmax(q @ k.transpose(1, 2) / 4.0 + mask, -1) @ v, (k, v)


class LatentPredictor(nn.Module):
    """Weight-normalised projections over the frames of an audio codec."""

    def __init__(self, latent=6, dim=16, depth=2):
        super().__init__()
        self.pre = weight_norm(nn.Linear(latent, dim))
        self.blocks = nn.ModuleList([SnakeBlock(dim) for _ in range(depth)])
        self.post = weight_norm(nn.Linear(dim, 2 * latent))

    def forward(self, z, caches=None):
        h = self.pre(z)
        new_caches = []
        for i, block in enumerate(self.blocks):
            h, cache = block(h, caches[i] if caches is not None else None)
            new_caches.append(cache)
        mean, log_scale = self.post(h).chunk(2, dim=-1)
        return {"mean": mean, "log_scale": log_scale.clamp(-7, 2), "caches": tuple(new_caches)}


class Generator(nn.Module):
    """A wrapper that hands everything on, as those of adapters and trainers do."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, *args, **kwargs):
        return self.decoder(*args, **kwargs)


class Calibrated(nn.Module):
    """A temperature on the logits; all other arguments go through by keyword."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = Generator(decoder)
        self.temperature = nn.Parameter(torch.tensor(1.3))

    def forward(self, tokens, **kwargs):
        logits, *rest = self.decoder(tokens, **kwargs)
        return (logits / self.temperature, *rest)


CASES = (
    ModelCase(
        "wrapper_that_hands_everything_on",
        seeded(lambda: Calibrated(hooked_gpt())),
        **calls(tokens(37), cache="past_kvs"),
        patterns=("P1", "P2", "P3"),
    ),
    ModelCase(
        "hooks_that_change_activations",
        seeded(hooked_gpt),
        **calls(tokens(37)),
        patterns=("P1", "P2", "P3"),
    ),
    ModelCase(
        "hooks_that_record",
        seeded(recorded_gpt),
        **calls(tokens(37)),
        patterns=("P1", "P2", "P3"),
    ),
    ModelCase(
        "compiled_submodule",
        seeded(compiled_gpt),
        **calls(tokens(37), cache="past_kvs"),
        patterns=("P1", "P2", "P3"),
        example_inputs=(torch.tensor([[1, 2, 3, 4]]),),
    ),
    ModelCase(
        "compiled_as_a_whole",
        seeded(lambda: torch.compile(Profiled(), backend="eager")),
        **calls(tokens(37), cache="past_kvs"),
        patterns=("P1", "P2", "P3"),
    ),
    ModelCase(
        "names_for_the_profiler",
        seeded(lambda: nn.DataParallel(Profiled())),
        **calls(tokens(37), cache="past_kvs"),
        patterns=("P1", "P2", "P3"),
    ),
    ModelCase(
        "weight_norm_over_codec_frames",
        seeded(LatentPredictor),
        **calls(frames(6), cache="caches", take=lambda out: out["caches"]),
        patterns=("P1",),
    ),
)
