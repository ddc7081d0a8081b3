"""One ONNX file for the first call and every later one, on ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import cachefree
from cachefree.errors import CacheFreeError, DomainError
from cachefree.onnx import OnnxDecoder, load_onnx, to_onnx
from cachefree.onnx.exporting import export, refuse_control_flow
from cachefree.onnx.generation import choose_tokens
from cachefree.onnx.program import exported_program
from cachefree.rewrite import rewrite
from cachefree.verification.tolerance import compare

V, H, D = 13, 2, 4


class Decoder(nn.Module):
    """One layer, tied head, a padding mask over past and new tokens, and counted positions."""

    def __init__(self, vocabulary: int = V) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, H * D)
        self.positions = nn.Embedding(32, H * D)
        self.qkv = nn.Linear(H * D, 3 * H * D)
        self.head = nn.Linear(H * D, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids, attention_mask, position_ids, past=None):
        batch, new = ids.shape
        x = self.embedding(ids) + self.positions(position_ids)
        parts = self.qkv(x).view(batch, new, 3, H, D).permute(2, 0, 3, 1, 4)
        q, k, v = parts[0], parts[1], parts[2]
        if past is not None:
            k, v = torch.cat([past[0][0], k], 2), torch.cat([past[0][1], v], 2)
        total = k.shape[2]
        seen = torch.ones(new, total, dtype=torch.bool, device=ids.device).tril(total - new)
        seen = seen[None, None] & attention_mask[:, None, None, :].bool()
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.head(y.transpose(1, 2).reshape(batch, new, H * D)), [(k, v)]


def inputs(batch: int, past: int, new: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (batch, new), generator=generator)
    mask = torch.ones(batch, past + new, dtype=torch.int64)
    mask[1:, 1:2] = 0
    return ids, mask, torch.arange(past, past + new).expand(batch, new).contiguous()


def build(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Decoder().to(dtype).eval()


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build()


@pytest.fixture(scope="module")
def rewritten(model: nn.Module) -> Any:
    return rewrite(model, inputs(2, 0, 3))


@pytest.fixture(scope="module")
def path(rewritten: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_onnx(rewritten, tmp_path_factory.mktemp("onnx") / "model.onnx")


@pytest.fixture(scope="module")
def decoder(path: Path) -> OnnxDecoder:
    return load_onnx(path)


def unproved(model: nn.Module) -> Any:
    """A rewritten model in half the time, for what does not depend on the verdict."""
    return rewrite(model, inputs(2, 0, 3), check="off")


SHAPES = [(1, 1), (2, 1), (1, 4), (3, 5)]


@pytest.mark.parametrize(("batch", "first"), SHAPES)
def test_with_like_it_is_called_as_the_model(
    model: nn.Module, rewritten: Any, path: Path, batch: int, first: int
) -> None:
    runtime = load_onnx(path, like=rewritten)
    expected = found = None
    past = 0
    for seed, new in enumerate((first, 1, 3, 1)):
        call = inputs(batch, past, new, seed)
        with torch.no_grad():
            expected = model(*call) if expected is None else model(*call, past=expected[1])
        found = runtime(*call) if found is None else runtime(*call, past=found[1])
        assert type(found) is tuple
        assert type(found[1]) is list
        torch.testing.assert_close(found, expected)
        past += new


@pytest.mark.parametrize(("batch", "first"), SHAPES)
def test_without_like_by_names_and_by_plain_containers(
    model: nn.Module, decoder: OnnxDecoder, batch: int, first: int
) -> None:
    call, later = inputs(batch, 0, first), inputs(batch, first, 2, seed=1)
    names = ("input_ids", "attention_mask", "position_ids")
    with torch.no_grad():
        expected = model(*later, past=model(*call)[1])
    found = decoder(**dict(zip(names, call, strict=True)))
    again = decoder(**dict(zip(names, later, strict=True)), **decoder.next_cache(found))
    torch.testing.assert_close(again["logits"], expected[0])
    torch.testing.assert_close(again["present.0.key"], expected[1][0][0])
    key, value = found["present.0.key"], found["present.0.value"]
    positional = decoder(*later, [(key, value)])
    keyword = decoder(*(tensor.numpy() for tensor in later), past=[[key, value]])
    assert all(torch.equal(positional[name], again[name]) for name in again)
    assert all(torch.equal(keyword[name], again[name]) for name in again)


def test_neutral_cache_given_is_the_neutral_cache_left_out(decoder: OnnxDecoder) -> None:
    call = inputs(2, 0, 3)
    empty = decoder.empty_cache(batch_size=2)
    assert {name: tuple(tensor.shape) for name, tensor in empty.items()} == {
        "past_key_values.0.key": (2, H, 0, D),
        "past_key_values.0.value": (2, H, 0, D),
    }
    names = ("input_ids", "attention_mask", "position_ids")
    given = decoder(**dict(zip(names, call, strict=True)), **empty)
    assert torch.equal(given["logits"], decoder(*call)["logits"])


def greedy(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, count: int) -> torch.Tensor:
    past, new = None, ids
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for _ in range(count):
        with torch.no_grad():
            logits, past = model(new, mask, positions, past=past)
        new = logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, new], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        positions = positions[:, -1:] + 1
    return ids


@pytest.mark.parametrize("like", [False, True])
def test_generation_is_that_of_the_model(
    model: nn.Module, rewritten: Any, path: Path, like: bool
) -> None:
    runtime = load_onnx(path, like=rewritten if like else None)
    ids = inputs(2, 0, 4)[0]
    ones = torch.ones_like(ids)
    assert torch.equal(runtime.generate(ids, 6), greedy(model, ids, ones, 6))
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    found = runtime.generate(ids, 6, attention_mask=mask)
    assert torch.equal(found, greedy(model, ids, mask, 6))


def test_generation_stops_at_the_end_token(model: nn.Module, decoder: OnnxDecoder) -> None:
    ids = inputs(1, 0, 4)[0]
    expected = greedy(model, ids, torch.ones_like(ids), 8)[0, 4:].tolist()
    end = expected[2]
    found = decoder.generate(ids, 8, eos_token_id=end)[0, 4:].tolist()
    assert found == expected[: expected.index(end) + 1]


def test_sampling_is_repeatable_and_varied(decoder: OnnxDecoder) -> None:
    ids = inputs(2, 0, 3)[0]
    state = torch.get_rng_state()
    options: dict[str, Any] = {"do_sample": True, "temperature": 2.0, "top_k": 8, "top_p": 0.95}
    one, same, other = (decoder.generate(ids, 12, seed=seed, **options) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
    likeliest = decoder.generate(ids, 6, do_sample=True, top_k=1, seed=3)
    assert torch.equal(likeliest, decoder.generate(ids, 6))


def test_top_p_and_top_k_leave_out_the_rest() -> None:
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(200, -1)
    generator = torch.Generator().manual_seed(0)
    assert set(choose_tokens(scores, 1.0, 2, None, generator).tolist()) == {0, 1}
    assert set(choose_tokens(scores, 1.0, None, 0.7, generator).tolist()) == {0, 1}
    assert set(choose_tokens(scores, 1.0, None, 0.01, generator).tolist()) == {0}
    assert set(choose_tokens(scores, 1.0, None, None, generator).tolist()) == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="temperature is 0; it must be positive"):
        choose_tokens(scores, 0, None, None, generator)


# The file.


def axes(values: Any) -> dict[str, list[Any]]:
    return {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values
    }


def test_names_and_axes_in_the_file(path: Path) -> None:
    graph = onnx.load(os.fspath(path), load_external_data=False).graph
    past = ["batch_size", H, "past_sequence_length", D]
    present = ["batch_size", H, "past_sequence_length + sequence_length", D]
    assert axes(graph.input) == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "past_sequence_length + sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        "past_key_values.0.key": past,
        "past_key_values.0.value": past,
    }
    assert axes(graph.output) == {
        "logits": ["batch_size", "sequence_length", V],
        "present.0.key": present,
        "present.0.value": present,
    }


def test_file_is_valid_without_control_flow_in_opset_23(path: Path) -> None:
    onnx.checker.check_model(os.fspath(path), full_check=True)
    model = onnx.load(os.fspath(path))
    assert {node.op_type for node in model.graph.node}.isdisjoint({"If", "Loop", "Scan"})
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == 23
    assert "Attention" in {node.op_type for node in model.graph.node}


def test_weights_stand_beside_the_file_and_tied_ones_once(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        wide = Decoder(vocabulary=4000).eval()
    target = to_onnx(unproved(wide), tmp_path / "wide.onnx")
    assert sorted(os.listdir(tmp_path)) == ["wide.onnx", "wide.onnx.data"]
    weights = sum(tensor.numel() for tensor in wide.parameters()) * 4  # tied ones are counted once
    assert (tmp_path / "wide.onnx.data").stat().st_size < 1.05 * weights + 4096
    call = inputs(1, 0, 2)
    torch.testing.assert_close(load_onnx(target)(*call)["logits"], wide(*call)[0].detach())


def test_verdict_and_domain_are_in_the_file(rewritten: Any, decoder: OnnxDecoder) -> None:
    assert decoder.verdict == rewritten.report.verdict.name
    assert str(decoder.interface.domain) == str(rewritten.interface.domain)
    assert "input_ids, attention_mask, position_ids; 2 cache tensors" in repr(decoder)


def test_own_names(rewritten: Any, tmp_path: Path) -> None:
    runtime = load_onnx(to_onnx(rewritten, tmp_path / "m.onnx", names="model"))
    assert [spec.name for spec in runtime.interface.inputs] == [
        "ids", "attention_mask", "position_ids", "past.0.0", "past.0.1",
    ]  # fmt: skip
    ids = inputs(1, 0, 3)[0]
    assert runtime.generate(ids, 3).shape == (1, 6)


@pytest.mark.parametrize("opset", [18, 20, 23])
def test_opsets(rewritten: Any, decoder: OnnxDecoder, tmp_path: Path, opset: int) -> None:
    other = load_onnx(to_onnx(rewritten, tmp_path / "m.onnx", opset=opset))
    call = inputs(2, 0, 3)
    torch.testing.assert_close(other(*call)["logits"], decoder(*call)["logits"])


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.float64, marks=pytest.mark.slow)]
)
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(dtype)
    runtime = load_onnx(to_onnx(unproved(model), tmp_path / "m.onnx"))
    call = inputs(2, 0, 3)
    with torch.no_grad():
        expected, _ = model(*call)
        exact, _ = build(torch.float64)(*call)
    found = runtime(*call)["logits"]
    assert found.dtype == dtype
    assert compare(found, expected, exact).is_same


def test_bfloat16_is_exported_and_refused_on_the_cpu(tmp_path: Path) -> None:
    target = to_onnx(unproved(build(torch.bfloat16)), tmp_path / "m.onnx")
    with pytest.raises(CacheFreeError, match="computes in bfloat16, which ONNX Runtime cannot do"):
        load_onnx(target)


# Refusals of a call.


def refused(call: Callable[[], Any], *texts: str) -> None:
    with pytest.raises(DomainError) as caught:
        call()
    for text in texts:
        assert text in str(caught.value)


def test_calls_outside_are_refused(decoder: OnnxDecoder) -> None:
    ids, mask, positions = inputs(2, 0, 3)
    past = torch.zeros(2, H, 4, D)
    refused(lambda: decoder(ids, mask), "position_ids is missing")
    refused(lambda: decoder(ids, mask, positions, xs=ids), "no input 'xs'", "input_ids, attention")
    refused(lambda: decoder(ids, mask, positions, None, ids), "5 arguments were given by position")
    refused(lambda: decoder(ids, mask, positions, ids=ids), "input_ids was given twice")
    refused(lambda: decoder("hi", mask, positions), "input_ids is a str; a tensor is expected")
    refused(
        lambda: decoder(ids.int(), mask, positions),
        "input_ids has dtype torch.int32; torch.int64 is expected",
        "do:    Pass input_ids.to(torch.int64)",
    )
    refused(
        lambda: decoder(ids[0], mask, positions), "has 1 dimensions, shape (3,); 2 are expected"
    )
    refused(
        lambda: decoder(ids, mask[:, :2], positions),
        "Axis 1 of attention_mask is 2; 3 is expected",
        "past is 0 by default; query is 3 by axis 1 of input_ids",
    )
    refused(lambda: decoder(ids, mask, positions[:1]), "Axis 0 of position_ids is 1; 2 is expected")
    refused(
        lambda: decoder(ids, mask, positions, [(past, past), (past, past)]),
        "past has 4 tensors; 2 are expected",
        "not taken: past.1.0, past.1.1",
    )
    refused(
        lambda: decoder(ids, mask, positions, **{"past_key_values.0.key": past}),
        "The cache is there for some layers only: 1 of 2",
        "past_key_values.0.value",
    )
    wrong = torch.zeros(2, H + 1, 4, D)
    refused(
        lambda: decoder(ids, torch.ones(2, 7).long(), positions, [(past, wrong)]),
        "Axis 1 of past_key_values.0.value is 3; 2 is expected",
    )


def test_domain_in_the_file_is_enforced(rewritten: Any, tmp_path: Path) -> None:
    runtime = load_onnx(to_onnx(rewritten, tmp_path / "m.onnx"))
    import sympy

    from cachefree.sizes import size_symbol
    from cachefree.spec import Condition, Domain, Region

    small = Domain((Region("first call", (Condition(sympy.Le(size_symbol("query"), 2)),)),))
    object.__setattr__(runtime.interface, "domain", small)
    assert runtime(*inputs(1, 0, 2))["logits"].shape == (1, 2, V)
    refused(lambda: runtime(*inputs(1, 0, 3)), "query = 3", "is outside the domain", "query <= 2")


# Refusals of a file.


def test_missing_files(path: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheFreeError, match=r"There is no file .*nowhere.onnx"):
        load_onnx(tmp_path / "nowhere.onnx")
    alone = tmp_path / "model.onnx"
    alone.write_bytes(path.read_bytes())
    with pytest.raises(
        CacheFreeError, match=r"weights of .* are missing: there is no file .*\.data"
    ):
        load_onnx(alone)
    data = path.with_name("model.onnx.data").read_bytes()
    (tmp_path / "model.onnx.data").write_bytes(data[: len(data) // 2])
    with pytest.raises(CacheFreeError, match="are cut off"):
        load_onnx(alone)


def test_files_of_others(tmp_path: Path) -> None:
    junk = tmp_path / "junk.onnx"
    junk.write_bytes(b"\x00not a model")
    with pytest.raises(CacheFreeError, match="is no ONNX file"):
        load_onnx(junk)
    other = tmp_path / "other.onnx"
    torch.onnx.export(nn.Linear(2, 2), (torch.zeros(1, 2),), other, dynamo=True, verbose=False)
    with pytest.raises(CacheFreeError, match=r"was not written by cachefree.to_onnx"):
        load_onnx(other)


def test_data_elsewhere_is_not_read(path: Path, tmp_path: Path) -> None:
    model = onnx.load(os.fspath(path), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../secret"
    (tmp_path / "m").mkdir()
    onnx.save(model, tmp_path / "m" / "model.onnx")
    with pytest.raises(CacheFreeError, match="names a data file in another directory"):
        load_onnx(tmp_path / "m" / "model.onnx")


def test_provider_that_is_not_there(path: Path) -> None:
    with pytest.raises(CacheFreeError, match="This ONNX Runtime has no MoonExecutionProvider"):
        load_onnx(path, providers=["MoonExecutionProvider"])
    with pytest.raises(CacheFreeError, match="No execution provider was named"):
        load_onnx(path, providers=[])


def test_like_must_be_the_model_of_the_file(path: Path) -> None:
    other = unproved(build(torch.float64))
    with pytest.raises(CacheFreeError, match="was not exported from this rewritten module"):
        load_onnx(path, like=other)


def test_generation_needs_tokens_and_scores(rewritten: Any, path: Path) -> None:
    runtime = load_onnx(path)
    object.__setattr__(runtime._description, "logits", None)
    with pytest.raises(DomainError, match="This graph cannot generate tokens"):
        runtime.generate(torch.zeros(1, 2, dtype=torch.int64), 2)


# Refusals of an export.


def test_unwritable_paths(rewritten: Any, tmp_path: Path) -> None:
    with pytest.raises(
        CacheFreeError, match=r"m.onnx cannot be written(.|\n)*directory that exists"
    ):
        to_onnx(rewritten, tmp_path / "nowhere" / "m.onnx")
    (tmp_path / "taken.onnx").mkdir()
    with pytest.raises(CacheFreeError, match=r"taken.onnx cannot be written"):
        to_onnx(rewritten, tmp_path / "taken.onnx")
    assert os.listdir(tmp_path) == ["taken.onnx"]


def test_failed_export_leaves_the_old_files(
    rewritten: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "m.onnx"
    target.write_bytes(b"old model")
    (tmp_path / "m.onnx.data").write_bytes(b"old weights")

    def replace(source: Any, destination: Any, _replace: Any = os.replace) -> None:
        if Path(destination) == target and Path(source).name == target.name:
            raise OSError(28, "No space left on device")
        _replace(source, destination)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(CacheFreeError, match="No space left on device"):
        to_onnx(rewritten, target)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.data"]
    assert target.read_bytes() == b"old model"
    assert (tmp_path / "m.onnx.data").read_bytes() == b"old weights"
    to_onnx(rewritten, target)
    assert load_onnx(target)(*inputs(1, 0, 1))["logits"].shape == (1, 1, V)


def test_meta_weights_are_refused(tmp_path: Path) -> None:
    model = build().to("meta")
    example = tuple(tensor.to("meta") for tensor in inputs(2, 0, 3))
    with pytest.raises(cachefree.CaptureError, match="weights are on the meta device"):
        to_onnx(rewrite(model, example), tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == []


def test_progress_says_each_step(rewritten: Any, tmp_path: Path) -> None:
    said: list[str] = []
    to_onnx(rewritten, tmp_path / "m.onnx", progress=said.append)
    assert said == ["writing the graph", "exporting to ONNX", "saving the weights"]


# The program between the graph and ONNX.


def test_program_decides_no_size(rewritten: Any) -> None:
    program = exported_program(rewritten.graph_module, rewritten.interface)
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    shapes = [tuple(map(str, value.shape)) for value in values[-5:]]
    assert shapes == [
        ("batch", "query"),
        ("batch", "past + query"),
        ("batch", "query"),
        ("batch", "2", "past", "4"),
        ("batch", "2", "past", "4"),
    ]


class Stacked(nn.Module):
    """Operators that torch.onnx writes with control flow where nobody helps it."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(V, D, mode="sum")

    def forward(self, ids, past=None):
        x = self.bag(ids.reshape(-1, 2)).view(ids.shape[0], ids.shape[1], D)
        if past is not None:
            x = torch.hstack((past, x))
        return x.cumsum(1), x


def test_control_flow_of_the_exporter_is_avoided(tmp_path: Path) -> None:
    model, ids = Stacked().eval(), torch.randint(V, (2, 3, 2))
    target = to_onnx(rewrite(model, (ids,), check="off"), tmp_path / "m.onnx")
    runtime = load_onnx(target)
    torch.testing.assert_close(runtime(ids)["output.0"], model(ids)[0].detach())


def test_control_flow_is_refused_by_operator_and_line() -> None:
    program = torch.export.export(Stacked(), (torch.zeros(2, 3, 2, dtype=torch.int64),))
    with pytest.raises(CacheFreeError, match=r"writes aten.embedding_bag\S+ \(.*\) with (If|Loop)"):
        refuse_control_flow(export(program, 23), has_scans=False)
