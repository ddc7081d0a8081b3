"""Programs that people have take the folder as it is, and generate what eager torch generates."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import exported, programs
from .exported import LETTERS, PROMPT, ROWS, START, Exported, continued
from .programs import needs

NEW = 12
BOTH = [pytest.param(name, marks=needs(name)) for name in ("optimum", "transformers.js")]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A decoder of one's own, which no client knows."""
    place = tmp_path_factory.mktemp("own")
    words = exported.words(place / "words")
    return exported.exported(exported.own_decoder, place / "decoder", tokenizer=words)


def own(case: Exported, prompt: torch.Tensor) -> list[list[int]]:
    rows = continued(case.model, prompt, NEW)
    assert len(set(rows[0][prompt.shape[1] :])) > 3, "the same token again and again shows little"
    return rows  # type: ignore[no-any-return]


@needs("optimum")
def test_optimum(decoder: Exported) -> None:
    asked = {"input_ids": ROWS.tolist(), "attention_mask": torch.ones_like(ROWS).tolist()}
    found = programs.optimum(decoder.folder, "ORTModelForCausalLM", NEW, **asked)
    assert found == own(decoder, ROWS)


@needs("optimum")
def test_optimum_binds_its_buffers(decoder: Exported) -> None:
    given = {"input_ids": PROMPT.tolist(), "open": {"use_io_binding": True}}
    found = programs.optimum(decoder.folder, "ORTModelForCausalLM", NEW, **given)
    assert found == own(decoder, PROMPT)


@needs("genai")
def test_genai(decoder: Exported) -> None:
    assert programs.genai(decoder.folder, NEW, input_ids=ROWS.tolist()) == own(decoder, ROWS)


@needs("transformers.js")
def test_transformers_js(decoder: Exported) -> None:
    """Text in: the tokenizer's files are in the folder, and nothing is fetched."""
    text = " ".join(f"w{n}" for n in PROMPT[0].tolist())
    found = programs.transformers_js(
        decoder.folder, "AutoModelForCausalLM", NEW, text=text, open={"model_file_name": "model"}
    )
    assert found == own(decoder, PROMPT)


@needs("browser")
def test_browser(decoder: Exported) -> None:
    found = programs.browser(
        decoder.folder, "model.onnx", NEW, input_ids=PROMPT.tolist(), letters=LETTERS
    )
    expected = own(decoder, PROMPT)[0]
    assert found == {"ids": expected, "text": "".join(LETTERS[n] for n in expected)}


# --- models of transformers, masks and positions among their inputs ---

MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported.exported(exported.llama, tmp_path_factory.mktemp("known") / "decoder")


def generated(case: Exported, **asked: Any) -> list[list[int]]:
    model: Any = case.model
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **asked}
    with torch.no_grad():
        rows = model.generate(**options).tolist()
    assert len(set(rows[0])) > 3, "the same token again and again shows little"
    return rows  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
@needs("optimum")
def test_optimum_with_padded_rows(known: Exported, beams: int) -> None:
    asked = {"input_ids": ROWS.tolist(), "attention_mask": MASK.tolist()}
    search = {"num_beams": beams, "min_new_tokens": NEW}
    found = programs.optimum(known.folder, "ORTModelForCausalLM", NEW, **asked, search=search)
    assert found == generated(known, input_ids=ROWS, attention_mask=MASK, num_beams=beams)


@pytest.mark.slow
@needs("genai")
def test_genai_with_masks_and_positions(known: Exported) -> None:
    found = programs.genai(
        known.folder, NEW, input_ids=PROMPT.tolist(), search={"min_length": NEW + 4}
    )
    assert found == generated(known, input_ids=PROMPT)


@pytest.mark.slow
@needs("transformers.js")
def test_transformers_js_with_masks_and_positions(known: Exported) -> None:
    found = programs.transformers_js(
        known.folder, "AutoModelForCausalLM", NEW, open={"model_file_name": "model"},
        input_ids=ROWS.tolist(), attention_mask=MASK.tolist(), search={"min_new_tokens": NEW},
    )  # fmt: skip
    assert found == generated(known, input_ids=ROWS, attention_mask=MASK)


@pytest.mark.slow
@needs("browser")
def test_browser_with_masks_and_positions(known: Exported) -> None:
    found = programs.browser(known.folder, "model.onnx", NEW, input_ids=PROMPT.tolist())
    no_end = {"eos_token_id": [-1], "min_new_tokens": 0}  # the page knows of no end of text
    assert found["ids"] == generated(known, input_ids=PROMPT, **no_end)[0]


# --- an encoder and one decoder graph ---


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported.exported(exported.own_translator, tmp_path_factory.mktemp("own") / "translator")


@pytest.fixture(scope="module")
def known_translator(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported.exported(exported.bart, tmp_path_factory.mktemp("known") / "translator")


@pytest.fixture(scope="module")
def listener(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported.exported(exported.whisper, tmp_path_factory.mktemp("known") / "listener")


RIGHT = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


@pytest.mark.slow
@pytest.mark.parametrize("program", BOTH)
def test_a_translator_of_ones_own(translator: Exported, program: str) -> None:
    start = torch.full((2, 1), START)
    expected = continued(translator.model, start, NEW, ROWS, RIGHT)
    asked: dict[str, Any] = {
        "input_ids": ROWS.tolist(), "attention_mask": RIGHT.tolist(),
        "search": {"decoder_start_token_id": START},
    }  # fmt: skip
    if program == "optimum":
        found = programs.optimum(translator.folder, "ORTModelForSeq2SeqLM", NEW, **asked)
    else:
        found = programs.transformers_js(translator.folder, "AutoModelForSeq2SeqLM", NEW, **asked)
    assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
@needs("optimum")
def test_optimum_with_an_encoder(known_translator: Exported, beams: int) -> None:
    asked = {"input_ids": ROWS.tolist(), "attention_mask": RIGHT.tolist()}
    search = {"num_beams": beams, "min_new_tokens": NEW}
    folder = known_translator.folder
    found = programs.optimum(folder, "ORTModelForSeq2SeqLM", NEW, **asked, search=search)
    expected = generated(known_translator, input_ids=ROWS, attention_mask=RIGHT, num_beams=beams)
    assert found == expected


@pytest.mark.slow
@needs("transformers.js")
def test_transformers_js_with_an_encoder(known_translator: Exported) -> None:
    asked = {"input_ids": ROWS.tolist(), "attention_mask": RIGHT.tolist()}
    found = programs.transformers_js(
        known_translator.folder, "AutoModelForSeq2SeqLM", NEW, **asked,
        search={"min_new_tokens": NEW},
    )  # fmt: skip
    assert found == generated(known_translator, input_ids=ROWS, attention_mask=RIGHT)


@pytest.mark.slow
@pytest.mark.parametrize("program", BOTH)
def test_a_sound(listener: Exported, program: str) -> None:
    sound = torch.randn(1, 8, 40, generator=torch.Generator().manual_seed(1))
    expected = generated(listener, input_features=sound)
    asked: dict[str, Any] = {
        "input_features": sound.tolist(), "search": {"min_new_tokens": NEW},
    }  # fmt: skip
    if program == "optimum":
        found = programs.optimum(listener.folder, "ORTModelForSpeechSeq2Seq", NEW, **asked)
    else:
        name = "AutoModelForSpeechSeq2Seq"
        found = programs.transformers_js(listener.folder, name, NEW, **asked)
    assert [row[-NEW:] for row in found] == [row[-NEW:] for row in expected]
