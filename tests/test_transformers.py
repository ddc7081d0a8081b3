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
from benchmarks.sweep.one import Caller, difference, encoder_inputs
from cachefree.containers import with_generate

transformers = pytest.importorskip("transformers")

CHUNKS = (5, 1, 3, 1)
TOLERANCE = 1e-5  # of the largest value, float32

# What each shows that those before it do not. Where one layer shows it, one is quicker.
CAUSAL = {
    "gpt2": "learned positions, one projection for queries, keys and values",
    "llama": "rotary positions, grouped heads",
    "bart": "a decoder alone, its mask as long as its tokens or longer",
}
OF_ONE_LAYER = {
    "mistral": "a window on every layer: a count in Python, past and beyond the window",
    "bloom": "positions from the mask, as a bias",
    "opt": "positions counted from the mask",
    "falcon": "one head of keys for all queries",
    "gpt_bigcode": "the same, its heads in another order",
    "phi": "rotary positions on a part of each head",
    "mpt": "a bias, and no positions among the inputs",
    "gpt_neox": "rotary positions, both halves of a block in parallel",
    "qwen3": "queries and keys normalised by head",
    "deepseek_v3": "latent attention, a mixture of experts beside a shared one",
}
SLOWER = {
    "xglm": "positions from a table of sines",
    "gemma2": "windows on every other layer, scores capped",
    "mixtral": "a mixture of experts, as one grouped product",
    "gpt_oss": "a window, a mixture of experts, and sinks of attention",
}
SLOWER_OF_ONE_LAYER = {
    "gptj": "rotary positions by neighbours, from a table",
    "codegen": "the same, one projection in shards",
    "biogpt": "learned positions counted from the mask, embeddings scaled",
    "bert": "an encoder's blocks, as a decoder",
    "gemma": "norms whose weights count from one",
    "cohere": "norms without a bias, logits scaled",
}
NAMES = [
    *CAUSAL,
    *OF_ONE_LAYER,
    *(pytest.param(name, marks=pytest.mark.slow) for name in SLOWER | SLOWER_OF_ONE_LAYER),
]
GENERATING = ("llama", pytest.param("mistral", marks=pytest.mark.slow))


@functools.cache
def rewritten_of(name: str) -> tuple[Any, cachefree.Rewritten]:
    with torch.no_grad():
        of_one_layer = OF_ONE_LAYER | SLOWER_OF_ONE_LAYER
        model = tiny_model("causal", name, layers=1 if name in of_one_layer else 2)
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


def test_a_preallocated_cache_is_refused_by_its_class() -> None:
    model, rewritten = rewritten_of("llama")
    with pytest.raises(cachefree.CacheFreeError, match="is a StaticCache where a DynamicCache"):
        with_generate(model, rewritten).generate(
            torch.tensor([[5, 6, 7]]), max_new_tokens=3, cache_implementation="static"
        )


def test_generation_without_a_cache_is_refused() -> None:
    model, rewritten = rewritten_of("llama")
    with pytest.raises(cachefree.CacheFreeError, match="asks for no cache"):
        with_generate(model, rewritten).generate(torch.tensor([[5, 6, 7]]), use_cache=False)


def test_a_layer_of_another_kind_is_refused() -> None:
    _, rewritten = rewritten_of("llama")
    ids = torch.tensor([[5, 6, 7]])
    given = {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(3)[None]}
    cache = rewritten(ids, **given).past_key_values
    windowed = transformers.cache_utils.DynamicSlidingWindowLayer(sliding_window=2)
    windowed.update(cache.layers[1].keys, cache.layers[1].values)
    cache.layers[1] = windowed
    given = {"attention_mask": torch.ones(1, 4).long(), "position_ids": torch.tensor([[3]])}
    with pytest.raises(cachefree.DomainError, match="is a DynamicSlidingWindowLayer where a Dyn"):
        rewritten(ids[:, :1], past_key_values=cache, **given)


def test_a_cache_of_another_number_of_layers_is_refused() -> None:
    _, rewritten = rewritten_of("llama")
    ids = torch.tensor([[5, 6, 7]])
    given = {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(3)[None]}
    cache = rewritten(ids, **given).past_key_values
    del cache.layers[1]
    given = {"attention_mask": torch.ones(1, 4).long(), "position_ids": torch.tensor([[3]])}
    with pytest.raises(cachefree.DomainError, match="has 1 entries where 2 are expected"):
        rewritten(ids[:, :1], past_key_values=cache, **given)


def test_a_model_without_generate() -> None:
    _, rewritten = rewritten_of("llama")
    with pytest.raises(cachefree.CacheFreeError, match=r"Linear has no generate\(\)"):
        with_generate(torch.nn.Linear(1, 1), rewritten)


