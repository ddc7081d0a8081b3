"""Architectures of transformers, chosen for variety: one graph, equal to the model's own calls."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import pytest
import torch

import cachefree
from benchmarks.sweep.configs import tiny_model
from benchmarks.sweep.one import Caller, difference
from cachefree.containers import with_generate

transformers = pytest.importorskip("transformers")

CHUNKS = (5, 1, 3, 1)
TOLERANCE = 1e-5  # of the largest value, float32

# What each shows that those before it do not.
CAUSAL = {
    "gpt2": "learned positions, one projection for queries, keys and values",
    "llama": "rotary positions, grouped heads",
    "mistral": "a window on every layer: a count in Python, past and beyond the window",
    "bart": "a decoder alone, its mask as long as its tokens or longer",
    "bloom": "positions from the mask, as a bias",
    "opt": "positions counted from the mask",
    "falcon": "one head of keys for all queries",
    "gpt_bigcode": "the same, its heads in another order",
    "phi": "rotary positions on a part of each head",
    "mpt": "a bias, and no positions among the inputs",
    "xglm": "positions from a table of sines",
}
SLOWER = {
    "gemma2": "windows on every other layer, scores capped",
    "mixtral": "a mixture of experts, as one grouped product",
    "gpt_oss": "a window, a mixture of experts, and sinks of attention",
    "deepseek_v3": "latent attention, a mixture of experts beside a shared one",
}
NAMES = [*CAUSAL, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOWER)]
GENERATING = ("llama", "mistral")


@functools.cache
def rewritten_of(name: str) -> tuple[Any, cachefree.Rewritten]:
    with torch.no_grad():
        model = tiny_model("causal", name)
    return model, cachefree.rewrite(model)


@pytest.mark.parametrize("name", NAMES)
def test_one_graph_equals_the_models_own_calls(name: str) -> None:
    model, rewritten = rewritten_of(name)
    assert rewritten.report.verdict.name.startswith("PROVED")
    # masks and positions stay inputs
    taken = {"attention_mask", "position_ids"} & set(inspect.signature(model.forward).parameters)
    assert "attention_mask" in taken
    assert taken <= set(rewritten.calling.parameters)
    parameters = rewritten.calling.parameters
    with torch.no_grad():
        own = Caller(model, parameters)
        one = Caller(rewritten, parameters)
        for chunks in (CHUNKS, (1, 1), (7, 2), (12, 1)):
            assert difference(one.run(chunks), own.run(chunks)) < TOLERANCE


@pytest.mark.parametrize("name", GENERATING)
@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}],
    ids=["greedy", "beams", "sampling"],
)
def test_generate_gives_equal_tokens(name: str, how: dict[str, Any]) -> None:
    model, rewritten = rewritten_of(name)
    ids = torch.randint(3, 59, (2, 5), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # a shorter text, padded on the left
    tokens = []
    for candidate in (model, with_generate(model, rewritten)):
        torch.manual_seed(3)
        tokens.append(
            candidate.generate(ids, attention_mask=mask, max_new_tokens=9, min_new_tokens=9, **how)
        )
    assert tokens[0].shape == (2, 14)
    assert torch.equal(*tokens)


def test_the_model_that_generates_runs_the_one_graph() -> None:
    model, rewritten = rewritten_of("llama")
    calls = []
    hook = rewritten.register_forward_hook(lambda *_: calls.append(1))
    try:
        ids = torch.tensor([[5, 6, 7]])
        with_generate(model, rewritten).generate(ids, max_new_tokens=4, min_new_tokens=4)
    finally:
        hook.remove()
    assert len(calls) == 4
    assert "forward" not in vars(model)


@pytest.mark.parametrize("name", GENERATING)
def test_an_empty_cache_object_is_the_neutral_cache(name: str) -> None:
    model, rewritten = rewritten_of(name)
    ids = torch.tensor([[5, 6, 7]])
    given = {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(3)[None]}
    without = rewritten(ids, **given)
    for empty in (
        transformers.DynamicCache(),
        transformers.DynamicCache(config=model.config),
        copy.deepcopy(rewritten.empty_cache()),
    ):
        assert torch.equal(rewritten(ids, past_key_values=empty, **given).logits, without.logits)
