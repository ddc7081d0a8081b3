"""Arguments for the exporters of others: example tensors, dynamic shapes, names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch.export import Dim

from cachefree.calling import Calling
from cachefree.calls import TensorSpec
from cachefree.errors import CacheFreeError, Refusal
from cachefree.onnx.domain import concrete
from cachefree.onnx.names import Style, axis_name, name_interface
from cachefree.onnx.program import example_sizes
from cachefree.spec import Domain, Interface
from cachefree.structure import Structure
from cachefree.vocabulary import vocabulary_sizes

__all__ = ["example_tensors", "export_arguments", "positional"]

_LARGEST = 1 << 20


def export_arguments(
    rewritten: Any, exporter: str = "onnx", names: Style = "optimum", *, flat: bool = False
) -> dict[str, Any]:
    """Keyword arguments for an exporter.

    Args:
        rewritten: What ``cachefree.rewrite`` gave.
        exporter: ``"onnx"`` for ``torch.onnx.export``, ``"torchscript"`` for
            ``torch.onnx.export(dynamo=False)``, ``"torch"`` for ``torch.export.export``,
            ``"trace"`` for ``torch.jit.trace``, ``"openvino"`` for ``openvino.convert_model``.
        names: The names of an ONNX file's inputs and outputs.
        flat: Whether to export ``rewritten.graph_module``, whose inputs are flat tensors; else
            ``rewritten`` itself.

    Returns:
        What the exporter takes by keyword besides the module. The example tensors have at least 2
        of everything, so that no exporter freezes a size, and no two sizes are the same.

    Raises:
        CacheFreeError: an unknown exporter; or the model's own containers are not plain, and
            ``flat`` is not set.
    """
    makers: dict[str, Callable[[_Example, Style], dict[str, Any]]] = {
        "onnx": _for_onnx,
        "torchscript": _for_torchscript,
        "torch": _for_torch,
        "trace": _for_trace,
        "openvino": _for_openvino,
    }
    rewritten.refresh()
    if exporter not in makers:
        raise CacheFreeError(
            Refusal(
                f"There are no arguments for the exporter {exporter!r}.",
                remedy=f"Known are {', '.join(makers)}.",
            )
        )
    return makers[exporter](_Example(rewritten, flat), names)


def example_tensors(interface: Interface, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Tensors for every input of the graph, at the first of the `example_sizes`.

    All are ones, or zeros for ids.
    """
    sizes = next(example_sizes(interface))
    return tuple(
        torch.zeros(concrete(spec.shape, sizes), dtype=spec.dtype, device=device)
        for spec in interface.inputs
    )


