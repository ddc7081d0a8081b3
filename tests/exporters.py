"""Every exporter, each on the one graph of a small decoder: at past 0, 1, many and query 1, many.

``python -m tests.exporters`` runs them all and writes what came of it between two marks of
``docs/exporters.md``; the rest of that page is written by hand.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import cachefree

from .models.gpt import GPTConfig, NanoGPT
from .small import rewritten_small, small

SIZES = [(1, 0, 1), (1, 0, 4), (2, 0, 3), (3, 1, 1), (1, 4, 1), (2, 3, 2), (3, 4, 6)]
"""Batch, past and query of the calls that are compared."""
Run = Callable[..., Any]
PAGE = Path(__file__).parent.parent / "docs" / "exporters.md"
BEGIN, END = "<!-- made by `python -m tests.exporters` -->\n", "<!-- until here -->\n"


class NotInstalledError(Exception):
    """The package of an exporter is not there."""


def flat_call(rewritten: cachefree.Rewritten, batch: int, past: int, query: int) -> Any:
    """Flat inputs of these sizes, with numbers that are not all alike."""
    sizes = {"batch": batch, "past": past, "query": query}
    generator = torch.Generator().manual_seed(3)
    found = []
    for spec in rewritten.interface.inputs:
        shape = [int(sizes.get(str(size), size)) for size in spec.shape]
        if spec.dtype.is_floating_point:
            found.append(torch.randn(shape, generator=generator))
        else:
            found.append(torch.randint(0, 8, shape, generator=generator))
    return tuple(found)


def check(rewritten: cachefree.Rewritten, exported: Run) -> None:
    """Compares an exported module with the one graph."""
    for batch, past, query in SIZES:
        inputs = flat_call(rewritten, batch, past, query)
        with torch.no_grad():
            expected, found = rewritten.graph_module(*inputs), exported(*inputs)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(
                torch.as_tensor(one), other, msg=f"batch {batch}, past {past}, query {query}"
            )


def need(package: str) -> None:
    """Raises where a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise NotInstalledError(f"{package} is not installed")


def torch_export(rewritten: cachefree.Rewritten) -> Run:
    program = torch.export.export(
        rewritten.graph_module, **rewritten.export_args("torch", flat=True)
    )
    return program.module()


def onnx_by(exporter: str, opset: int) -> Callable[[cachefree.Rewritten], Run]:
    def export(rewritten: cachefree.Rewritten) -> Run:
        import onnxruntime

        arguments = rewritten.export_args(exporter, flat=True)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m.onnx"
            torch.onnx.export(
                rewritten.graph_module, f=path, opset_version=opset, verbose=False, **arguments
            )
            session = onnxruntime.InferenceSession(path)
        names = [value.name for value in session.get_inputs()]
        return lambda *inputs: session.run(
            None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        )

    return export


def to_onnx(kind: Any) -> Callable[[cachefree.Rewritten], Run]:
    def export(rewritten: cachefree.Rewritten) -> Run:
        with tempfile.TemporaryDirectory() as folder:
            path = cachefree.to_onnx(rewritten, Path(folder) / "m.onnx", kv=kind)
            runtime = cachefree.load_onnx(path)
        return lambda *inputs: runtime.run_flat(inputs)

    return export


def traced(rewritten: cachefree.Rewritten) -> Run:
    return torch.jit.trace(rewritten.graph_module, **rewritten.export_args("trace", flat=True))  # type: ignore[no-any-return]


def compiled(backend: str) -> Callable[[cachefree.Rewritten], Run]:
    def export(rewritten: cachefree.Rewritten) -> Run:
        torch._dynamo.reset()
        return torch.compile(  # type: ignore[no-any-return]
            rewritten.graph_module, backend=backend, dynamic=True, fullgraph=True
        )

    return export


def inductor(rewritten: cachefree.Rewritten) -> Run:
    program = torch.export.export(
        rewritten.graph_module, **rewritten.export_args("torch", flat=True)
    )
    with tempfile.TemporaryDirectory() as folder:
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(Path(folder) / "m.pt2")
        )
        return torch._inductor.aoti_load_package(path)


