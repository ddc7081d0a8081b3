"""What a model is given besides what it offers: its decoder's tokens, masks, sounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import cachefree
from cachefree.candidates import candidates
from cachefree.dimensions import find_dimensions
from cachefree.graph import emit
from cachefree.inputs import call_of, find_first_call
from cachefree.offered import resized_as_told
from cachefree.signatures import signature_of
from cachefree.sizes import size_symbol
from cachefree.terms import Table

aten = torch.ops.aten


class Translator(nn.Module):
    """Offers its encoder's tokens alone, and makes the decoder's from them."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 4)

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[3, 1, 4], [1, 5, 9]])}

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        decoder_input_ids: Any = None,
        decoder_attention_mask: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
    ) -> Any:
        if decoder_input_ids is None:
            raise ValueError("no tokens for the decoder")
        rows = self.emb(input_ids) * attention_mask[..., None]
        x = self.emb(decoder_input_ids) + rows.sum(1, keepdim=True)
        k = x if past_key_values is None else torch.cat([past_key_values[0], x], 1)
        return k.cumsum(1)[:, -x.shape[1] :], (k,)


class MasksOffered(Translator):
    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[3, 1, 4], [1, 5, 9]])
        return {"input_ids": ids, "decoder_input_ids": ids, "decoder_attention_mask": ids}


@pytest.mark.parametrize("build", [Translator, MasksOffered])
def test_the_decoders_tokens_and_the_encoders_mask_are_given(build: type[nn.Module]) -> None:
    first = find_first_call(build())
    assert set(first.kwargs) == {"input_ids", "attention_mask", "decoder_input_ids"}
    assert first.kwargs["attention_mask"].dtype is torch.int64


def test_a_decoders_tokens_are_as_many_as_the_encoders_by_chance() -> None:
    model = MasksOffered()
    call = call_of(model, (), find_first_call(model).kwargs, {})
    paths = [leaf.path for leaf in call.leaves]
    _, groups = find_dimensions(model, call)
    rows = [{paths[place] for place, _ in group} for group in groups if group[0][1] == 1]
    assert {"decoder_input_ids"} in rows
    assert {"input_ids", "attention_mask"} in rows


class DecoderAlone(nn.Module):
    """A part of a translator: what its class offers is the whole's, and `**kwargs` swallows it."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 4)

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[3, 1, 4], [1, 5, 9]])
        return {"input_ids": ids, "decoder_input_ids": ids}

    def forward(self, input_ids: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        x = self.emb(input_ids)
        k = x if past_key_values is None else torch.cat([past_key_values[0], x], 1)
        return k.cumsum(1)[:, -x.shape[1] :], (k,)


def test_what_is_offered_under_names_that_forward_lacks_is_left_out() -> None:
    assert set(find_first_call(DecoderAlone()).kwargs) == {"input_ids"}


class UnmaskedStep(nn.Module):
    """Multiplies by its mask, but for one token alone."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 4)

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[3, 1, 4], [1, 5, 9]])}

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, past_key_values: Any = None
    ) -> Any:
        x = self.emb(input_ids)
        if attention_mask is not None and x.shape[1] != 1:
            x = x * attention_mask[:, -x.shape[1] :, None]
        k = x if past_key_values is None else torch.cat([past_key_values[0], x], 1)
        return k.cumsum(1)[:, -x.shape[1] :], (k,)


def test_a_mask_that_one_token_ignores_is_left_out() -> None:
    model = UnmaskedStep().eval()
    rewritten = cachefree.rewrite(model)
    assert rewritten.calling.parameters == ("input_ids", "past_key_values")
    assert any("attention_mask left out" in note for note in rewritten.report.notes)
    ids = torch.tensor([[3, 1, 4, 1]])
    _, past = rewritten(ids)
    assert torch.equal(
        rewritten(ids[:, :1], past_key_values=past)[0], model(ids[:, :1], None, past)[0]
    )
    with pytest.raises(cachefree.DomainError, match="'attention_mask' was given"):
        rewritten(ids, attention_mask=torch.tensor([[0, 1, 1, 1]]))


