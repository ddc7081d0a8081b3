"""Decoders that hand out their cache only when asked to, and in outputs of their own classes."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

from .case import ModelCase, calls, seeded, tokens


class ModelOutput(OrderedDict):
    """An ordered dict with its keys as attributes; fields that are None are left out."""

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                super().__setitem__(field.name, value)

    def __setattr__(self, name, value):
        if name in self.keys() and value is not None:
            super().__setitem__(name, value)
        super().__setattr__(name, value)

    def to_tuple(self):
        return tuple(self[k] for k in self.keys())


@dataclass
class CausalLMOutput(ModelOutput):
    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: tuple | None = None
    attentions: tuple | None = None


class Config:
    def __init__(self, **kwargs):
        self.vocab_size = kwargs.pop("vocab_size", 36)
        self.hidden_size = kwargs.pop("hidden_size", 16)
        self.num_layers = kwargs.pop("num_layers", 2)
        self.num_heads = kwargs.pop("num_heads", 2)
        self.use_cache = kwargs.pop("use_cache", False)
        self.use_return_dict = kwargs.pop("use_return_dict", False)
        self.output_attentions = kwargs.pop("output_attentions", False)


class FlaggedAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def _split_heads(self, tensor):
        return tensor.view(*tensor.shape[:2], self.num_heads, -1).permute(0, 2, 1, 3)

    def forward(self, hidden_states, layer_past=None, use_cache=False, output_attentions=False):
        query = self._split_heads(self.q_proj(hidden_states))
        key = self._split_heads(self.k_proj(hidden_states))
        value = self._split_heads(self.v_proj(hidden_states))
        if layer_past is not None:
            key = torch.cat((layer_past[0], key), dim=-2)
            value = torch.cat((layer_past[1], value), dim=-2)
        if use_cache is True:
            present = (key, value)
        else:
            present = None
        length, total = query.size(-2), key.size(-2)
        weights = torch.matmul(query, key.transpose(-1, -2)) * query.size(-1) ** -0.5
        position = torch.arange(total, device=weights.device)
        weights = weights - 0.3 * (position[total - length :, None] - position).abs()
        weights = weights.masked_fill(position > position[total - length :, None], float("-inf"))
        weights = F.softmax(weights, dim=-1)
        output = torch.matmul(weights, value).permute(0, 2, 1, 3).reshape(hidden_states.shape)
        outputs = (self.out_proj(output), present)
        if output_attentions:
            outputs += (weights,)
        return outputs


class FlaggedModel(nn.Module):
    """Every flag of the Hugging Face convention, each off unless the call turns it on."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList([FlaggedAttention(config) for _ in range(config.num_layers)])
        self.ln = nn.ModuleList(
            [nn.LayerNorm(config.hidden_size) for _ in range(config.num_layers)]
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: tuple[tuple[torch.Tensor]] | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ):
        use_cache = use_cache if use_cache is not None else self.config.use_cache
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        if input_ids is not None and inputs_embeds is not None:
            raise ValueError("You cannot specify both input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        if past_key_values is None:
            past_key_values = tuple([None] * len(self.h))
        presents = () if use_cache else None
        all_self_attentions = () if output_attentions else None
        hidden_states = inputs_embeds
        for i, (block, layer_past) in enumerate(zip(self.h, past_key_values)):
            outputs = block(self.ln[i](hidden_states), layer_past, use_cache, output_attentions)
            hidden_states = hidden_states + outputs[0]
            if use_cache is True:
                presents = presents + (outputs[1],)
            if output_attentions:
                all_self_attentions = all_self_attentions + (outputs[2],)
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[..., :-1, :].flatten(0, 1), labels[..., 1:].flatten())
        if not return_dict:
            output = (logits, presents, all_self_attentions)
            output = tuple(v for v in output if v is not None)
            return ((loss,) + output) if loss is not None else output
        return CausalLMOutput(loss, logits, presents, all_self_attentions)


class Prediction:
    def __init__(self, logits, hidden, cache=None):
        self.logits = logits
        self.hidden = hidden
        self.cache = cache


