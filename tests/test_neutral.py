"""What a cache of fixed size starts from: found, put in everywhere, followed when it changes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import cachefree

from .assertions import equal_calls, same, tensors
from .models import CASES, ModelCase

NAMED = {case.name: case for case in CASES}
STARTS = {
    "dilated_causal_convolutions": {"zeros"},
    "maximum_padded_with_a_low_number": {"-1.0000000150474662e+30 everywhere"},
    "gru_that_makes_its_zeros": {"zeros"},
    "learned_first_state": {"computed from h0", "c0, expanded over the batch"},
    "state_from_a_buffer": {"mean, expanded over the batch"},
    "state_beside_keys_and_values": {"zeros", "zero length on axis 2"},
    "streaming_softmax": {"zeros", "-inf everywhere"},
    "memories_of_zeros": {"zeros"},
    "memories_that_are_learned": {"computed from start"},
    "states_of_three_kinds": {"zeros", "computed from bias0"},
}
GRID = ((1, (1, 1, 4, 1)), (2, (5, 1, 3)))


def rewritten_from(name: str) -> tuple[ModelCase, nn.Module, cachefree.Rewritten]:
    case = NAMED[name]
    model = case.build()
    return case, model, cachefree.rewrite(model, case.example_inputs, **case.rewrite_options)


@pytest.mark.parametrize("name", STARTS)
def test_the_first_value_is_found_and_told(name: str) -> None:
    _, _, rewritten = rewritten_from(name)
    assert {slot.neutral for slot in rewritten.interface.cache} == STARTS[name]


@pytest.mark.parametrize("name", ["learned_first_state", "running_maximum_sum_and_count"])
def test_the_neutral_cache_given_is_the_one_left_out(name: str) -> None:
    case, _, rewritten = rewritten_from(name)
    args, kwargs = case.prefill(3, 4, torch.Generator().manual_seed(1))
    left_out = rewritten(*args, **kwargs)
    same(rewritten(*args, rewritten.empty_cache(3), **kwargs), left_out)
    same(rewritten(*args, None, **kwargs), left_out)


@pytest.mark.parametrize("name", ["learned_first_state", "states_of_three_kinds"])
def test_the_first_value_follows_the_parameters(name: str) -> None:
    case, model, rewritten = rewritten_from(name)
    before = [tensor.clone() for tensor in tensors(rewritten.empty_cache(2))]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.5)
    after = tensors(rewritten.empty_cache(2))
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert equal_calls(case, model, rewritten, grid=GRID) == 7
    model.double()
    assert equal_calls(case, model, rewritten, grid=GRID) == 7
    assert {tensor.dtype for tensor in tensors(rewritten.empty_cache(2))} == {torch.float64}


def test_the_first_value_in_another_dtype() -> None:
    _, _, rewritten = rewritten_from("learned_first_state")
    halves = tensors(rewritten.empty_cache(2, dtype=torch.float16))
    assert {tensor.dtype for tensor in halves} == {torch.float16}
    assert [tensor.shape for tensor in halves] == [(2, 2, 12)] * 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
@pytest.mark.parametrize("name", ["learned_first_state", "retention_by_chunks"])
def test_copies_start_from_the_same(name: str, copied: Any) -> None:
    case, model, rewritten = rewritten_from(name)
    twin = copied(rewritten)
    same(twin.empty_cache(2), rewritten.empty_cache(2))
    assert equal_calls(case, model, twin, grid=GRID) == 7


def test_a_state_does_not_tell_a_first_call_from_a_later_one() -> None:
    """Later calls take one token; the first call any number; a given state is a later call's."""

    class OneTokenLater(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(20, 8), nn.Linear(8, 20)
            self.gru = nn.GRU(8, 8, batch_first=True)

        def forward(self, ids: torch.Tensor, state: Any = None) -> Any:
            if state is not None:
                assert ids.shape[1] == 1
            y, state = self.gru(self.embed(ids), state)
            return self.out(y), state

    model = OneTokenLater().eval()
    rewritten = cachefree.rewrite(model)
    ids = torch.arange(10).view(2, 5)
    expected, state = model(ids)
    same(rewritten(ids), (expected, state))
    same(rewritten(ids[:, :1], state), model(ids[:, :1], state))
    with pytest.raises(cachefree.DomainError, match="outside the domain"):
        rewritten(ids, state)


@pytest.mark.parametrize(
    "name",
    [
        "convolution_that_pads_itself",
        "conformer_attention_and_convolution_states",
        "learned_first_state",
        "linear_attention_sums",
    ],
)
def test_any_chunks_give_what_the_model_gives(name: str) -> None:
    case, model, rewritten = rewritten_from(name)

    @settings(
        max_examples=15,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(1, 3), st.lists(st.integers(1, 6), min_size=1, max_size=4))
    def in_chunks(batch: int, lengths: list[int]) -> None:
        grid = ((batch, tuple(lengths)),)
        assert equal_calls(case, model, rewritten, grid=grid) == len(lengths)

    in_chunks()


@pytest.mark.parametrize(
    "name",
    [
        "lstm_language_model",
        "gru_that_makes_its_zeros",
        "elman_network",
        "learned_first_state",
        "token_shift",
        "maximum_padded_with_a_low_number",
        "position_counted_in_a_tensor",
        "memories_that_are_learned",
    ],
)
def test_onnx_runtime_starts_from_the_same(name: str, tmp_path: Path) -> None:
    case, model, rewritten = rewritten_from(name)
    path = cachefree.to_onnx(rewritten, tmp_path / "one.onnx")
    session = cachefree.load_onnx(path, like=rewritten)
    assert equal_calls(case, model, lambda *a, **k: session(*a, **k), grid=GRID) == 7
    plain = cachefree.load_onnx(path)
    sizes = {**dict.fromkeys(rewritten.interface.symbols, 0), "batch": 2}
    for given_, due in zip(
        plain.empty_cache(2).values(), rewritten.neutral_slots(sizes), strict=True
    ):
        assert torch.equal(given_, due)


@pytest.mark.slow
def test_two_directions_and_no_bias_in_onnx(tmp_path: Path) -> None:
    """What one ONNX operator has to be told of a network that torch has in one call."""

    class Both(nn.Module):
        def __init__(self, kind: type[nn.Module]) -> None:
            super().__init__()
            self.inp = nn.Linear(5, 6)
            self.rnn = kind(6, 7, 2, bias=False, bidirectional=True, batch_first=True)

        def forward(self, x: torch.Tensor, state: Any = None) -> Any:
            return self.rnn(self.inp(x), state)

    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        model = Both(kind).eval()
        rewritten = cachefree.rewrite(model, (torch.randn(2, 4, 5),))
        session = cachefree.load_onnx(
            cachefree.to_onnx(rewritten, tmp_path / f"{kind.__name__}.onnx"), like=rewritten
        )
        x = torch.randn(3, 6, 5)
        y, state = model(x)
        same(session(x), (y, state))
        same(session(x[:, :2], state), model(x[:, :2], state))
