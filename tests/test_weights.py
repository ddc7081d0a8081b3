"""Models without values are rewritten, and exported with weights from where they are stored."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import safetensors.torch
import torch
from torch import nn

import cachefree
from cachefree import CacheFreeError, Weights
from cachefree.onnx import placing
from cachefree.onnx.checkpoints import stored_weights
from cachefree.onnx.storage import replace_files
from cachefree.onnx.weights import matched_weights

V, H, D = 29, 2, 16


class Decoder(nn.Module):
    """A tied head, a table of positions that is computed, and a learned first state."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, H * D, dtype=dtype)
        self.qkv = nn.Linear(H * D, 3 * H * D, dtype=dtype)
        self.start = nn.Parameter(torch.randn(1, H * D, dtype=dtype))
        self.head = nn.Linear(H * D, V, bias=False, dtype=dtype)
        self.head.weight = self.embedding.weight
        angles = torch.outer(torch.arange(32.0), 0.5 ** torch.arange(H * D))
        self.register_buffer("waves", angles.sin().to(dtype), persistent=False)

    def forward(self, ids, past=None):
        batch, new = ids.shape
        state = self.start.expand(batch, -1) if past is None else past[2]
        before = 0 if past is None else past[0].shape[2]
        x = self.embedding(ids) + self.waves[before : before + new]
        state = state + x.sum(1)
        parts = self.qkv(x + state[:, None]).view(batch, new, 3, H, D).permute(2, 0, 3, 1, 4)
        q, k, v = parts[0], parts[1], parts[2]
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        seen = torch.ones(new, k.shape[2], dtype=torch.bool).tril(before)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.head(y.transpose(1, 2).reshape(batch, new, H * D)), (k, v, state)


IDS = torch.arange(6).reshape(2, 3)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Decoder().eval()


@pytest.fixture(scope="module")
def bare() -> Any:
    """The rewritten model without values, but for its computed table."""
    with torch.device("meta"):
        model = Decoder().eval()
    model.waves = Decoder().waves
    return cachefree.rewrite(model, (IDS.to("meta"),))


