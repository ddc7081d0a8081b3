"""What goes wrong with files: each is an error that says what to do, and no old file is lost."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest
import torch

import cachefree
from cachefree.errors import CacheFreeError, DomainError
from cachefree.onnx import load_onnx, to_onnx

from .assertions import says_what_to_do
from .test_onnx import V, build, inputs, unproved

D, H = 4, 2


@pytest.fixture(scope="module")
def rewritten() -> cachefree.Rewritten:
    return unproved(build())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def written(rewritten: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    return to_onnx(rewritten, folder, kv="shared", folder=True)


@pytest.fixture
def path(written: Path, tmp_path: Path) -> Path:
    """A copy to be spoiled."""
    shutil.copytree(written.parent, tmp_path / "copy")
    return tmp_path / "copy" / "model.onnx"


def refused(call: Callable[[], Any], *texts: str) -> None:
    with pytest.raises(CacheFreeError) as caught:
        call()
    says_what_to_do(caught.value)
    for text in texts:
        assert text in str(caught.value)


def edit(path: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())


def set_metadata(key: str, value: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        next(entry for entry in model.metadata_props if entry.key == key).value = value

    return change


def test_graph_cut_short(path: Path) -> None:
    whole = path.read_bytes()
    for length in (0, 1, len(whole) // 3, len(whole) - 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CacheFreeError, match=r"model.onnx"):
            load_onnx(path)


def test_another_version(path: Path) -> None:
    edit(path, set_metadata("cachefree.format", "99"))
    refused(lambda: load_onnx(path), "has format '99'", "export the model again")


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("cachefree.kv", '{"buffers": [{"slot": 7, "roles": ["b"], "heads": 1}]}'),
        ("cachefree.kv", "{"),
        ("cachefree.domain", '{"regions": [{"name": "x"}], "fixed": []}'),
        ("cachefree.interface", "__import__('os').system('true')"),
    ],
)
def test_description_edited(path: Path, key: str, text: str) -> None:
    edit(path, set_metadata(key, text))
    refused(lambda: load_onnx(path), "The description in", "cannot be read")


def test_inputs_edited(path: Path) -> None:
    def rename(model: onnx.ModelProto) -> None:
        model.graph.output[0].name = model.graph.node[-1].output[0] = "scores"
        for node in model.graph.node:
            node.output[:] = ["scores" if name == "logits" else name for name in node.output]

    edit(path, rename)
    with pytest.raises(CacheFreeError, match=r"was edited|cannot open"):
        load_onnx(path)


def test_weights_missing_cut_or_elsewhere(path: Path) -> None:
    def weights(key: str, value: str) -> Callable[[onnx.ModelProto], None]:
        def change(model: onnx.ModelProto) -> None:
            for tensor in model.graph.initializer:
                for entry in tensor.external_data:
                    if entry.key == key:
                        entry.value = value

        return change

    whole = path.read_bytes()
    edit(path, weights("offset", "-4096"))
    refused(lambda: load_onnx(path), "does not say where its weights are", "'-4096'")
    path.write_bytes(whole)
    for place in ("../model.onnx_data", "/etc/hostname"):
        edit(path, weights("location", place))
        refused(lambda: load_onnx(path), "names a data file in another directory")
    path.write_bytes(whole)
    path.with_name("model.onnx_data").rename(path.with_name("moved"))
    with pytest.raises(CacheFreeError, match="there is no file"):
        load_onnx(path)


def old_files(folder: Path) -> Path:
    target = folder / "m.onnx"
    target.write_bytes(b"old model")
    (folder / "m.onnx.data").write_bytes(b"old weights")
    return target


def is_as_it_was(folder: Path) -> bool:
    return sorted(os.listdir(folder)) == ["m.onnx", "m.onnx.data"] and (
        (folder / "m.onnx").read_bytes(), (folder / "m.onnx.data").read_bytes()
    ) == (b"old model", b"old weights")  # fmt: skip


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_full_disk_or_interrupt_leaves_the_old_files(
    rewritten: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    target = old_files(tmp_path)

    def save(model: Any, path: Path, **options: Any) -> None:
        path.write_bytes(b"half of it")
        path.with_name(options["external_data"]).write_bytes(b"half")
        raise error

    monkeypatch.setattr(onnx_ir, "save", save)
    if isinstance(error, OSError):
        refused(lambda: to_onnx(rewritten, target), "cannot be written", "No space left on device")
    else:
        with pytest.raises(KeyboardInterrupt):
            to_onnx(rewritten, target)
    assert is_as_it_was(tmp_path)


def test_interrupt_between_the_two_moves(
    rewritten: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = old_files(tmp_path)

    def replace(source: Any, destination: Any, _replace: Any = os.replace) -> None:
        if Path(destination) == target and Path(source).name == target.name:
            raise KeyboardInterrupt
        _replace(source, destination)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        to_onnx(rewritten, target)
    monkeypatch.undo()
    assert is_as_it_was(tmp_path)


def test_directory_that_cannot_be_written(
    rewritten: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkdtemp(**options: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    refused(lambda: to_onnx(rewritten, tmp_path / "m.onnx"), "Permission denied", "you may write")


def test_provider_that_is_not_there(path: Path) -> None:
    refused(lambda: load_onnx(path, providers=["MoonExecutionProvider"]), "has no Moon")


def test_wrong_dtype_batch_and_length(path: Path) -> None:
    decoder = load_onnx(path)
    ids, mask, positions = inputs(2, 3, 1)
    key = torch.zeros(2, H, 3, D)
    good = [(key, key)]
    assert decoder(ids, mask, positions, good)["logits"].shape == (2, 1, V)
    for past, text in (
        ([(key.double(), key)], "has dtype torch.float64; torch.float32 is expected"),
        ([(key[:1], key)], "is 1; 2 is expected"),
        ([(key[:, :, :2], key)], "is expected"),
        ([(key[..., :2], key)], "is 2; 4 is expected"),
    ):
        with pytest.raises(DomainError, match=text):
            decoder(ids, mask, positions, past)


def test_two_sessions_on_one_file(path: Path) -> None:
    one, other = load_onnx(path), load_onnx(path)
    first, second = one(*inputs(2, 0, 3)), other(*inputs(2, 0, 3))
    later = inputs(2, 3, 2)
    crossed = other(*later, [(first["present.0.key"], first["present.0.value"])])
    straight = one(*later, [(first["present.0.key"], first["present.0.value"])])
    own = other(*later, [(second["present.0.key"], second["present.0.value"])])
    for name in straight:
        assert torch.equal(crossed[name], straight[name])
        assert torch.equal(own[name], straight[name])
    assert other._shared is not None
    assert other._shared.buffers.copies == 1  # of what the other session made, and no more


def test_buffers_grow_and_hold_what_was_there(path: Path) -> None:
    decoder, whole = load_onnx(path), load_onnx(path)
    cache: dict[str, torch.Tensor] = {}
    names = ("input_ids", "attention_mask", "position_ids")
    past = 0
    ids = inputs(2, 0, 30)[0]
    for new in (10, 1, 1, 6, 12):
        _, mask, positions = inputs(2, past, new)
        call = (ids[:, past : past + new], mask, positions)
        outputs = decoder(**dict(zip(names, call, strict=True)), **cache)
        cache = decoder.next_cache(outputs)
        past += new
    _, mask, positions = inputs(2, 0, 30)
    expected = whole(ids, mask, positions)
    torch.testing.assert_close(outputs["present.0.key"], expected["present.0.key"])
    torch.testing.assert_close(outputs["logits"], expected["logits"][:, -12:])


def test_kinds_and_opsets_that_do_not_go_together(rewritten: Any, tmp_path: Path) -> None:
    refused(
        lambda: to_onnx(rewritten, tmp_path / "m.onnx", kv="attention", opset=18),
        'kv="attention" needs opset 23',
    )
    with pytest.raises(CacheFreeError, match="There is no kv='ring'"):
        to_onnx(rewritten, tmp_path / "m.onnx", kv="ring")  # type: ignore[arg-type]


@pytest.mark.parametrize("opset", [0, 1000, "23", True])
def test_opsets_that_do_not_exist(rewritten: Any, tmp_path: Path, opset: Any) -> None:
    with pytest.raises(CacheFreeError, match=f"There is no opset {opset!r}") as caught:
        to_onnx(rewritten, tmp_path / "m.onnx", opset=opset)
    says_what_to_do(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_opset_without_an_operator_of_the_graph(
    rewritten: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(CacheFreeError, match="cannot be written in opset 9") as caught:
        to_onnx(rewritten, tmp_path / "m.onnx", opset=9)
    assert re.search(r"converts it said: .* for \w+\n", str(caught.value))
    says_what_to_do(caught.value)
    assert not list(tmp_path.iterdir())
    assert not [record for record in caplog.records if record.levelno >= logging.INFO]


def test_weights_cut_short(path: Path) -> None:
    weights = path.with_name("model.onnx_data")
    whole = weights.read_bytes()
    for length in (0, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:length])
        refused(lambda: load_onnx(path), "model.onnx_data")


def test_no_room_for_the_file(rewritten: Any, tmp_path: Path) -> None:
    """The system itself refuses to write on, in the middle of a file."""
    resource = pytest.importorskip("resource")
    target = old_files(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limit[1]))
    try:
        with pytest.raises(CacheFreeError) as caught:
            to_onnx(rewritten, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    says_what_to_do(caught.value)
    assert "cannot be written" in str(caught.value)
    assert is_as_it_was(tmp_path)


def test_a_past_longer_than_the_buffer(path: Path, rewritten: Any, tmp_path: Path) -> None:
    """A cache that somebody else made is taken whole, whatever room there was before."""
    shared, joined = load_onnx(path), load_onnx(to_onnx(rewritten, tmp_path / "joined.onnx"))
    shared(*inputs(2, 0, 3))  # makes a buffer
    for past in (29, 3):  # longer than it was, then shorter again
        generator = torch.Generator().manual_seed(past)
        cache = [tuple(torch.randn(2, H, past, D, generator=generator) for _ in range(2))]
        given = inputs(2, past, 2)
        found, expected = shared(*given, cache), joined(*given, cache)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name])