def openvino(rewritten: cachefree.Rewritten) -> Run:
    need("openvino")
    import openvino as ov

    model = ov.convert_model(rewritten.graph_module, **rewritten.export_args("openvino", flat=True))
    ready = ov.compile_model(model, "CPU")
    return lambda *inputs: list(ready([tensor.numpy() for tensor in inputs]).values())


def executorch(rewritten: cachefree.Rewritten) -> Run:
    need("executorch")
    from executorch.exir import to_edge
    from executorch.runtime import Runtime

    program = torch.export.export(
        rewritten.graph_module, **rewritten.export_args("torch", flat=True)
    )
    buffer = to_edge(program).to_executorch().buffer
    method = Runtime.get().load_program(buffer).load_method("forward")
    return lambda *inputs: method.execute(list(inputs))


QUICK: dict[str, tuple[str, Callable[[cachefree.Rewritten], Run]]] = {
    "torch.export": ("torch", torch_export),
    "torch.onnx dynamo=True, opset 18": ("torch", onnx_by("onnx", 18)),
    "torch.onnx dynamo=True, opset 23": ("torch", onnx_by("onnx", 23)),
    "torch.onnx dynamo=False, opset 17": ("torch", onnx_by("torchscript", 17)),
    "torch.jit.trace": ("torch", traced),
    "torch.compile backend=eager": ("torch", compiled("eager")),
    "torch.compile backend=aot_eager": ("torch", compiled("aot_eager")),
    "OpenVINO": ("openvino", openvino),
    "ExecuTorch, portable": ("executorch", executorch),
}
_OPSETS = (19, 20, 21, 22, 24)
SLOW: dict[str, tuple[str, Callable[[cachefree.Rewritten], Run]]] = {
    **{f"torch.onnx dynamo=True, opset {n}": ("torch", onnx_by("onnx", n)) for n in _OPSETS},
    "torch.onnx dynamo=False, opset 18": ("torch", onnx_by("torchscript", 18)),
    "torch.onnx dynamo=False, opset 20": ("torch", onnx_by("torchscript", 20)),
    "cachefree.to_onnx kv=concat": ("onnxruntime", to_onnx("concat")),
    "AOTInductor": ("torch", inductor),
}  # fmt: skip


def decoder() -> cachefree.Rewritten:
    """The decoder that is exported: of operators that all exporters know."""
    return rewritten_small(small(lambda: NanoGPT(GPTConfig(n_layer=1))), check="off")


def main() -> None:
    """Runs them all and writes the table."""
    rewritten = decoder()
    rows = []
    for name, (package, export) in {**QUICK, **SLOW}.items():
        try:
            check(rewritten, export(rewritten))
            outcome = "equal at all sizes"
        except NotInstalledError as error:
            outcome = f"not run: {error}"
        except Exception as error:  # noqa: BLE001 - the outcome is what is asked for
            outcome = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
        try:
            number = version(package).partition("+")[0]
        except PackageNotFoundError:
            number = "–"
        rows.append(f"| {name} | {package} {number} | {outcome} |")
    sizes = ", ".join(f"({batch}, {past}, {query})" for batch, past, query in SIZES)
    made = (
        "Made by `python -m tests.exporters`: `rewritten.graph_module` of a small"
        " decoder with `rewritten.export_args(…, flat=True)`, exported once and compared with the"
        f" graph at (batch, past, query) {sizes}.\n\n"
        "| exporter | version | outcome |\n|---|---|---|\n" + "\n".join(rows) + "\n"
    )
    PAGE.write_text(with_outcomes(PAGE.read_text(), made))


def with_outcomes(page: str, made: str) -> str:
    """The page with what was made now in place of what was made before."""
    before, _, rest = page.partition(BEGIN)
    _, mark, after = rest.partition(END)
    assert mark, f"{PAGE} has lost its marks"
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


if __name__ == "__main__":
    main()
