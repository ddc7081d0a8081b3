"""What other exporters are handed, and that they take it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from torch import nn

from cachefree.errors import CacheFreeError
from cachefree.onnx.export import export_arguments, positional
from cachefree.onnx.program import example_sizes
from cachefree.rewrite import rewrite
from cachefree.sizes import size_symbol
from cachefree.spec import Domain, InputSpec, Interface, OutputSpec, Region

from .test_onnx import build, inputs

CORNERS = [(1, 0, 1), (1, 1, 1), (2, 0, 3), (1, 5, 1), (3, 2, 4)]


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


def call(batch: int, past: int, new: int) -> tuple[Any, ...]:
    key, value = torch.randn(2, batch, 2, past, 4)
    return (*inputs(batch, past, new), [(key, value)])


def flat(arguments: tuple[Any, ...]) -> list[torch.Tensor]:
    return [*arguments[:3], *arguments[3][0]]


@pytest.mark.parametrize("is_flat", [True, False])
def test_torch_export(rewritten: Any, model: nn.Module, is_flat: bool) -> None:
    target = rewritten.graph_module if is_flat else rewritten
    program = torch.export.export(target, **export_arguments(rewritten, "torch", flat=is_flat))
    module = program.module()
    for corner in CORNERS:
        arguments = call(*corner)
        found = module(*(flat(arguments) if is_flat else arguments))
        torch.testing.assert_close(found[0], model(*arguments)[0])


@pytest.mark.parametrize(
    "exporter",
    [
        "onnx",
        "torchscript",
    ],
)
@pytest.mark.parametrize("is_flat", [True, False])
def test_onnx_export(
    rewritten: Any, model: nn.Module, tmp_path: Any, exporter: str, is_flat: bool
) -> None:
    import onnxruntime

    target = rewritten.graph_module if is_flat else rewritten
    arguments = export_arguments(rewritten, exporter, flat=is_flat)
    torch.onnx.export(target, f=tmp_path / "m.onnx", verbose=False, **arguments)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    names = [value.name for value in session.get_inputs()]
    assert names == arguments["input_names"]
    assert names[:2] == ["input_ids", "attention_mask"]
    for corner in CORNERS:
        given = call(*corner)
        feeds = {name: tensor.numpy() for name, tensor in zip(names, flat(given), strict=True)}
        found = session.run(["logits"], feeds)[0]
        torch.testing.assert_close(torch.from_numpy(found), model(*given)[0].detach())


def test_trace(rewritten: Any, model: nn.Module) -> None:
    arguments = export_arguments(rewritten, "trace", flat=True)
    traced = torch.jit.trace(rewritten.graph_module, **arguments)
    for corner in CORNERS:
        given = call(*corner)
        torch.testing.assert_close(traced(*flat(given))[0], model(*given)[0])


def test_example_sizes_freeze_nothing(rewritten: Any) -> None:
    shapes = [
        tuple(t.shape) for t in export_arguments(rewritten, "openvino", flat=True)["example_input"]
    ]
    batch, query = shapes[0]
    past = shapes[3][2]
    assert len({batch, query, past}) == 3
    assert min(batch, query, past) >= 2
    assert shapes[1] == (batch, past + query)


def test_unknown_exporter(rewritten: Any) -> None:
    with pytest.raises(CacheFreeError, match="no arguments for the exporter 'tflite'"):
        export_arguments(rewritten, "tflite")


def test_positional_arguments() -> None:
    import inspect

    def forward(a, b=1, *rest, c=None):
        return a, b, rest, c

    signature = inspect.signature(forward)
    assert positional(signature, {"a": 5}) == ((5,), {})
    assert positional(signature, {"a": 5, "*rest": (7, 8)}) == ((5, 1, 7, 8), {})
    assert positional(signature, {"a": 5, "c": 3}) == ((5, 1), {"c": 3})


def test_example_sizes_leave_rows_to_a_convolution_with_a_stride() -> None:
    batch, frames = size_symbol("batch"), size_symbol("encoder")
    sounds = InputSpec("sounds", "sounds", (batch, frames), torch.float32)
    for rows, least in ((sympy.floor((frames - 1) / 4) + 1, 5), (sympy.floor(frames / 320), 640)):
        states = OutputSpec("states", "states", (batch, rows, 8), torch.float32)
        interface = Interface((sounds,), (states,), (), Domain((Region("encoder"),)))
        sizes = next(example_sizes(interface))
        assert sizes["encoder"] >= least
        assert sizes["batch"] >= 2


def test_example_sizes_are_enough_for_many_symbols() -> None:
    names = [f"size_{place}" for place in range(11)]
    interface = SimpleNamespace(
        symbols=names,
        past_symbols=[],
        cache=(),
        inputs=[SimpleNamespace(shape=tuple(map(size_symbol, names)))],
        outputs=[],
        domain=SimpleNamespace(holds=lambda sizes: sizes.keys() == set(names)),
    )
    for sizes in example_sizes(interface):
        assert sizes.keys() == set(names)
        assert len(set(sizes.values())) == len(names)
