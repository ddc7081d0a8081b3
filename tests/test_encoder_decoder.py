"""Keys and values of an encoder's states: computed on the first call, taken over on later ones."""

from __future__ import annotations

import copy
import functools
import io
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cachefree
from cachefree.structure import flatten

from .models.encoder_decoder import (
    ClassConditioned,
    FusedMemoryDecoder,
    SpeechTranslator,
    TranslationDecoder,
)
from .small import small

GENERATOR = torch.Generator().manual_seed(5)


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 50, (batch, length), generator=GENERATOR)


def states(batch: int, rows: int, width: int = 16) -> torch.Tensor:
    return torch.randn(batch, rows, width, generator=GENERATOR)


def mask(batch: int, rows: int) -> torch.Tensor:
    lengths = torch.randint(1, rows + 1, (batch, 1), generator=GENERATOR)
    return (torch.arange(rows)[None] < lengths).long()


# name → model, its inputs but for the tokens, the names of the tokens and of the cache
DECODERS: dict[str, tuple[type[nn.Module], Any, str, str]] = {
    "four tensors a layer": (
        TranslationDecoder,
        lambda b, e: {"encoder_hidden_states": states(b, e), "encoder_attention_mask": mask(b, e)},
        "input_ids",
        "past_key_values",
    ),
    "no mask": (
        TranslationDecoder,
        lambda b, e: {"encoder_hidden_states": states(b, e)},
        "input_ids",
        "past_key_values",
    ),
    "fused": (FusedMemoryDecoder, lambda b, e: {"memory": states(b, e)}, "tokens", "cache"),
    "encoder inside": (
        SpeechTranslator,
        lambda b, e: {"features": states(b, e, 5)},
        "tokens",
        "cache",
    ),
    "constant rows": (
        ClassConditioned,
        lambda b, e: {"label": torch.randint(0, 7, (b,), generator=GENERATOR)},
        "ids",
        "past",
    ),
}


class Case:
    def __init__(self, name: str) -> None:
        build, self.others, self.tokens, self.cache = DECODERS[name]
        self.model = small(build)
        self.rewritten = cachefree.rewrite(
            self.model, {**self.others(2, 6), self.tokens: ids(2, 3)}
        )

    def call(self, model: Any, others: dict[str, Any], tokens: torch.Tensor, cache: Any) -> Any:
        with torch.no_grad():
            return model(**others, **{self.tokens: tokens, self.cache: cache})


@functools.cache
def case_of(name: str) -> Case:
    return Case(name)


SLOWER = ("no mask", "constant rows")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.slow) if name in SLOWER else name for name in DECODERS
    ],
)
def case(request: pytest.FixtureRequest) -> Case:
    return case_of(request.param)


def same(one: Any, other: Any) -> None:
    mine, _ = flatten(one)
    theirs, _ = flatten(other)
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_first_and_later_calls_in_chunks(case: Case) -> None:
    for batch, rows, chunks in itertools.product((1, 3), (1, 4), ((5, 1, 3), (1, 1, 2))):
        others = case.others(batch, rows)
        mine = theirs = None
        for length in chunks:
            tokens = ids(batch, length)
            found = case.call(case.rewritten, others, tokens, mine)
            expected = case.call(case.model, others, tokens, theirs)
            same(found, expected)
            mine, theirs = found[1], expected[1]


def test_proved_at_every_size(case: Case) -> None:
    report = case.rewritten.report
    assert report.verdict.name in ("PROVED_EXACT", "PROVED_REAL")
    later = [region for region in report.domain.regions if region.name == "later calls"]
    told = [str(c) for region in later for c in region.conditions if not c.is_implied]
    assert len(told) == 1
    assert told[0].startswith("Eq(past_")
    assert any(branch.rule == "cross-attention reuse" for branch in report.branches)


