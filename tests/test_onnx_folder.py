"""What stands beside a graph says what the graph takes, and no more than is known."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch

import cachefree
from cachefree.errors import CacheFreeError
from cachefree.onnx import load_onnx, to_onnx

from .assertions import says_what_to_do
from .small import Small, rewritten_small, small
from .test_encoder_decoder import case_of
from .test_onnx import V, build, inputs, unproved

D, H = 4, 2


@pytest.fixture(scope="module")
def rewritten() -> cachefree.Rewritten:
    return unproved(build())  # type: ignore[no-any-return]


def read(path: Path, name: str) -> Any:
    return json.loads(path.with_name(name).read_text())


@pytest.fixture(scope="module")
def path(rewritten: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("folder")
    (place / "tokenizer.json").write_text("{}")
    return to_onnx(rewritten, place / "folder", folder=True, tokenizer=place)


def test_files(path: Path) -> None:
    assert sorted(os.listdir(path.parent)) == [
        "README.md", "config.json", "genai_config.json", "generation_config.json", "model.onnx",
        "model.onnx_data", "tokenizer.json",
    ]  # fmt: skip
    readme = path.with_name("README.md").read_text()
    for call in ("ORTModelForCausalLM.from", "onnxruntime_genai.Model", "localModelPath"):
        assert call in readme
    assert load_onnx(path.parent)(*inputs(1, 0, 2))["logits"].shape == (1, 2, V)


def test_a_model_that_no_client_knows_has_the_sizes_of_its_cache(path: Path) -> None:
    config = read(path, "config.json")
    assert config["architectures"] == ["Decoder"]
    assert config["num_attention_heads"] == config["num_key_value_heads"] == H
    assert config["hidden_size"] == H * D
    assert config["num_hidden_layers"] == 1
    assert config["vocab_size"] == V
    assert config["eos_token_id"] is None
    stored = config["transformers.js_config"]["use_external_data_format"]
    assert stored == {"model.onnx": 1}


def test_genai_has_the_names_of_the_graph_and_no_end_that_nobody_named(path: Path) -> None:
    genai = read(path, "genai_config.json")["model"]
    assert genai["decoder"]["filename"] == "model.onnx"
    assert genai["decoder"]["num_key_value_heads"] == H
    assert genai["decoder"]["head_size"] == D
    assert not {"eos_token_id", "pad_token_id", "bos_token_id"} & genai.keys()
    has = onnx.load(path, load_external_data=False).graph
    named = genai["decoder"]["inputs"]
    assert {value.name for value in has.input} == {
        "input_ids", "attention_mask", "position_ids",
        named["past_key_names"] % 0, named["past_value_names"] % 0,
    }  # fmt: skip


def test_settings_of_the_models_own(tmp_path: Path) -> None:
    """A token whose number is 0 is one; what has no value is left out."""
    model: Any = build()
    model.config = SimpleNamespace(to_dict=lambda: {"model_type": "mine", "eos_token_id": [0, 5]})
    found = {"pad_token_id": 0, "early_stopping": None, "top_k": 3, "call": print}
    model.generation_config = SimpleNamespace(to_dict=lambda: found)
    path = to_onnx(unproved(model), tmp_path / "folder", folder=True)
    said = {"pad_token_id": 0, "top_k": 3, "eos_token_id": [0, 5]}
    assert read(path, "generation_config.json") == said
    genai = read(path, "genai_config.json")["model"]
    assert (genai["pad_token_id"], genai["eos_token_id"]) == (0, [0, 5])
    config = read(path, "config.json")
    assert config["original_model_type"] == "mine"
    assert config["model_type"] != "mine"


def test_a_cache_that_clients_do_not_know(tmp_path: Path) -> None:
    """Nothing is made up: keys and values of rank three have no heads."""
    rewritten = rewritten_small(small(), check="off")
    path = to_onnx(rewritten, tmp_path / "folder", folder=True)
    assert not path.with_name("genai_config.json").exists()
    assert read(path, "config.json")["model_type"] == Small.__name__.lower()
    assert "more than\nthey know of" in path.with_name("README.md").read_text()


def test_shared_buffers_are_ours_alone(rewritten: Any, tmp_path: Path) -> None:
    (tmp_path / "genai_config.json").write_text("of another graph")
    path = to_onnx(rewritten, tmp_path, kv="shared", folder=True)
    assert not path.with_name("genai_config.json").exists()
    assert 'kv="concat"' in path.with_name("README.md").read_text()


class Interrupting:
    """A tokenizer whose files are half written when somebody interrupts."""

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "vocab.txt").write_text("half")
        raise KeyboardInterrupt


def test_an_interrupt_leaves_a_folder_as_it_was(rewritten: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        to_onnx(rewritten, tmp_path / "new", folder=True, tokenizer=Interrupting())
    assert os.listdir(tmp_path) == []
    path = to_onnx(rewritten, tmp_path / "old", folder=True)
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        to_onnx(rewritten, tmp_path / "old", folder=True, tokenizer=Interrupting(), kv="shared")
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before


def test_no_tokenizer_there(rewritten: Any, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CacheFreeError, match="no files of a tokenizer") as caught:
        to_onnx(rewritten, tmp_path / "f", folder=True, tokenizer=empty)
    says_what_to_do(caught.value)


@pytest.mark.slow
def test_inputs_of_a_cache_stand_layer_by_layer(tmp_path: Path) -> None:
    """Optimum gives keys and values by the order of the inputs, not by their names."""
    case = case_of("four tensors a layer")
    path = to_onnx(case.rewritten, tmp_path, folder=True)
    names = [value.name for value in onnx.load(path, load_external_data=False).graph.input]
    assert [name for name in names if name.startswith("past")] == [
        f"past_key_values.{layer}.{part}.{kind}"
        for layer in range(2)
        for part in ("decoder", "encoder")
        for kind in ("key", "value")
    ]
    others, ids = case.others(1, 4), torch.tensor([[3, 1, 4]])
    found = load_onnx(path, like=case.rewritten)(**others, **{case.tokens: ids})
    expected = case.call(case.model, others, ids, None)
    torch.testing.assert_close(found[0], expected[0])