# What each shows that those before it do not.
SEQ2SEQ = {"t5": "a bias of positions; one layer, so that it is quick"}
SEQ2SEQ_SLOWER = {
    "mt5": "the same, which the first layer makes for all",
    "marian": "positions from a table of sines",
    "bart": "learned positions, counted from the cache",
    "whisper": "sounds, of one length",
    "moonshine": "sounds of any length, rotary positions",
    "t5gemma": "windows, rotary positions, grouped heads",
}
SEQ2SEQ_NAMES = [
    *SEQ2SEQ,
    *(pytest.param(name, marks=pytest.mark.slow) for name in SEQ2SEQ_SLOWER),
]


def kind_of(name: str) -> str:
    return "speech" if name in ("whisper", "moonshine") else "seq2seq"


@functools.cache
def rewritten_seq2seq(name: str) -> tuple[Any, cachefree.Rewritten]:
    with torch.no_grad():
        sizes = {"num_layers": 1, "num_decoder_layers": 1} if name in SEQ2SEQ else {}
        model = tiny_model(kind_of(name), name, sizes)
    model.generation_config.decoder_start_token_id = 2
    return model, cachefree.rewrite(model)


@pytest.mark.parametrize("name", SEQ2SEQ_NAMES)
def test_an_encoder_decoder_equals_the_models_own_calls(name: str) -> None:
    model, rewritten = rewritten_seq2seq(name)
    assert rewritten.report.verdict.name.startswith("PROVED")
    source = encoder_inputs(model)
    assert source is not None
    with torch.no_grad():
        own, one = Caller(model, (), source), Caller(rewritten, (), source)
        for chunks in (CHUNKS, (1, 1), (7, 2), (12, 1)):
            assert difference(one.run(chunks), own.run(chunks)) < TOLERANCE


@pytest.mark.parametrize(
    "name",
    ["t5", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mt5", "marian", "bart"))],
)
@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}],
    ids=["greedy", "beams", "sampling"],
)
def test_an_encoder_decoder_generates_equal_tokens(name: str, how: dict[str, Any]) -> None:
    model, rewritten = rewritten_seq2seq(name)
    assert rewritten.encoder_call.argument == "encoder_outputs"
    source = encoder_inputs(model)
    assert source is not None
    tokens = []
    for candidate in (model, with_generate(model, rewritten)):
        torch.manual_seed(3)
        tokens.append(candidate.generate(**source, max_new_tokens=6, min_new_tokens=6, **how))
    assert tokens[0].shape == (2, 7)
    assert torch.equal(*tokens)


def test_decoder_masks_that_hide_nothing_and_those_that_do() -> None:
    model, rewritten = rewritten_seq2seq("t5")
    source = encoder_inputs(model)
    assert source is not None
    start, given = torch.tensor([[2, 7], [2, 9]]), with_generate(model, rewritten)
    plain = given.generate(**source, decoder_input_ids=start, max_new_tokens=3)
    shown = torch.ones_like(start)
    same = given.generate(
        **source, decoder_input_ids=start, decoder_attention_mask=shown, max_new_tokens=3
    )
    assert torch.equal(plain, same)
    with pytest.raises(cachefree.DomainError, match="'decoder_attention_mask' was given"):
        given.generate(
            **source,
            decoder_input_ids=start,
            decoder_attention_mask=shown.index_fill(1, torch.tensor([0]), 0),
            max_new_tokens=3,
        )


@pytest.mark.parametrize("layers", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_an_empty_cache_that_counts_the_encoders_layers(layers: int) -> None:
    # generate() makes one with as many layers as the configuration's encoder has
    model, rewritten = rewritten_seq2seq("t5")
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    empty = transformers.EncoderDecoderCache(
        *(transformers.DynamicCache(config=config) for _ in range(2))
    )
    given = {**(encoder_inputs(model) or {}), "decoder_input_ids": torch.tensor([[2, 7], [2, 9]])}
    result = rewritten(**given, past_key_values=empty)
    assert torch.equal(result.logits, rewritten(**given).logits)
    assert len(result.past_key_values.self_attention_cache.layers) == 1


def test_states_of_another_length_than_the_cached_ones() -> None:
    _, rewritten = rewritten_seq2seq("t5")
    ids, tokens = torch.full((2, 6), 5), torch.tensor([[2], [2]])
    given = {"attention_mask": torch.ones_like(ids), "decoder_input_ids": tokens}
    cache = rewritten(input_ids=ids, **given).past_key_values
    given["attention_mask"] = given["attention_mask"][:, :4]
    with pytest.raises(cachefree.DomainError, match="past_encoder = 6"):
        rewritten(input_ids=ids[:, :4], past_key_values=cache, **given)
    with pytest.raises(cachefree.DomainError, match="'attention_mask' is missing"):
        rewritten(input_ids=ids, decoder_input_ids=tokens)


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
