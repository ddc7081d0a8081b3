"""One graph in several files, each with its own weights and its own slots of the cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import cachefree
from cachefree import CacheFreeError
from tests.models.gpt import GPTConfig, NanoGPT
from tests.models.loops import StackedCells
from tests.small import small

LAYERS = 2
IDS = torch.arange(8).reshape(2, 4)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = NanoGPT(GPTConfig(n_layer=LAYERS)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def rewritten(model: torch.nn.Module) -> Any:
    return cachefree.rewrite(model)


@pytest.fixture(scope="module")
def folder(rewritten: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    first = cachefree.to_onnx(rewritten, folder / "model.onnx", stages=2)
    assert first == folder / "model-stage1of2.onnx"
    return folder


def parts(folder: Path) -> list[onnx.ModelProto]:
    paths = sorted(folder.glob("model-stage*of*.onnx"))
    return [onnx.load(os.fspath(path), load_external_data=False) for path in paths]


@pytest.mark.parametrize("path", ["model.onnx", "model-stage2of2.onnx", ""])
def test_one_call_runs_all_stages(
    path: str, folder: Path, model: torch.nn.Module, rewritten: Any
) -> None:
    decoder = cachefree.load_onnx(folder / path, like=rewritten)
    past = own = None
    for ids in (IDS[:, :3], IDS[:, 3:], IDS[:, :1]):
        found, past = decoder(ids, past)
        expected, own = model(ids, own)
        torch.testing.assert_close(found, expected)
    assert len(decoder._session.sessions) == 2


def test_each_stage_has_its_own_weights_and_cache(folder: Path) -> None:
    stages = parts(folder)
    for path in folder.glob("*.onnx"):
        onnx.checker.check_model(os.fspath(path))
    weights = [{tensor.name for tensor in part.graph.initializer} for part in stages]
    layers = [
        {name for name in names if ".h." in name and "attn.bias" not in name} for names in weights
    ]
    assert all(layers)
    assert not layers[0] & layers[1]
    slots = [{value.name for value in p.graph.input if "past" in value.name} for p in stages]
    assert list(map(len, slots)) == [LAYERS, LAYERS]  # two tensors a layer
    presents = [{value.name for value in p.graph.output if "present" in value.name} for p in stages]
    assert [{name.replace("present", "past_key_values") for name in p} for p in presents] == slots
    sizes = [(folder / f"model-stage{n}of2.onnx.data").stat().st_size for n in (1, 2)]
    assert max(sizes) < 2 * min(sizes)


def test_missing_and_mixed_stages(folder: Path, rewritten: Any, tmp_path: Path) -> None:
    for file in folder.iterdir():
        os.link(file, tmp_path / file.name)
    with pytest.raises(CacheFreeError, match="2 stages of an earlier export"):
        cachefree.to_onnx(rewritten, tmp_path / "model.onnx", stages=3)
    (tmp_path / "model-stage2of2.onnx").unlink()
    with pytest.raises(CacheFreeError, match=r"Stages .* are missing: model-stage2of2\.onnx"):
        cachefree.load_onnx(tmp_path / "model.onnx")
    os.link(folder / "model-stage1of2.onnx", tmp_path / "model-stage2of2.onnx")
    with pytest.raises(CacheFreeError, match="is not stage 2 of 2"):
        cachefree.load_onnx(tmp_path / "model.onnx")
    (tmp_path / "model-stage1of3.onnx").write_bytes(b"")
    with pytest.raises(CacheFreeError, match="stages of several exports"):
        cachefree.load_onnx(tmp_path / "model.onnx")


def test_stages_that_cannot_be(rewritten: Any, tmp_path: Path) -> None:
    with pytest.raises(CacheFreeError, match="stages=0 is no number"):
        cachefree.to_onnx(rewritten, tmp_path / "m.onnx", stages=0)
    with pytest.raises(CacheFreeError, match="stages= and loop= cannot be given together"):
        cachefree.to_onnx(rewritten, tmp_path / "m.onnx", stages=2, loop=cachefree.Greedy())
    assert os.listdir(tmp_path) == []


@pytest.fixture(scope="module")
def stepping() -> Any:
    return cachefree.rewrite(small(StackedCells), (torch.randint(11, (2, 3)),))


@pytest.mark.parametrize("options", [{"stages": 3}, {"kv": "shared", "stages": 2}], ids=str)
def test_a_loop_takes_weights_from_outside(
    options: dict[str, Any], stepping: Any, tmp_path: Path
) -> None:
    model = small(StackedCells)
    path = cachefree.to_onnx(stepping, tmp_path / "m.onnx", **options)
    session = cachefree.load_onnx(path.with_name("m.onnx"), like=stepping)
    for ids in (torch.tensor([[3, 1, 4, 1, 5]]), torch.randint(11, (3, 4))):
        expected, states = model(ids[:, :3])
        found, own = session(ids[:, :3])
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(session(ids[:, 3:], own)[0], model(ids[:, 3:], states)[0])
