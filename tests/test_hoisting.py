"""An encoder's keys and values beside the encoder: the one graph takes them and returns none."""

from __future__ import annotations

import copy
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cachefree

from .small import small
from .test_encoder_decoder import Case, case_of, ids, same, states


class Moved(Case):
    """A model of `case_of`, rewritten the other way."""

    joining: Case


@functools.cache
def hoisted_case(name: str) -> Moved:
    case = case_of(name)
    moved: Moved = object.__new__(Moved)
    moved.__dict__.update(case.__dict__, joining=case)
    moved.rewritten = cachefree.rewrite(
        case.model, {**case.others(2, 6), case.tokens: ids(2, 3)}, cross_attention="hoist"
    )
    return moved


QUICK = ("fused", "encoder inside", "constant rows")
SLOWER = "four tensors a layer"


@pytest.fixture(scope="module", params=[*QUICK, pytest.param(SLOWER, marks=pytest.mark.slow)])
def case(request: pytest.FixtureRequest) -> Moved:
    return hoisted_case(request.param)


def test_first_and_later_calls_in_chunks(case: Moved) -> None:
    for batch, rows, chunks in itertools.product((1, 3), (1, 4), ((5, 1, 3), (1, 1, 2))):
        others = case.others(batch, rows)
        mine = theirs = None
        for length in chunks:
            tokens = ids(batch, length)
            found = case.call(case.rewritten, others, tokens, mine)
            expected = case.call(case.model, others, tokens, theirs)
            same(found, expected)
            mine, theirs = found[1], expected[1]


def test_proved_and_told(case: Moved) -> None:
    report = case.rewritten.report
    assert report.verdict is case.joining.rewritten.report.verdict
    assert all("past_encoder" not in str(region) for region in report.domain.regions)
    assert any("beside the encoder" in note for note in report.notes)


def test_what_was_projected_is_neither_joined_nor_returned(case: Moved) -> None:
    joins = case.joining.rewritten
    interface = case.rewritten.interface
    gone = [slot for slot in joins.interface.cache if slot not in interface.cache]
    moved = {slot.past.path for slot in interface.crossing}
    assert moved
    assert len(interface.outputs) == len(joins.interface.outputs) - len(moved)
    assert {slot.past.path for slot in gone} >= moved
    assert {spec.path for spec in interface.inputs if not spec.is_cache} >= moved
    count = [
        sum("cat" in str(node.target) for node in rewritten.graph_module.graph.nodes)
        for rewritten in (joins, case.rewritten)
    ]
    assert count[1] <= count[0] - len(moved)


