"""The one graph through torch's exporter: written, named, without control flow, saved."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cachefree.errors import CacheFreeError, Refusal, raise_all
from cachefree.onnx.attention.shared import LENGTH
from cachefree.onnx.names import Names, axis_name
from cachefree.onnx.networks import network_translations
from cachefree.onnx.placing import outside_optimizer
from cachefree.onnx.reductions import axes_from_front
from cachefree.onnx.storage import data_file
from cachefree.onnx.weights import Matched

if TYPE_CHECKING:
    from cachefree.spec import Interface

__all__ = [
    "default_opset",
    "export",
    "give_length",
    "name_values",
    "order_by_layer",
    "refuse_control_flow",
    "save",
    "save_graph",
]

_CONTROL_FLOW = ("If", "Loop", "Scan")
_CHATTY = (
    "torch.onnx._internal.exporter._registration",
    "onnxscript.optimizer",
    "onnx_ir.passes.common.initializer_deduplication",
)
_CONVERTERS = ("onnxscript.version_converter", "torch.onnx._internal.exporter._compat")
_PREFERRED_OPSET = 23  # the first with Attention


def default_opset() -> int:
    """23 where this torch writes it, else the newest that it does."""
    newest = int(getattr(torch.onnx._constants, "ONNX_MAX_OPSET", 18))
    return min(_PREFERRED_OPSET, newest)


def export(
    program: torch.export.ExportedProgram, opset: int, matched: Matched | None = None
) -> Any:
    """The ``onnx_ir.Model`` of a program."""
    _refuse_unknown_opset(opset)
    converted = _Conversion()
    try:
        with _quiet_exporter(), converted.heard(), torch.no_grad():
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                verbose=False,
                custom_translation_table=network_translations(),
                optimize=matched is None,
            )
            assert onnx_program is not None
            if matched is not None:
                with outside_optimizer(onnx_program.model, matched):
                    onnx_program.optimize()
    except ImportError as error:
        raise CacheFreeError(
            Refusal(f"{error.name} is not installed.", remedy="pip install onnx onnxscript")
        ) from error
    except Exception as error:
        raise CacheFreeError(
            Refusal(
                "torch.onnx could not write the graph.",
                why=_cause(error),
                remedy=(
                    "Try another opset=, or register a translation of the operator with torch.onnx."
                ),
            )
        ) from error
    if onnx_program.model.opset_imports.get("") != opset:
        raise CacheFreeError(
            Refusal(
                f"The graph cannot be written in opset {opset}.",
                why=f"torch.onnx writes it in opset {onnx_program.model.opset_imports.get('')}; "
                f"what converts it said: {converted.reason or 'nothing'}",
                remedy=f"Leave opset= out for {default_opset()}.",
            )
        )
    axes_from_front(onnx_program.model)
    return onnx_program.model


def _cause(error: BaseException) -> str:
    """The innermost reason: the exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".split("\n")[0]


def _refuse_unknown_opset(opset: int) -> None:
    try:
        import onnx
    except ImportError:
        return  # which the exporter tells
    newest = onnx.defs.onnx_opset_version()
    if type(opset) is not int or not 1 <= opset <= newest:
        raise CacheFreeError(
            Refusal(
                f"There is no opset {opset!r}.",
                why=f"The onnx that is installed knows 1 to {newest}.",
                remedy=f"Leave opset= out for {default_opset()}.",
            )
        )


