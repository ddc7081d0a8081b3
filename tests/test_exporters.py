"""The one graph in torch's own exporters, at past 0 and beyond."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

import cachefree

from .exporters import (
    END,
    PAGE,
    QUICK,
    SIZES,
    SLOW,
    START,
    NotInstalledError,
    check,
    decoder,
    number,
    with_table,
)
from .models.gpt import GPTConfig, NanoGPT
from .models.mems import GLMModel
from .small import IDS, Small, small

MODELS = {
    "small": (Small, (IDS[:2, :3],)),
    "nano_gpt": (lambda: NanoGPT(GPTConfig(n_layer=1)), (IDS[:2, :3],)),
    "glm": (
        lambda: GLMModel(layers=1, max_memory_length=4),
        (IDS[:2, :3], torch.arange(3).expand(2, 3)),
    ),
}


@pytest.fixture(
    scope="module", params=["small", "nano_gpt", pytest.param("glm", marks=pytest.mark.slow)]
)
def rewritten(request: pytest.FixtureRequest) -> cachefree.Rewritten:
    build, example = MODELS[request.param]
    return cachefree.rewrite(small(build), example)


def equal_everywhere(rewritten: cachefree.Rewritten, exported: Any) -> None:
    check(rewritten, exported)


@pytest.fixture(scope="module")
def small_graph() -> cachefree.Rewritten:
    return decoder()


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_each_exporter(small_graph: cachefree.Rewritten, name: str) -> None:
    _, export = {**QUICK, **SLOW}[name]
    try:
        exported = export(small_graph)
    except NotInstalledError as error:
        pytest.skip(str(error))
    check(small_graph, exported)


def test_the_table_is_put_into_the_page() -> None:
    page = f"what is said\n{START}old\n{END}what else is said\n"
    once = with_table(page, ["| one |"])
    assert with_table(with_table(once, ["| two |"]), ["| one |"]) == once
    assert once.startswith("what is said\n")
    assert once.endswith("what else is said\n")
    assert "| one |" in once
    assert "old" not in once


def test_the_page_says_what_was_run() -> None:
    page = PAGE.read_text()
    told = ", ".join(str(size) for size in SIZES)
    assert told in " ".join(page.split())
    table = page.partition(START)[2].partition(END)[0]
    for name, (package, _) in {**QUICK, **SLOW}.items():
        assert f"\n| {name} | {package} " in table
    assert "not run" not in table


def test_versions_are_those_of_the_wheels() -> None:
    assert number("torch") == torch.__version__.partition("+")[0]
    onnxruntime = pytest.importorskip("onnxruntime")
    assert number("onnxruntime") == onnxruntime.__version__
    assert number("no_such_package") == "–"


def test_export_saved_and_loaded(rewritten: cachefree.Rewritten) -> None:
    program = torch.export.export(
        rewritten.graph_module, **rewritten.export_args("torch", flat=True)
    )
    equal_everywhere(rewritten, program.module(check_guards=False))
    stored = io.BytesIO()
    torch.export.save(program, stored)
    stored.seek(0)
    equal_everywhere(rewritten, torch.export.load(stored).module(check_guards=False))


def test_export_guards_nothing_that_the_domain_holds(
    rewritten: cachefree.Rewritten, request: pytest.FixtureRequest
) -> None:
    """What `ExportedProgram.module` checks before each call lets all of the domain in."""
    if "glm" in request.node.name:
        request.applymarker(
            pytest.mark.xfail(
                strict=True, reason="torch.export guards the strides of a slice at its own sizes"
            )
        )
    program = torch.export.export(
        rewritten.graph_module, **rewritten.export_args("torch", flat=True)
    )
    equal_everywhere(rewritten, program.module())


def test_exported_program_has_no_branch_and_no_size_of_the_example(
    rewritten: cachefree.Rewritten,
) -> None:
    program = torch.export.export(
        rewritten.graph_module, **rewritten.export_args("torch", flat=True)
    )
    for node in program.graph.nodes:
        assert not isinstance(node.target, torch._ops.HigherOrderOperator)
    symbolic = [
        size
        for node in program.graph.nodes
        if node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor)
        for size in node.meta["val"].shape
        if isinstance(size, torch.SymInt)
    ]
    expected = sum(
        not isinstance(size, int) for spec in rewritten.interface.inputs for size in spec.shape
    )
    assert len(symbolic) == expected


def test_trace(rewritten: cachefree.Rewritten) -> None:
    traced = torch.jit.trace(rewritten.graph_module, **rewritten.export_args("trace", flat=True))
    equal_everywhere(rewritten, traced)
    stored = io.BytesIO()
    torch.jit.save(traced, stored)
    stored.seek(0)
    equal_everywhere(rewritten, torch.jit.load(stored))


def test_compile(rewritten: cachefree.Rewritten) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(rewritten.graph_module, backend="eager", dynamic=True, fullgraph=True)
    equal_everywhere(rewritten, compiled)


@pytest.mark.slow
def test_compile_of_the_rewritten_module_itself() -> None:
    model = small()
    rewritten = cachefree.rewrite(model, (IDS[:2, :3],))
    torch._dynamo.reset()
    compiled = torch.compile(rewritten, backend="eager", dynamic=True)
    with torch.no_grad():
        logits, past = compiled(IDS[:, :3])
        torch.testing.assert_close(logits, model(IDS[:, :3])[0])
        later = compiled(IDS[:, 3:], past)
        torch.testing.assert_close(later[0], model(IDS[:, 3:], model(IDS[:, :3])[1])[0])


def test_export_of_the_rewritten_module_itself() -> None:
    model = small()
    rewritten = cachefree.rewrite(model, (IDS[:2, :3],))
    program = torch.export.export(rewritten, **rewritten.export_args("torch"))
    with torch.no_grad():
        for length in (1, 2):
            _, past = model(IDS[:, :length])
            found = program.module()(IDS[:, length:], past)
            torch.testing.assert_close(found[0], model(IDS[:, length:], past)[0])
        empty = rewritten.empty_cache(3)
        torch.testing.assert_close(program.module()(IDS, empty)[0], model(IDS)[0])


@pytest.mark.slow
def test_compile_with_inductor() -> None:
    model: nn.Module = small()
    rewritten = cachefree.rewrite(model, (IDS[:2, :3],))
    torch._dynamo.reset()
    compiled = torch.compile(rewritten.graph_module, dynamic=True)
    equal_everywhere(rewritten, compiled)


def test_unknown_exporter_is_refused(rewritten: cachefree.Rewritten) -> None:
    with pytest.raises(cachefree.CacheFreeError, match="tensorflow"):
        rewritten.export_args("tensorflow")


class Shaped(Small):
    """Returns its cache in containers of one form."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, ids: torch.Tensor, past: Any = None) -> Any:
        if past is not None:
            past = past[0]
        result, (keys, values) = super().forward(ids, past)
        if self.form == "list of tuples":
            return result, [(keys, values)]
        return result, ([keys, values],)