def test_onnx_serves_first_and_later_calls(case: Moved, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    file = cachefree.to_onnx(case.rewritten, tmp_path / "decoder")
    graph = onnx.load(file).graph
    moved = {slot.past.path for slot in case.rewritten.interface.crossing}
    slots = len(case.rewritten.interface.cache)
    assert len(graph.output) == slots + 1
    assert len(graph.input) >= slots + len(moved) + 1
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


@pytest.mark.slow
def test_names_in_the_folder(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    cachefree.to_onnx(hoisted_case(SLOWER).rewritten, tmp_path)
    decoder = onnx.load(tmp_path / "decoder_model_merged.onnx").graph
    encoder = onnx.load(tmp_path / "encoder_model.onnx").graph
    cross = [f"{layer}.encoder.{kind}" for layer in (0, 1) for kind in ("key", "value")]
    taken = [value.name for value in decoder.input]
    assert [name for name in taken if ".encoder." in name] == [
        f"past_key_values.{name}" for name in cross
    ]
    assert "encoder_hidden_states" not in taken
    assert "encoder_attention_mask" in taken
    assert not [value.name for value in decoder.output if ".encoder." in value.name]
    assert [value.name for value in encoder.input] == ["encoder_hidden_states"]
    assert [value.name for value in encoder.output] == [f"present.{name}" for name in cross]


def test_by_names_of_the_files(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    case = hoisted_case("encoder inside")
    cachefree.to_onnx(case.rewritten, tmp_path)
    decoder = cachefree.load_onnx(tmp_path)
    features, tokens = states(2, 6, 5), ids(2, 4)
    given = decoder.encoder(features=features)
    assert "last_hidden_state" in given
    places = [spec.name for spec in decoder.interface.inputs if "memory" in spec.name]
    cross = {
        place: next(value for name, value in given.items() if name.endswith(place))
        for place in places
    }
    assert cross
    first = decoder(input_ids=tokens[:, :3], **cross)
    later = decoder(input_ids=tokens[:, 3:], **cross, **decoder.next_cache(first))
    with torch.no_grad():
        expected, _ = case.model(features, tokens)
    same(torch.cat([first["logits"], later["logits"]], 1), expected)


def test_states_that_are_given_are_projected() -> None:
    case = hoisted_case("encoder inside")
    features, tokens = states(2, 6, 5), ids(2, 3)
    with torch.no_grad():
        encoded = case.model.encode(features)
        expected = case.model(features, tokens)
        found = case.rewritten(tokens=tokens, enc_out=encoded)
        same(found, expected)
        same(
            case.rewritten(tokens=tokens[:, :1], enc_out=encoded, cache=found[1]),
            case.model(features, tokens[:, :1], expected[1]),
        )


def test_verified_with_its_encoder_inside() -> None:
    pytest.importorskip("hypothesis")
    case = hoisted_case("encoder inside")
    found = cachefree.verify(case.model, case.rewritten, dtypes=(), max_examples=3, seed=1)
    assert found.generations > 3


def test_copied() -> None:
    case = hoisted_case("encoder inside")
    features, tokens = states(2, 4, 5), ids(2, 3)
    same(copy.deepcopy(case.rewritten)(features, tokens), case.rewritten(features, tokens))


class Pooled(nn.Module):
    """Projects the mean of the encoder's states: what is projected does not tell how many."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.rows, self.mean = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor, states: torch.Tensor, past: Any = None) -> Any:
        rows = self.rows(self.table(ids))
        mean = self.mean(states.mean(1, keepdim=True)) if past is None else past[1]
        if past is not None:
            rows = torch.cat([past[0], rows], 1)
        return rows.cumsum(1)[:, -ids.shape[1] :] * mean, (rows, mean)


class PooledAndCounted(Pooled):
    def forward(self, ids: torch.Tensor, states: torch.Tensor, past: Any = None) -> Any:
        return *super().forward(ids, states, past), states.shape[1]


def test_what_is_projected_need_not_tell_how_many_states_there_are() -> None:
    model = small(Pooled)
    given = torch.randint(11, (2, 3)), torch.randn(2, 4, 8)
    rewritten = cachefree.rewrite(model, given, cross_attention="hoist")
    for batch, count in ((1, 6), (3, 1)):
        tokens, seen = torch.randint(11, (batch, 5)), torch.randn(batch, count, 8)
        expected, past = model(tokens[:, :3], seen)
        found, own = rewritten(tokens[:, :3], seen)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            rewritten(tokens[:, 3:], seen, own)[0], model(tokens[:, 3:], seen, past)[0]
        )
    with pytest.raises(cachefree.UnsupportedBranchError, match="returns the number states_1"):
        cachefree.rewrite(small(PooledAndCounted), given, cross_attention="hoist")


class Led(nn.Module):
    """Later calls see one row of the states; how many there are is asked, or not."""

    def __init__(self, asks: str) -> None:
        super().__init__()
        self.asks = asks
        self.emb, self.key = nn.Embedding(11, 8), nn.Linear(8, 8)

    def forward(self, ids: Any, states: Any, past: Any = None) -> Any:
        x = self.emb(ids)
        if self.asks == "of the encoder" and states.shape[1] > 6:
            raise ValueError("too long")
        if self.asks == "of both" and states.shape[1] + ids.shape[1] > 12:
            raise ValueError("too long")
        lead = self.key(states[:, :1]) if past is None else past[1]
        rows = x if past is None else torch.cat([past[0], x], 1)
        return x + (x @ lead.transpose(1, 2)).sigmoid() @ lead, (rows, lead)


@pytest.mark.parametrize(
    "asks", ["", pytest.param("of the encoder", marks=pytest.mark.slow)], ids=["any", "few"]
)
def test_what_only_the_encoders_inputs_tell_is_asked_of_the_encoder(
    asks: str, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    model = small(lambda: Led(asks))
    given = torch.randint(11, (2, 3)), torch.randn(2, 5, 8)
    rewritten = cachefree.rewrite(model, given, cross_attention="hoist")
    assert ("states_1 <= 6" in str(rewritten.encoder_interface.domain)) == bool(asks)
    cachefree.to_onnx(rewritten, tmp_path)
    session = cachefree.load_onnx(tmp_path, like=rewritten)
    for count in (1, 4):
        tokens, seen = torch.randint(11, (2, 4)), torch.randn(2, count, 8)
        expected, past = model(tokens[:, :3], seen)
        for one in (rewritten, session):
            found, own = one(tokens[:, :3], seen)
            same(found, expected)
            same(one(tokens[:, 3:], seen, own), model(tokens[:, 3:], seen, past))
    if asks:
        beside = cachefree.load_onnx(tmp_path).encoder
        with pytest.raises(cachefree.DomainError, match="outside the domain"):
            beside(states=torch.randn(2, 7, 8))


def test_what_neither_side_tells_alone_is_refused() -> None:
    given = torch.randint(11, (2, 3)), torch.randn(2, 5, 8)
    with pytest.raises(cachefree.UnsupportedBranchError, match=r"query \+ states_1 <= 12"):
        cachefree.rewrite(small(lambda: Led("of both")), given, cross_attention="hoist")


class OwnCacheOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 4)

    def forward(self, ids: Any, past: Any = None) -> Any:
        x = self.emb(ids)
        k = x if past is None else torch.cat([past, x], 1)
        return x + k.sum(1, keepdim=True), k


def test_refused_where_there_is_nothing_to_move() -> None:
    model = small(OwnCacheOnly)
    with pytest.raises(cachefree.UnsupportedBranchError, match="no keys and values of an encoder"):
        cachefree.rewrite(model, (ids(2, 3) % 9,), cross_attention="hoist")
    with pytest.raises(cachefree.CaptureError, match="none of 'reuse', 'hoist'"):
        cachefree.rewrite(model, (ids(2, 3) % 9,), cross_attention="move")
