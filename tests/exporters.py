"""Every exporter, each on the one graph of a small decoder: at past 0, 1, many and query 1, many.

``python -m tests.exporters`` runs them all and writes what came of it to ``docs/exporters.md``;
``make exporters`` installs those that are packages of their own first.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import torch

import cachefree

from .models.gpt import GPTConfig, NanoGPT
from .small import rewritten_small, small

SIZES = [(1, 0, 1), (1, 0, 4), (2, 0, 3), (3, 1, 1), (1, 4, 1), (2, 3, 2), (3, 4, 6)]
"""Batch, past and query of the calls that are compared."""
EQUAL = "equal at all sizes"
Run = Callable[..., Any]
PAGE = Path(__file__).parent.parent / "docs" / "exporters.md"
START, END = "<!-- ran: start -->\n", "<!-- ran: end -->\n"
"""What stands around the table on the page."""


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
    # Where a CPU has AMX, OpenVINO infers in bfloat16 unless it is told not to.
    ready = ov.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda *inputs: list(ready([tensor.numpy() for tensor in inputs]).values())


def executorch(rewritten: cachefree.Rewritten) -> Run:
    need("executorch")
    from executorch.exir import to_edge
    from executorch.runtime import Runtime

    exported = torch.export.export(
        rewritten.graph_module, **rewritten.export_args("torch", flat=True)
    )
    # The method does not keep its program alive, so what is returned does.
    program = Runtime.get().load_program(to_edge(exported).to_executorch().buffer)
    method = program.load_method("forward")
    return lambda *inputs, program=program: method.execute(list(inputs))


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


def outcome(rewritten: cachefree.Rewritten, export: Callable[[cachefree.Rewritten], Run]) -> str:
    """What comes of an exporter."""
    try:
        check(rewritten, export(rewritten))
    except NotInstalledError as error:
        return f"not run: {error}"
    except Exception as error:  # noqa: BLE001 - the outcome is what is asked for
        return f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
    return EQUAL


def number(package: str) -> str:
    """The version of a package, or a dash; the wheel that has it may have another name."""
    wheels = packages_distributions().get(package)
    return version(wheels[0]).partition("+")[0] if wheels else "–"


def with_table(page: str, rows: list[str]) -> str:
    """The page with these rows in place of those that were there."""
    before, _, rest = page.partition(START)
    after = rest.partition(END)[2]
    table = "| exporter | version | outcome |\n|---|---|---|\n" + "\n".join(rows) + "\n"
    return f"{before}{START}\n{table}\n{END}{after}"


def main() -> None:
    """Runs them all and writes the table; says which are not equal."""
    rewritten = decoder()
    found = {
        name: (package, outcome(rewritten, export))
        for name, (package, export) in {**QUICK, **SLOW}.items()
    }
    rows = [f"| {name} | {of} {number(of)} | {said} |" for name, (of, said) in found.items()]
    PAGE.write_text(with_table(PAGE.read_text(), rows))
    wrong = [f"{name}: {said}" for name, (_, said) in found.items() if said != EQUAL]
    sys.exit("\n".join(wrong) or None)


if __name__ == "__main__":
    main()