def test_a_flag_carries_no_cache() -> None:
    model = Translator()
    result = (torch.zeros(2, 3, 4), (torch.zeros(2, 3, 4),))
    offered = candidates(signature_of(model), (), {}, result, ())
    places = {link.place.parameter for _, links in offered for link in links}
    assert "past_key_values" in places
    assert "use_cache" not in places


class Listener(nn.Module):
    """Takes sounds of one length only, and says so."""

    main_input_name = "input_features"

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Conv1d(6, 4, 3, stride=2, padding=1)
        self.emb = nn.Embedding(20, 4)

    def forward(
        self, input_features: Any = None, decoder_input_ids: Any = None, past: Any = None
    ) -> Any:
        if input_features.shape[-1] != 50:
            raise ValueError(
                f"input features have to be of length 50, found {input_features.shape[-1]}"
            )
        x = self.emb(decoder_input_ids) + self.front(input_features).mean(-1)[:, None]
        k = x if past is None else torch.cat([past, x], 1)
        return k.cumsum(1)[:, -x.shape[1] :], k


def test_sounds_of_the_length_that_the_error_tells() -> None:
    first = find_first_call(Listener())
    assert tuple(first.kwargs["input_features"].shape)[1:] == (6, 50)
    assert first.kwargs["decoder_input_ids"].dtype is torch.int64


def test_only_a_size_that_is_told_is_changed() -> None:
    given = {"features": torch.empty(3, 6, 64), "ids": torch.empty(3, 5)}
    told = list(resized_as_told(given, "expected 128, found 64"))
    assert [tuple(inputs["features"].shape) for inputs in told] == [(3, 6, 128)]
    assert not list(resized_as_told(given, "expected 128, found 7"))


def test_a_size_that_only_an_expression_tells_is_read_where_it_stands() -> None:
    table, source = Table(), size_symbol("source")
    rows = (source - 1) // 4 + 1
    cpu = torch.device("cpu")
    states = table.input("states", (2, rows, 3), torch.float32, cpu)
    past = table.input("past", (2, size_symbol("past"), 3), torch.float32, cpu)
    left = table.like(
        states,
        aten.slice.Tensor,
        (states, 1, size_symbol("past"), rows, 1),
        (2, rows - size_symbol("past"), 3),
    )
    ones = table.like(left, aten.new_ones.default, (left, (rows - size_symbol("past"), 3)), ())
    ones = table.make(
        ones.op, ones.args, (rows - size_symbol("past"), 3), torch.float32, cpu, None, None
    )
    graph = emit(nn.Module(), [("states", states), ("past", past)], [("ones", ones)])
    (found,) = graph(torch.zeros(2, 5, 3), torch.zeros(2, 2, 3))
    assert found.shape == (3, 3)


class SpectrogramListener(nn.Module):
    """Adds the channel of its spectrogram itself."""

    main_input_name = "input_features"

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Conv2d(1, 2, 3, stride=2, padding=1)
        self.rows = nn.Linear(2 * 20, 4)
        self.emb = nn.Embedding(20, 4)

    def forward(
        self, input_features: Any = None, decoder_input_ids: Any = None, past: Any = None
    ) -> Any:
        seen = self.front(input_features.unsqueeze(1)).transpose(1, 2).flatten(2)
        x = self.emb(decoder_input_ids) + self.rows(seen).mean(1, keepdim=True)
        k = x if past is None else torch.cat([past, x], 1)
        return k.cumsum(1)[:, -x.shape[1] :], k


def test_a_spectrogram_has_as_many_features_as_the_layers_take() -> None:
    first = find_first_call(SpectrogramListener())
    assert tuple(first.kwargs["input_features"].shape) == (3, 64, 40)
    assert first.kwargs["decoder_input_ids"].dtype is torch.int64
