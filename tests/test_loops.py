"""Loops over tokens in Python: taken as scans where the rounds are alike, else refused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch

import cachefree
from cachefree.facts import Facts
from cachefree.graph import emit
from cachefree.normal import Normaliser
from cachefree.terms import SCAN, Table
from cachefree.token_scan import token_scan

from .assertions import equal_calls, same, says_what_to_do
from .models import ModelCase, RefusalCase
from .models.loops import LOOPS, ONE_TOKEN_LATER
from .models.refused_loops import REFUSED_LOOPS

QUICK = {"learned_start"}
GRID = ((1, (1, 1, 4)), (3, (7, 1, 2)))


def _named(case: ModelCase) -> object:
    return pytest.param(case, id=case.name, marks=() if case.name in QUICK else pytest.mark.slow)


def _rewritten(case: ModelCase | RefusalCase) -> tuple[torch.nn.Module, cachefree.Rewritten]:
    model = case.build()
    return model, cachefree.rewrite(model, case.example_inputs)


@pytest.mark.parametrize("case", [_named(case) for case in LOOPS])
def test_a_loop_over_tokens_is_one_graph(case: ModelCase, tmp_path: Path) -> None:
    model, rewritten = _rewritten(case)
    assert rewritten.report.verdict.name == "PROVED_EXACT"
    assert rewritten.report.loops
    assert equal_calls(case, model, rewritten) > 0
    cachefree.to_onnx(rewritten, tmp_path / "loop.onnx")
    decoder = cachefree.load_onnx(tmp_path / "loop.onnx", like=rewritten)
    with torch.no_grad():
        assert equal_calls(case, model, decoder, grid=GRID) > 0


def test_what_is_written_is_one_scan(tmp_path: Path) -> None:
    import onnx

    case = next(case for case in LOOPS if case.name == "learned_start")
    model, rewritten = _rewritten(case)
    cachefree.to_onnx(rewritten, tmp_path / "loop.onnx")
    nodes = [node.op_type for node in onnx.load(tmp_path / "loop.onnx").graph.node]
    assert nodes.count("Scan") == 1
    assert not {"If", "Loop"} & set(nodes)
    (line,) = rewritten.report.loops
    assert "query tokens one by one, 1 tensor carried (Scan in ONNX)" in line
    assert "loop      query tokens one by one" in rewritten.report.text()

    ids = torch.arange(8).view(2, 4)
    expected = model(ids)
    exported = torch.export.export(rewritten, **rewritten.export_args("torch"))
    same(exported.module()(ids, rewritten.empty_cache(2)), expected)
    for twin in (copy.deepcopy(rewritten), pickle.loads(pickle.dumps(rewritten))):
        same(twin(ids), expected)


def test_gradients_are_the_models() -> None:
    case = next(case for case in LOOPS if case.name == "learned_start")
    model, rewritten = _rewritten(case)
    ids = torch.arange(8).view(2, 4)
    model(ids)[0].sum().backward()
    expected = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    rewritten(ids)[0].sum().backward()
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, expected[name])


def test_what_has_no_loops_says_so() -> None:
    case = next(case for case in LOOPS if case.name == "learned_start")
    _, rewritten = _rewritten(case)
    with pytest.raises(cachefree.CacheFreeError, match="has no certificate") as refused:
        _ = rewritten.certificate
    says_what_to_do(refused.value)
    with pytest.raises(cachefree.CacheFreeError, match="cannot record the graph's loop"):
        torch.jit.trace(rewritten.graph_module, **rewritten.export_args("trace"))


def test_a_loop_first_and_one_step_later() -> None:
    model, rewritten = _rewritten(ONE_TOKEN_LATER)
    assert rewritten.report.verdict.name == "PROVED_EXACT"
    assert "one-token" in rewritten.report.laws
    assert equal_calls(ONE_TOKEN_LATER, model, rewritten) > 0
    ids = torch.arange(6).view(2, 3)
    _, state = rewritten(ids)
    with pytest.raises(cachefree.CacheFreeError, match="outside the domain"):
        rewritten(ids, state)


QUICK_REFUSALS = {
    "asks_the_place",
    "counts",
    "asks_for_the_length",
    "another_first_token",
    "all_but_one",
    "stops",
    "without_the_tokens",
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case, id=case.name, marks=() if case.name in QUICK_REFUSALS else pytest.mark.slow
        )
        for case in REFUSED_LOOPS
    ],
)
def test_a_loop_that_is_no_scan_is_refused(case: RefusalCase) -> None:
    with pytest.raises(getattr(cachefree, case.error)) as refused:
        cachefree.rewrite(case.build(), case.example_inputs)
    for text in case.says:
        assert text in str(refused.value)
    says_what_to_do(refused.value)


def test_the_operator_is_torchs_own() -> None:
    def body(carried, row, scale):
        total = carried + row * scale
        return total, total.clone()

    first, rows, scale = torch.zeros(3), torch.randn(5, 3), torch.tensor(2.0)
    mine = token_scan(body, [first], [rows], [scale])
    theirs = torch.ops.higher_order.scan(body, [first], [rows], (scale,))
    same(tuple(mine), tuple(theirs))


def test_a_loop_without_tokens_is_exported_with_a_spare_round() -> None:
    def body(carried, row, scale):
        total = carried / row + scale  # the spare round divides by zero
        return total, total.clone()

    class Loop(torch.nn.Module):
        def forward(self, first, rows, scale):
            return token_scan(body, [first], [rows], [scale], may_be_none=True)

    example = torch.ones(3), torch.rand(5, 3) + 1, torch.tensor(2.0)
    length = torch.export.Dim("length")
    program = torch.export.export(Loop(), example, dynamic_shapes=(None, {0: length}, None))
    for tokens in (0, 1, 7):
        given = torch.ones(3), torch.rand(tokens, 3) + 1, torch.tensor(2.0)
        same(tuple(program.module()(*given)), Loop()(*given))
        assert Loop()(*given)[1].shape == (tokens, 3)


@pytest.mark.parametrize("tokens", [0, 1, 2])
@pytest.mark.parametrize("index", [0, 1])
def test_a_scan_of_one_token_is_its_body_and_of_none_its_start(tokens: int, index: int) -> None:
    table, add = Table(), torch.ops.aten.add.Tensor
    kind = (torch.float32, torch.device("cpu"))
    shapes = ((2, 3), (tokens, 2, 3))
    h, x = (table.input(name, shape, *kind) for name, shape in zip("hx", shapes, strict=True))
    carried, row = (
        table.make("bound", (name, (2, 3), kind[0]), (2, 3), *kind) for name in ("carried", "row")
    )
    after = table.make(add, (carried, row, 2), (2, 3), *kind)
    scan = table.make(
        SCAN,
        (tokens, (carried,), (h,), (row,), (x,), (after,), (after,)),
        None,
        None,
        None,
        payload=tuple((shape, *kind) for shape in shapes),
    )
    result = table.make("item", (scan, index), shapes[index], *kind)
    normaliser = Normaliser(table, Facts(()), is_exact=True)
    (normal,) = normaliser.normal([result])
    laws = {step.law.name for step in normaliser.steps}
    assert ("one-token" in laws) is (tokens == 1)
    assert ("no-token" in laws) is (tokens == 0 and index == 0)
    given = torch.randn(2, 3), torch.randn(tokens, 2, 3)
    inputs = [("h", h), ("x", x)]
    one, other = (emit(torch.nn.Module(), inputs, [("y", value)]) for value in (result, normal))
    assert torch.equal(*one(*given), *other(*given))