def positional(
    signature: inspect.Signature, named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Named arguments by position, defaults in the gaps; keyword-only ones stay what they are.

    Args:
        signature: Of the model's ``forward``.
        named: Argument name → value; those of a variadic one under ``*name``.
    """
    args: list[Any] = []
    rest = dict(named)
    for name, parameter in signature.parameters.items():
        if not rest:
            break
        if parameter.kind is parameter.VAR_POSITIONAL:
            args += rest.pop(f"*{name}", ())
        elif parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD):
            break
        elif name in rest:
            args.append(rest.pop(name))
        elif parameter.default is not parameter.empty:
            args.append(parameter.default)
        else:
            break
    return tuple(args), rest


class _Example:
    """A call of the module: its tensors, and the dimension that each axis is."""

    def __init__(self, rewritten: Any, flat: bool) -> None:
        self.rewritten = rewritten
        self.interface: Interface = rewritten.interface
        device = next(
            (tensor.device for tensor in rewritten.graph_module.parameters()), torch.device("cpu")
        )
        self.tensors = example_tensors(self.interface, device)
        self.structure: Structure | None = None if flat else rewritten.calling.structure
        if self.structure is not None and not _is_plain(self.structure):
            raise CacheFreeError(
                Refusal(
                    "The model's own call cannot be exported: its cache is an object of a class of"
                    " its own.",
                    why="Exporters take tensors in tuples, lists and dicts.",
                    remedy=(
                        "Export rewritten.graph_module with rewritten.export_args(flat=True), or"
                        " use cachefree.to_onnx."
                    ),
                )
            )

    def call(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments, with ``leaves`` in the places of the tensors."""
        if self.structure is None:
            return tuple(leaves), {}
        calling: Calling = self.rewritten.calling
        tensors, sizes = iter(leaves), next(example_sizes(self.interface))
        filled = [
            next(tensors) if isinstance(spec, TensorSpec) else calling.value(spec.expr, sizes)
            for spec in calling.leaves
        ]
        named = self.structure.rebuild(filled)
        # an exporter would keep the number of the example: what is None follows from the sizes
        return positional(calling.signature, {**named, **dict.fromkeys(calling.counts)})

    def names(self, style: Style) -> tuple[list[str], list[str]]:
        """The input names in the order of the call, and the output names."""
        rows = zip(
            self.interface.inputs, vocabulary_sizes(self.rewritten.graph_module), strict=True
        )
        chosen = name_interface(
            self.interface, style, {spec.name: size for spec, size in rows if size is not None}
        )
        return [chosen.inputs[place] for place in self.order()], list(chosen.outputs)

    def order(self) -> list[int]:
        """The places of the interface's inputs in the order in which the call has them."""
        args, kwargs = self.call([_Leaf(place) for place in range(len(self.tensors))])
        return [leaf.held for leaf in (*_leaves(args), *_leaves(kwargs))]


def _for_torch(example: _Example, names: Style) -> dict[str, Any]:
    args, kwargs = example.call(example.tensors)
    shape_args, shape_kwargs = example.call(
        [_Leaf(axes) for axes in _dimensions(example.interface)]
    )
    shape_args, shape_kwargs = _bare(shape_args), _bare(shape_kwargs)
    if example.structure is None:
        return {"args": args, "kwargs": kwargs, "dynamic_shapes": shape_args}
    shapes = {"args": shape_args, "kwargs": shape_kwargs}
    return {
        "args": args,
        "kwargs": kwargs,
        "dynamic_shapes": {key: value for key, value in shapes.items() if value},
    }


def _for_onnx(example: _Example, names: Style) -> dict[str, Any]:
    inputs, outputs = example.names(names)
    return {
        **_for_torch(example, names),
        "input_names": inputs,
        "output_names": outputs,
        "dynamo": True,
    }


def _for_torchscript(example: _Example, names: Style) -> dict[str, Any]:
    inputs, outputs = example.names(names)
    args, kwargs = example.call(example.tensors)
    specs: dict[str, Any] = {
        name: example.interface.inputs[place]
        for name, place in zip(inputs, example.order(), strict=True)
    }
    specs |= dict(zip(outputs, example.interface.outputs, strict=True))
    axes = {
        name: {
            axis: axis_name(size)
            for axis, size in enumerate(spec.shape)
            if isinstance(size, sympy.Basic)
        }
        for name, spec in specs.items()
    }
    return {
        "args": args,
        "kwargs": kwargs,
        "input_names": inputs,
        "output_names": outputs,
        "dynamic_axes": axes,
        "dynamo": False,
    }


def _refuse_untraceable(example: _Example) -> None:
    """Refuses results that ``torch.jit.trace`` cannot give back.

    Raises:
        CacheFreeError: a list, or an entry of a dict, holds more than tensors.
    """
    if example.structure is not None and _is_untraceable(example.rewritten.calling.results):
        raise CacheFreeError(
            Refusal(
                "torch.jit.trace cannot give back what the model returns.",
                why="A traced module gives tensors, tuples, lists of tensors and dicts whose "
                "entries are alike; this model's lists or dicts hold more.",
                remedy="Trace rewritten.graph_module, whose result is a tuple of tensors, with "
                "rewritten.export_args(..., flat=True).",
            )
        )


def _is_untraceable(structure: Structure) -> bool:
    inner = [child for child in structure.children if child.children]
    if structure.kind == "list":
        return bool(inner)
    if structure.kind == "mapping":
        deep = any(part.children for child in inner for part in child.children)
        is_mixed = len({len(child.children) for child in structure.children}) > 1
        return deep or is_mixed or any(child.kind != "tuple" for child in inner)
    return any(map(_is_untraceable, inner))


def _for_trace(example: _Example, names: Style) -> dict[str, Any]:
    _refuse_untraceable(example)
    args, kwargs = example.call(example.tensors)
    if kwargs:
        return {"example_inputs": None, "example_kwarg_inputs": kwargs, "strict": False}
    return {"example_inputs": args, "strict": example.structure is None}


def _for_openvino(example: _Example, names: Style) -> dict[str, Any]:
    _refuse_untraceable(example)
    args, kwargs = example.call(example.tensors)
    return {"example_input": kwargs or args}


class _Leaf:
    """Stands in the place of a tensor, and is kept whole while containers around it are rebuilt."""

    def __init__(self, held: Any) -> None:
        self.held = held


def _bare(value: Any) -> Any:
    """Containers of dimensions; None for what is no tensor."""
    if isinstance(value, _Leaf):
        return value.held
    if isinstance(value, dict):
        return {key: _bare(part) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_bare, value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(_bare, value))
    return None


def _leaves(value: Any) -> list[_Leaf]:
    if isinstance(value, _Leaf):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [leaf for part in value for leaf in _leaves(part)]
    return []


def _is_plain(structure: Structure) -> bool:
    if structure.kind == "mapping" and structure.cls is not dict:
        return False
    if structure.kind == "object":
        return False
    return all(_is_plain(child) for child in structure.children)


def _dimensions(interface: Interface) -> list[dict[int, Any]]:
    """Dims from 0 on, one a symbol.

    A sum of symbols has a Dim of its own, since torch has no sums of Dims.
    """
    dims: dict[Any, Any] = {}

    def dim(size: Any) -> Any:
        if size not in dims:
            symbols = sorted(size.free_symbols, key=str)
            if isinstance(size, sympy.Symbol):
                largest = _largest(interface.domain, interface.symbols, str(size))
                dims[size] = Dim(axis_name(size), max=largest) if largest else Dim(axis_name(size))
            elif len(symbols) == 1 and _is_affine(size, symbols[0]):
                factor = int(sympy.diff(size, symbols[0]))
                dims[size] = factor * dim(symbols[0]) + int(size.subs(symbols[0], 0))
            else:
                dims[size] = Dim("_plus_".join(axis_name(symbol) for symbol in symbols))
        return dims[size]

    return [
        {axis: dim(size) for axis, size in enumerate(spec.shape) if isinstance(size, sympy.Basic)}
        for spec in interface.inputs
    ]


def _is_affine(size: Any, symbol: Any) -> bool:
    slope = sympy.diff(size, symbol)
    return bool(slope.is_Integer and slope > 0 and sympy.expand(size - slope * symbol).is_Integer)


def _largest(domain: Domain, symbols: Sequence[str], name: str) -> int | None:
    """The largest size that the domain allows beside sizes of 2; None if there is no end.

    A table of W positions takes ``past + query <= W``, for which torch wants an end for each of the
    two.
    """
    base = dict.fromkeys(symbols, 2)

    def fits(size: int) -> bool:
        return domain.holds({**base, name: size})

    if fits(_LARGEST) or not fits(2):
        return None
    low, high = 2, _LARGEST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