def test_onnx_serves_first_and_later_calls(case: Case, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    file = cachefree.to_onnx(case.rewritten, tmp_path / "decoder")
    assert not {"If", "Loop", "Scan"} & {node.op_type for node in onnx.load(file).graph.node}
    session = cachefree.load_onnx(tmp_path / "decoder", like=case.rewritten)
    for batch, rows in ((1, 4), (2, 7)):
        others = case.others(batch, rows)
        mine = theirs = None
        for length in (4, 1, 2):
            tokens = ids(batch, length)
            found = case.call(session, others, tokens, mine)
            expected = case.call(case.model, others, tokens, theirs)
            same(found, expected)
            mine, theirs = found[1], expected[1]


def test_later_calls_project_no_row() -> None:
    case = case_of("fused")
    others = case.others(2, 6)
    _, cache = case.call(case.rewritten, others, ids(2, 3), None)
    spoiled = {"memory": torch.full_like(others["memory"], torch.nan)}
    logits, after = case.call(case.rewritten, spoiled, ids(2, 1), cache)
    assert logits.isfinite().all()
    assert torch.equal(after["memory"], cache["memory"])


class Split(nn.Module):
    """Splits the heads of what it projects with a size that is left open."""

    open_axis = 3

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.keys = nn.Embedding(11, 8), nn.Linear(8, 8)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        shape = [x.shape[0], x.shape[1], 2, 4]
        shape[self.open_axis] = -1
        return x.view(shape).transpose(1, 2)

    def forward(
        self, ids: torch.Tensor, states: torch.Tensor, past: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys = self.split(self.keys(states)) if past is None else past
        scores = self.split(self.tokens(ids)) @ keys.transpose(2, 3)
        return scores.softmax(-1) @ keys, keys


class SplitByRows(Split):
    open_axis = 1


@pytest.mark.parametrize("kind", [Split, SplitByRows])
def test_a_size_that_is_left_open_projects_no_row_either(kind: type[Split]) -> None:
    model = small(kind)
    tokens, token = ids(2, 3) % 11, ids(2, 1) % 11
    states = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    rewritten = cachefree.rewrite(model, (tokens, states), progress=False)
    first, own = rewritten(tokens, states), model(tokens, states)
    torch.testing.assert_close(first, own)
    later = rewritten(token, states, first[1])
    torch.testing.assert_close(later, model(token, states, own[1]))
    (projection,) = [n for n in rewritten.graph_module.graph.nodes if "linear" in str(n.target)]
    assert "slice" in str(projection.args[0].target)  # of the rows that are not past


@pytest.fixture(scope="module")
def inside() -> Case:
    return case_of("encoder inside")


class TestEncoderInside:
    def test_the_decoder_takes_states_in_place_of_features(self, inside: Case) -> None:
        names = [spec.path for spec in inside.rewritten.interface.inputs]
        assert "encoder_hidden_states" in names
        assert "features" not in names
        targets = {str(node.target) for node in inside.rewritten.graph_module.graph.nodes}
        assert not {name for name in targets if "conv1d" in name or "gru" in name}

    def test_the_encoder_alone(self, inside: Case) -> None:
        features = states(2, 6, 5)
        with torch.no_grad():
            (found,) = inside.rewritten.encoder(features)
            torch.testing.assert_close(found, inside.model.encode(features))

    def test_its_output_may_be_given(self, inside: Case) -> None:
        features, tokens = states(2, 6, 5), ids(2, 3)
        with torch.no_grad():
            encoded = inside.model.encode(features)
            expected = inside.model(features, tokens)
            same(inside.rewritten(tokens=tokens, enc_out=encoded), expected)
            same(inside.rewritten(tokens=tokens, encoder_hidden_states=encoded), expected)

    def test_the_encoder_runs_once(self, inside: Case) -> None:
        runs = []
        encoder = inside.rewritten.encoder
        hook = encoder.register_forward_hook(lambda *_: runs.append(1))
        try:
            features, cache = states(2, 6, 5), None
            for length in (3, 1, 1):
                _, cache = inside.rewritten(features, ids(2, length), cache)
        finally:
            hook.remove()
        assert len(runs) == 1

    def test_copied_and_pickled(self, inside: Case) -> None:
        features, tokens = states(2, 4, 5), ids(2, 3)
        expected = inside.rewritten(features, tokens)
        same(copy.deepcopy(inside.rewritten)(features, tokens), expected)
        stored = io.BytesIO()
        torch.save(inside.rewritten, stored)
        stored.seek(0)
        same(torch.load(stored, weights_only=False)(features, tokens), expected)

    def test_parameters_are_the_models_own(self, inside: Case) -> None:
        own = dict(inside.model.named_parameters())
        shared = dict(inside.rewritten.named_parameters())
        assert own.keys() == shared.keys()
        assert all(own[name] is shared[name] for name in own)


class TestVerifyWithEncoderInside:
    def test_whole_calls_agree(self, inside: Case) -> None:
        pytest.importorskip("hypothesis")
        found = cachefree.verify(inside.model, inside.rewritten, dtypes=(), max_examples=5, seed=1)
        assert found.backends == ("eager", "onnxruntime")
        assert found.generations > 5

    def test_a_different_encoder_is_found(self, inside: Case) -> None:
        pytest.importorskip("hypothesis")
        other = copy.deepcopy(inside.model)
        with torch.no_grad():
            other.encoder.bias += 1
        with pytest.raises(cachefree.EquivalenceError, match="eager"):
            cachefree.verify(other, inside.rewritten, backends=("eager",), max_examples=1, seed=1)


class TestBadInput:
    def test_states_of_another_length_than_the_cached_ones(self) -> None:
        case = case_of("fused")
        _, cache = case.call(case.rewritten, case.others(2, 6), ids(2, 3), None)
        with pytest.raises(cachefree.CacheFreeError, match="past_encoder = 6"):
            case.call(case.rewritten, case.others(2, 5), ids(2, 1), cache)

    def test_a_cross_cache_that_is_partly_filled(self) -> None:
        case = case_of("fused")
        others = case.others(2, 6)
        _, cache = case.call(case.rewritten, others, ids(2, 3), None)
        partly = {**cache, "memory": cache["memory"][:, :4]}
        with pytest.raises(cachefree.CacheFreeError, match="past_encoder = 4") as caught:
            case.call(case.rewritten, others, ids(2, 1), partly)
        assert "memory'] holds 4 rows where a later call has 6" in str(caught.value)

    def test_a_missing_encoder_mask(self) -> None:
        case = case_of("four tensors a layer")
        with pytest.raises(cachefree.CacheFreeError, match="'encoder_attention_mask' is missing"):
            case.rewritten(input_ids=ids(2, 3), encoder_hidden_states=states(2, 6))

    def test_a_cache_of_another_layer_count(self) -> None:
        case = case_of("four tensors a layer")
        others = case.others(2, 6)
        _, cache = case.call(case.rewritten, others, ids(2, 3), None)
        with pytest.raises(cachefree.CacheFreeError, match="1 entries where 2 are expected"):
            case.call(case.rewritten, others, ids(2, 1), cache[:1])