def test_result_that_cannot_be_traced_is_refused_and_traced_flat() -> None:
    one = cachefree.rewrite(small(lambda: Shaped("list of tuples")), (IDS[:2, :3],))
    for exporter in ("trace", "openvino"):
        with pytest.raises(cachefree.CacheFreeError) as caught:
            one.export_args(exporter)
        for text in ("cannot give back what the model returns", "graph_module", "flat=True"):
            assert text in str(caught.value)
        one.export_args(exporter, flat=True)
    traced = torch.jit.trace(one.graph_module, **one.export_args("trace", flat=True))
    flat = one.flatten_call(IDS)
    torch.testing.assert_close(traced(*flat), one.graph_module(*flat))


def test_lists_of_tensors_are_traced() -> None:
    one = cachefree.rewrite(small(lambda: Shaped("tuple of lists")), (IDS[:2, :3],))
    traced = torch.jit.trace(one, **one.export_args("trace"))
    _, past = one(IDS[:, :2])
    torch.testing.assert_close(traced(IDS[:, 2:], past), one(IDS[:, 2:], past))


class Turned(nn.Module):
    """Turns its last two axes by names that TorchScript's exporters do not know."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, past: Any = None) -> Any:
        k = self.keys(x)
        if past is not None:
            k = torch.cat([past, k], dim=1)
        turned = torch.complex(x, x).mH + torch.complex(x, -x).mT
        return (x @ k.mT, x.mH, torch.view_as_real(torch.adjoint(turned.mT.mH) + turned.mH)), k


def test_turned_matrices_are_traced_as_transposes() -> None:
    one = cachefree.rewrite(small(Turned), (torch.randn(2, 5, 3),))
    traced = torch.jit.trace(one.graph_module, **one.export_args("trace", flat=True))
    names = {node.kind() for node in traced.inlined_graph.nodes()}
    assert "aten::transpose" in names
    assert not names & {"aten::mT", "aten::mH", "aten::adjoint"}
    for length in (1, 4):
        flat = one.flatten_call(torch.randn(3, length, 3), torch.randn(3, 2, 3))
        torch.testing.assert_close(traced(*flat), one.graph_module(*flat), rtol=0, atol=0)