class PhonemeLM(nn.Module):
    """A plain object comes out, and `return_cache` has to be set."""

    def __init__(self, phonemes=28, dim=16, n_blocks=2):
        super().__init__()
        self.inp = nn.Embedding(phonemes, dim)
        self.key_value = nn.ModuleList([nn.Linear(dim, 2 * dim) for _ in range(n_blocks)])
        self.query = nn.ModuleList([nn.Linear(dim, dim) for _ in range(n_blocks)])
        self.decay = nn.Parameter(torch.full((n_blocks,), 0.2))
        self.out = nn.Linear(dim, phonemes)

    def forward(self, phonemes, cache=None, return_cache=False):
        h = self.inp(phonemes)
        caches = []
        for i in range(len(self.query)):
            kv = self.key_value[i](h)
            if cache is not None:
                kv = torch.cat([cache[i], kv], dim=1)
            caches.append(kv)
            k, v = kv.tensor_split(2, dim=-1)
            t, s = h.size(1), kv.size(1)
            lag = torch.arange(s - t, s).unsqueeze(1) - torch.arange(s)
            score = torch.baddbmm(
                -self.decay[i] * lag, self.query[i](h), k.transpose(1, 2), alpha=h.size(2) ** -0.5
            )
            h = h + score.masked_fill(lag < 0, -torch.inf).softmax(-1) @ v
        return Prediction(self.out(h), h, caches if return_cache else None)


class Seq2SeqStyleDecoder(nn.Module):
    """`output_present` defaults to off; an `is_first` of the past decides about the positions."""

    def __init__(self, vocab=27, d=16, heads=4, layers=2):
        super().__init__()
        self.heads = heads
        self.emb, self.pos = nn.Embedding(vocab, d), nn.Embedding(64, d)
        self.attn = nn.ModuleList([nn.Linear(d, 3 * d) for _ in range(layers)])
        self.mix = nn.ModuleList([nn.Linear(d, d) for _ in range(layers)])
        self.fc = nn.Linear(d, vocab)

    def forward(self, x, layers_past=None, *, output_present=False):
        if layers_past is not None:
            offset = layers_past[0].shape[3]
        else:
            offset = 0
        n = x.shape[1]
        if offset > 0:
            position = torch.arange(offset, offset + n, device=x.device)
        else:
            position = torch.arange(n, device=x.device)
        h = self.emb(x) + self.pos(position)
        presents = []
        for i in range(len(self.attn)):
            q, k, v = self.attn[i](h).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            present = torch.stack([k, v])
            if layers_past is not None:
                present = torch.cat([layers_past[i], present], dim=-2)
            presents.append(present)
            k, v = present
            allowed = torch.arange(offset + n) <= torch.arange(offset, offset + n)[:, None]
            y = F.scaled_dot_product_attention(q, k, v, allowed)
            h = h + F.relu(self.mix[i](y.transpose(1, 2).flatten(2)))
        if output_present:
            return self.fc(h), presents
        return self.fc(h)


def _flagged(**flags):
    return lambda batch, past, query, generator: dict(flags)


CASES = (
    ModelCase(
        "use_cache_off_by_default",
        seeded(lambda: FlaggedModel(Config())),
        **calls(
            tokens(36), cache="past_key_values", name="input_ids", also=_flagged(use_cache=True)
        ),
        patterns=("P1", "P3", "P10"),
    ),
    ModelCase(
        "model_output_with_attentions",
        seeded(lambda: FlaggedModel(Config(use_cache=True, num_layers=3))),
        **calls(
            tokens(36),
            cache="past_key_values",
            take=lambda out: out.past_key_values,
            name="input_ids",
            also=_flagged(return_dict=True, output_attentions=True),
        ),
        patterns=("P1", "P3", "P10"),
        example_inputs={
            "input_ids": torch.tensor([[8, 2, 5, 1]]),
            "return_dict": True,
            "output_attentions": True,
        },
    ),
    ModelCase(
        "plain_object_as_output",
        seeded(PhonemeLM),
        **calls(
            tokens(28),
            cache="cache",
            take=lambda out: out.cache,
            also=_flagged(return_cache=True),
        ),
        patterns=("P1", "P10"),
        example_inputs={"phonemes": torch.tensor([[1, 2, 3, 4, 5]]), "return_cache": True},
    ),
    ModelCase(
        "output_present_and_offset_test",
        seeded(Seq2SeqStyleDecoder),
        **calls(tokens(27), cache="layers_past", also=_flagged(output_present=True)),
        patterns=("P1", "P2", "P10", "P11"),
    ),
)