class _Conversion(logging.Filter):
    """Keeps what the converter between opsets logs from the user, and why it failed.

    Attributes:
        reason: The last line of its last exception; empty where it raised none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reason = ""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None:
            self.reason = str(record.exc_info[1]).strip().splitlines()[-1]
        return False

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Listens."""
        loggers = [logging.getLogger(name) for name in _CONVERTERS]
        for logger in loggers:
            logger.addFilter(self)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(self)


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter's advice is for its own users, and torchvision is none of our business."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def name_values(model: Any, interface: Interface, names: Names) -> None:
    """Names inputs, outputs and every axis of them."""
    import onnx_ir

    values: list[tuple[Any, Any, str]] = [
        *zip(model.graph.inputs, interface.inputs, names.inputs, strict=True)
    ]
    values += zip(model.graph.outputs, interface.outputs, names.outputs, strict=True)
    ours = {id(value) for value, _, _ in values}
    taken = {name for _, _, name in values}
    for value in _values(model.graph):
        if id(value) not in ours and value.name in taken:
            value.name = f"{value.name}_value"
    for number, (value, _, _) in enumerate(values):
        value.name = f"cachefree_{number}"  # no two values have one name while they are renamed
    for value, spec, name in values:
        value.name = name
        value.shape = onnx_ir.Shape([axis_name(size) for size in spec.shape])


def order_by_layer(model: Any) -> None:
    """Puts the inputs of a cache behind the others, layer by layer.

    Optimum fills a cache by the order of its inputs: keys and values of the tokens, then those of
    the encoder, a layer after the other.
    """
    inputs = list(model.graph.inputs)
    kinds = ["decoder.key", "decoder.value", "encoder.key", "encoder.value", "key", "value"]

    def place(value: Any) -> tuple[int, int]:
        first, _, kind = value.name.removeprefix("past_key_values.").partition(".")
        is_slot = value.name.startswith("past_key_values.") and first.isdigit() and kind in kinds
        return (int(first), kinds.index(kind)) if is_slot else (-1, 0)

    model.graph.inputs[:] = sorted(inputs, key=place)


def give_length(model: Any) -> None:
    """Makes a number of the input whose length is that of the past."""
    import onnx_ir

    marker = next(value for value in model.graph.inputs if value.name == LENGTH)
    for node in [use.node for use in marker.uses()]:
        assert node.op_type == "Shape", "the marker's length alone is read"
        node.replace_input_with(0, marker)
        identity = onnx_ir.node("Identity", [marker])
        model.graph.insert_before(node, identity)
        onnx_ir.convenience.replace_all_uses_with(node.outputs[0], identity.outputs[0])
        identity.outputs[0].name = node.outputs[0].name
        model.graph.remove(node, safe=True)
    marker.dtype = onnx_ir.DataType.INT64
    marker.shape = onnx_ir.Shape([1])


def _values(graph: Any) -> Iterator[Any]:
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def refuse_control_flow(model: Any, *, has_scans: bool) -> None:
    """Refuses control flow, but for the loops over tokens that are the model's own."""
    graphs = (model.graph, *model.functions.values())
    nodes = [node for graph in graphs for node in graph.all_nodes()]
    found = [
        node
        for node in nodes
        if node.op_type in _CONTROL_FLOW
        and not (has_scans and node.op_type == "Scan" and "higher_order.scan" in _origin(node))
    ]
    refusals = [
        Refusal(
            f"torch.onnx writes {_origin(node)} with {node.op_type}.",
            why="One graph without control flow is promised.",
            remedy="Write it in the model with other operators, or try another opset=.",
        )
        for node in found
    ]
    raise_all(CacheFreeError, list(dict.fromkeys(refusals)))


def _origin(node: Any) -> str:
    """The operator that a node was written for, and the user's line."""
    written = node.metadata_props.get("pkg.torch.onnx.fx_node", "")
    target = re.search(r"target=(?:torch\.ops\.)?([\w.]+)", written)
    line = node.metadata_props.get("pkg.torch.onnx.stack_trace", "").strip().split("\n")[-1]
    return (target[1] if target else "an operator") + (f" ({line})" if line else "")


def save(model: Any, path: Path, weights: str | None = None) -> None:
    """Saves a model, its weights in a file beside it."""
    import onnx_ir

    onnx_ir.save(
        model, path, external_data=weights or data_file(path).name, size_threshold_bytes=256
    )


def save_graph(model: Any, path: Path) -> None:
    """Saves a model whose weights are in place."""
    import onnx_ir

    onnx_ir.save(model, path)
