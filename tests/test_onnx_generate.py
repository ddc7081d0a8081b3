"""Generation on ONNX Runtime: the tokens are those of transformers' own ``generate``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import cachefree
from cachefree.errors import DomainError
from cachefree.onnx import OnnxDecoder, load_onnx, to_onnx

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[5, 9, 2, 6, 5], [3, 1, 4, 1, 5]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
END = 7


@pytest.fixture(scope="module")
def model() -> Any:
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=64, n_embd=16, n_layer=1, n_head=2,
        bos_token_id=0, eos_token_id=END, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0.0, 0.6)
    return model


@pytest.fixture(scope="module")
def rewritten(model: Any) -> cachefree.Rewritten:
    positions = torch.arange(5).expand(2, 5)
    example = {"input_ids": IDS, "attention_mask": MASK, "position_ids": positions}
    return cachefree.rewrite(model, example, check="off")


@pytest.fixture(scope="module", params=["concat", "shared"])
def decoder(request: Any, rewritten: Any, tmp_path_factory: Any) -> OnnxDecoder:
    path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    runtime = load_onnx(to_onnx(rewritten, path, kv=request.param))
    assert runtime.kv.kind == request.param
    assert not runtime.kv.reasons
    return runtime


def theirs(model: Any, **options: Any) -> torch.Tensor:
    return model.generate(IDS, attention_mask=MASK, max_new_tokens=9, pad_token_id=0, **options)


def mine(decoder: OnnxDecoder, **options: Any) -> torch.Tensor:
    return decoder.generate(
        IDS, 9, attention_mask=MASK, eos_token_id=END, pad_token_id=0, **options
    )


def test_greedy(model: Any, decoder: OnnxDecoder) -> None:
    assert torch.equal(mine(decoder), theirs(model, do_sample=False))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_beams": 4, "length_penalty": 2.0},
        {"num_beams": 3, "early_stopping": True, "length_penalty": 0.5},
    ],
)
def test_beams(model: Any, decoder: OnnxDecoder, options: dict[str, Any]) -> None:
    assert torch.equal(mine(decoder, **options), theirs(model, do_sample=False, **options))


def test_a_prompt_in_parts_gives_the_same(decoder: OnnxDecoder) -> None:
    whole = mine(decoder)
    for chunk in (1, 2, 4, 99):
        assert torch.equal(mine(decoder, prefill_chunk=chunk), whole)
    beams = mine(decoder, num_beams=3)
    assert torch.equal(mine(decoder, num_beams=3, prefill_chunk=2), beams)


def test_sampling_by_seed(decoder: OnnxDecoder) -> None:
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "top_k": 9, "top_p": 0.9}
    one, same, other = (mine(decoder, seed=seed, **options) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


class Streamer:
    def __init__(self) -> None:
        self.put_tokens: list[torch.Tensor] = []
        self.has_ended = False

    def put(self, value: torch.Tensor) -> None:
        self.put_tokens.append(value)

    def end(self) -> None:
        self.has_ended = True


def test_streamer_and_progress(decoder: OnnxDecoder) -> None:
    streamer, said = Streamer(), []
    ids = decoder.generate(
        IDS[:1], 4, streamer=streamer, progress=lambda done, due: said.append((done, due))
    )
    assert torch.equal(streamer.put_tokens[0], IDS[:1])
    assert [int(token) for token in streamer.put_tokens[1:]] == ids[0, 5:].tolist()
    assert streamer.has_ended
    assert said == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_options_that_contradict_one_another(decoder: OnnxDecoder) -> None:
    for options, text in (
        ({"num_beams": 2, "do_sample": True}, "num_beams=2 with do_sample=True is not done"),
        ({"num_beams": 0}, "num_beams=0"),
        ({"prefill_chunk": 0}, "prefill_chunk=0 is no number of tokens"),
        ({"num_beams": 2, "streamer": Streamer()}, "A beam search has no tokens to stream"),
    ):
        with pytest.raises(DomainError, match=text):
            decoder.generate(IDS, 2, **options)  # type: ignore[arg-type]
    with pytest.raises(DomainError, match="it needs a token in each row"):
        decoder.generate(IDS[:, :0], 2)


def test_no_copy_of_the_cache_but_what_beams_need(rewritten: Any, tmp_path: Path) -> None:
    runtime = load_onnx(to_onnx(rewritten, tmp_path / "m.onnx", kv="shared"))
    assert runtime._shared is not None
    runtime.generate(IDS, 9)
    assert runtime._shared.buffers.copies == 0
    runtime.generate(IDS, 50, num_beams=2)  # beyond the first capacity
    assert runtime._shared.buffers.copies == 0


def test_a_cache_that_is_used_twice_is_copied_and_not_overwritten(decoder: OnnxDecoder) -> None:
    def call(ids: torch.Tensor, past: int, cache: Any) -> dict[str, torch.Tensor]:
        length = ids.shape[1]
        known = {spec.name: spec for spec in decoder.interface.inputs if not spec.is_cache}
        given = {
            "input_ids": ids,
            "attention_mask": torch.ones(1, past + length, dtype=torch.int64),
        }
        given["position_ids"] = torch.arange(past, past + length)[None]
        return decoder(**{name: given[name] for name in known}, **cache)  # type: ignore[no-any-return]

    first = decoder.next_cache(call(IDS[:1], 0, {}))
    before = {name: tensor.clone() for name, tensor in first.items()}
    left = call(torch.tensor([[3]]), 5, first)
    kept = {name: tensor.clone() for name, tensor in left.items()}
    right = call(torch.tensor([[8]]), 5, first)
    again = call(torch.tensor([[3]]), 5, before)
    for name, tensor in left.items():
        assert torch.equal(tensor, kept[name])
        torch.testing.assert_close(tensor, again[name])
    assert not torch.equal(left["logits"], right["logits"])
    for name, tensor in first.items():
        assert torch.equal(tensor, before[name])


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)