def saved(model: nn.Module, path: Path, names: Callable[[str], str] = str) -> Path:
    """A safetensors file in which tied tensors stand once."""
    tensors = {names(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    tensors.pop(names("head.weight"))
    safetensors.torch.save_file(tensors, path)
    return path


def assert_equal(path: Path, model: nn.Module) -> None:
    decoder = cachefree.load_onnx(path)
    found, past = decoder(IDS), None
    for _ in range(2):
        logits, past = model(IDS, past)
        torch.testing.assert_close(found["logits"], logits.to(found["logits"].dtype))
        found = decoder(IDS, **decoder.next_cache(found))


def external(path: Path) -> dict[str, str]:
    """The name of each weight outside of an ONNX file, and the file it is in."""
    return {
        tensor.name: next(entry.value for entry in tensor.external_data if entry.key == "location")
        for tensor in onnx.load(os.fspath(path), load_external_data=False).graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }


def test_an_onnx_file_points_into_the_users_own_file(
    bare: Any, model: nn.Module, tmp_path: Path
) -> None:
    file = saved(model, tmp_path / "model.safetensors")
    path = cachefree.to_onnx(bare, tmp_path / "m.onnx", weights=file)
    places = external(path)
    assert {places["embedding.weight"], places["qkv.weight"]} == {"model.safetensors"}
    assert (tmp_path / "m.onnx.data").stat().st_size < 1.01 * model.waves.nbytes + 64
    assert_equal(path, model)


def test_a_file_in_another_folder_is_linked_and_not_copied(
    bare: Any, model: nn.Module, tmp_path: Path
) -> None:
    file = saved(model, tmp_path / "model.safetensors")
    path = cachefree.to_onnx(bare, tmp_path / "out", weights=tmp_path)
    assert (tmp_path / "out" / "model.safetensors").samefile(file)
    assert_equal(path, model)
    cachefree.to_onnx(bare, tmp_path / "out", weights=file)
    assert sorted(os.listdir(tmp_path / "out")) == [
        "model.onnx",
        "model.onnx.data",
        "model.safetensors",
    ]


def test_where_no_link_can_be_made_weights_are_copied(
    bare: Any, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: Any, destination: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    file = saved(model, tmp_path / "model.safetensors")
    path = cachefree.to_onnx(bare, tmp_path / "out", weights=file)
    assert set(external(path).values()) == {"model.onnx.data"}
    assert_equal(path, model)


def shards(model: nn.Module, folder: Path) -> Path:
    files = {"a": {}, "b": {}}
    for number, (name, tensor) in enumerate(sorted(model.state_dict().items())):
        if name != "head.weight":
            files["ab"[number % 2]][name] = tensor.contiguous()
    index = {}
    for name, tensors in files.items():
        safetensors.torch.save_file(tensors, folder / f"{name}.safetensors")
        index |= dict.fromkeys(tensors, f"{name}.safetensors")
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    return path


def checkpoint(model: nn.Module, folder: Path) -> Path:
    torch.save({"state_dict": model.state_dict(), "step": 3}, folder / "last.pt")
    return folder / "last.pt"


SOURCES: dict[str, Callable[[nn.Module, Path], Any]] = {
    "shards": shards,
    "checkpoint": checkpoint,
    "state_dict": lambda model, folder: model.state_dict(),
    "several": lambda model, folder: [
        {"embedding.weight": model.embedding.weight, "start": model.start},
        {"qkv.weight": model.qkv.weight, "qkv.bias": model.qkv.bias},
    ],
    "another_prefix": lambda model, folder: saved(
        model, folder / "base.safetensors", lambda name: f"decoder.{name}"
    ),
    "renamed": lambda model, folder: Weights(
        saved(model, folder / "old.safetensors", lambda name: name.replace("qkv", "c_attn")),
        rename=lambda name: name.replace("c_attn", "qkv"),
    ),
}


@pytest.mark.parametrize("source", SOURCES)
def test_sources(source: str, bare: Any, model: nn.Module, tmp_path: Path) -> None:
    found = matched_weights(SOURCES[source](model, tmp_path), bare)
    for name in ("embedding.weight", "qkv.weight", "qkv.bias", "start"):
        own = bare.get_parameter(name)
        assert torch.equal(found.value(name, own), model.get_parameter(name)), name


@pytest.mark.parametrize("cast", ["stream", "graph"])
def test_casts(cast: Any, bare: Any, model: nn.Module, tmp_path: Path) -> None:
    half = Decoder().eval()
    half.load_state_dict({name: t.half().float() for name, t in model.state_dict().items()})
    tensors = {name: tensor.half() for name, tensor in model.state_dict().items()}
    tensors.pop("head.weight")
    safetensors.torch.save_file(tensors, tmp_path / "half.safetensors")
    weights = tmp_path / "half.safetensors"
    with pytest.raises(CacheFreeError, match=r"qkv.weight is float32 in the model, and float16"):
        cachefree.to_onnx(bare, tmp_path / "m.onnx", weights=weights)
    path = cachefree.to_onnx(bare, tmp_path / "m.onnx", weights=Weights(weights, cast=cast))
    stored = onnx.load(os.fspath(path), load_external_data=False).graph.initializer
    kinds = {tensor.name: tensor.data_type for tensor in stored}
    wanted = ("qkv.weight", 1) if cast == "stream" else ("qkv.weight.stored", 10)
    assert kinds[wanted[0]] == wanted[1]
    assert_equal(path, half)


def test_all_that_does_not_fit_is_told_at_once(bare: Any, model: nn.Module, tmp_path: Path) -> None:
    weights = {
        "embedding.weight": torch.zeros(V, 3),
        "qkv.weight": model.qkv.weight.double(),
        "start": model.start,
        "other.weight": torch.zeros(2),
    }
    with pytest.raises(CacheFreeError) as caught:
        cachefree.to_onnx(bare, tmp_path / "m.onnx", weights=weights)
    for said in (
        "embedding.weight is (29, 32) in the model, and (29, 3) where it is stored",
        "qkv.weight is float32 in the model, and float64",
        "The weight qkv.bias, float32 of shape (96,), is not stored",
        "The model has no other.weight",
    ):
        assert said in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_buffer_without_values_is_asked_for(model: nn.Module, tmp_path: Path) -> None:
    with torch.device("meta"):
        bare = cachefree.rewrite(Decoder().eval(), (IDS.to("meta"),))
    file = saved(model, tmp_path / "model.safetensors")
    with pytest.raises(CacheFreeError, match=r"buffer waves, .* has no values(.|\n)*weights=\["):
        cachefree.to_onnx(bare, tmp_path / "m.onnx", weights=file)
    weights = [file, {"waves": model.waves}]
    assert_equal(cachefree.to_onnx(bare, tmp_path / "m.onnx", weights=weights), model)


def test_more_weights_than_the_model_has(bare: Any, model: nn.Module, tmp_path: Path) -> None:
    more = {**model.state_dict(), "optimizer.step": torch.zeros(1)}
    with pytest.raises(CacheFreeError, match=r"The model has no optimizer\.step"):
        cachefree.to_onnx(bare, tmp_path / "m.onnx", weights=more)
    found = matched_weights(Weights(more, strict=False), bare)
    assert "optimizer.step" not in found.stored
    assert found.stored["qkv.bias"].shape == (3 * H * D,)


def test_faulty_files_are_told(model: nn.Module, tmp_path: Path) -> None:
    file = saved(model, tmp_path / "model.safetensors")
    whole = file.read_bytes()
    for name, content, said in (
        ("short.safetensors", whole[:-4], "is cut off"),
        ("header.safetensors", whole[:20], "cut off"),
        ("text.pt", b"hello", "no checkpoint that torch reads"),
        ("x.index.json", b"{}", "no index of shards"),
    ):
        (tmp_path / name).write_bytes(content)
        assert_told(tmp_path / name, said)
    index = shards(model, tmp_path)
    (tmp_path / "b.safetensors").unlink()
    assert_told(index, "The shard b.safetensors is missing")
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes())
    assert_told(index, "does not hold")
    assert_told(tmp_path / "none.safetensors", "There is no file")
    assert_told([{"a": torch.zeros(1)}, {"a": torch.zeros(1)}], "Two sources")
    assert_told({"a": 3}, "is a int, not a tensor")


def assert_told(source: Any, said: str) -> None:
    with pytest.raises(CacheFreeError, match=said):
        stored_weights(source)


def test_an_interrupted_export_goes_on_where_it_was(
    bare: Any, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = checkpoint(model, tmp_path)
    target = tmp_path / "out" / "m.onnx"
    target.parent.mkdir()
    target.write_bytes(b"old")
    written: list[str] = []
    write_one = placing._write_one

    def stop_at_second(one: Any, opened: Any) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(one.value.name)
        write_one(one, opened)

    monkeypatch.setattr(placing, "_write_one", stop_at_second)
    for is_resumed, left in (
        (False, []),
        (True, ["m.onnx.data.partial", "m.onnx.data.partial.json"]),
    ):
        written.clear()
        with pytest.raises(KeyboardInterrupt):
            cachefree.to_onnx(bare, target, weights=file, resume=is_resumed)
        assert sorted(os.listdir(target.parent)) == ["m.onnx", *left]
        assert target.read_bytes() == b"old"
    first = written[0]

    def note(one: Any, opened: Any) -> None:
        written.append(one.value.name)
        write_one(one, opened)

    written.clear()
    monkeypatch.setattr(placing, "_write_one", note)
    cachefree.to_onnx(bare, target, weights=file, resume=True)
    assert first not in written
    assert sorted(os.listdir(target.parent)) == ["m.onnx", "m.onnx.data"]
    assert_equal(target, model)


def test_a_file_is_written_by_one_at_a_time(tmp_path: Path) -> None:
    target = tmp_path / "m.onnx"
    with replace_files(target) as first:
        first.write_text("first")
        with pytest.raises(CacheFreeError, match="is being written by another"):
            replace_files(target).__enter__()
    assert target.read_text() == "first"
    with replace_files(target) as second:
        second.write_text("second")
    assert target.read_text() == "second"
    assert os.listdir(tmp_path) == ["m.onnx"]
