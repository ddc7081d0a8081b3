"""Whether a certificate is about a graph and a file: the graph is read a second time."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx

from cachefree.checker.replay import WrongCertificateError
from cachefree.checker.shapes import bound
from cachefree.checker.sizes import FloorDiv, Mod, Sizes
from cachefree.checker.terms import Term, Terms

__all__ = ["bind_to_file", "bind_to_graph", "bind_to_paths", "digests"]

_END = 2**63 - 1
_VIEWS = ("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default", "reshape")
_SIZES: dict[Any, Any] = {
    operator.add: operator.add,
    operator.sub: operator.sub,
    operator.mul: operator.mul,
    operator.floordiv: FloorDiv,
    operator.mod: Mod,
    operator.truediv: lambda a, b: sympy.Function("IntTrueDiv")(a, b),
    torch.sym_max: sympy.Max,
    torch.sym_min: sympy.Min,
    torch.sym_float: sympy.Function("ToFloat"),
    torch.sym_sqrt: sympy.Function("OpaqueUnaryFn_sqrt"),
    operator.pow: sympy.Function("FloatPow"),
}


def bind_to_graph(certificate: Mapping[str, Any], module: fx.GraphModule) -> None:
    """Compares the certificate's one graph with a graph module, node by node.

    Raises:
        WrongCertificateError: they differ.
    """
    _refuse_other_code(module)
    terms = Terms(Sizes([], {}))
    graph = certificate["graph"]
    written = terms.read(graph["terms"], {})
    reader = _Reader(terms, written, [written[place] for _, place in graph["inputs"]])
    outputs = reader.run(module)
    due = [reader.whole(written[place]) for place in graph["outputs"]]
    if len(outputs) != len(due) or any(map(operator.is_not, outputs, due)):
        raise WrongCertificateError("the graph gives other outputs than the certificate is about")


def _refuse_other_code(module: fx.GraphModule) -> None:
    """Refuses a module of which something runs beside its graph."""
    for name, part in module.named_modules():
        if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part):
            raise WrongCertificateError(f"{name or 'the graph'} has hooks, or a forward of its own")


def bind_to_paths(certificate: Mapping[str, Any], captured: Mapping[str, Any]) -> None:
    """Compares the model's paths in a certificate with those that were captured.

    Raises:
        WrongCertificateError: they differ.
    """
    ours, theirs = certificate["regions"], captured["regions"]
    if [region["call"] for region in ours] != [region["call"] for region in theirs]:
        raise WrongCertificateError("the model was captured in other regions")
    for one, other in zip(ours, theirs, strict=True):
        terms = Terms(Sizes([], {}))
        mine, due = terms.read(one["terms"], {}), terms.read(other["terms"], {})
        paths = [mine[place] for place in one["path"]], [due[place] for place in other["path"]]
        neutral = [
            {path: read[place] for path, place in region["neutral"].items()}
            for region, read in ((one, mine), (other, due))
        ]
        if any(one[key] != other[key] for key in ("facts", "values")) or paths[0] != paths[1]:
            raise WrongCertificateError(f"the model takes another path ({one['call']})")
        if neutral[0] != neutral[1]:
            raise WrongCertificateError(f"the neutral cache is another one ({one['call']})")
    if ours and certificate["stand_ins"] != captured["stand_ins"]:
        raise WrongCertificateError("other operators stand for those of the model")


class _Reader:
    """Reads a graph module, looking each node up among the certificate's terms."""

    def __init__(self, terms: Terms, written: Sequence[Term], inputs: Sequence[Term]) -> None:
        self.terms = terms
        self.inputs = list(inputs)
        self.wholes: dict[Term, Term] = {}
        for term in written:
            if _is_whole(term):  # the graph has its operand in its place
                self.wholes[term] = self.whole(term.args[0])
        self.known = {self._key_of(term): term for term in written}
        self.values: dict[fx.Node, Any] = {}

    def whole(self, value: Any) -> Any:
        """A term, or what it is a slice of that leaves nothing out."""
        return self.wholes.get(value, value) if isinstance(value, Term) else value

    def run(self, module: fx.GraphModule) -> list[Term]:
        """The terms of the outputs."""
        inputs = iter(self.inputs)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = next(inputs)
            elif node.op == "get_attr":
                self.values[node] = self._attribute(module, str(node.target))
            elif node.op == "output":
                return [self.values[arg] for arg in node.args[0]]
            else:
                self.values[node] = self._called(node)
        raise WrongCertificateError("the graph has no outputs")

    def _called(self, node: fx.Node) -> Any:
        args = self._given(node.args)
        if node.op == "call_method" and node.target == "size":
            return args[0].shape[args[1]]
        if node.target is getattr:
            return getattr(args[0], args[1])
        if node.target is operator.getitem and isinstance(args[0], Term):
            return self._find("item", args, node)
        if node.target in _SIZES:
            return _SIZES[node.target](*map(sympy.sympify, args))
        if isinstance(node.target, torch._ops.OpOverload):
            target = node.target
            rest = self._given(tuple(node.kwargs.values()))
            named = dict(zip(node.kwargs, rest, strict=True))
            full = []
            for place, argument in enumerate(target._schema.arguments):
                default = argument.default_value if argument.has_default_value() else None
                value = args[place] if place < len(args) else named.get(argument.name, default)
                full.append(None if argument.name == "pin_memory" else self._given(value))
            return self._find(str(target), tuple(full), node)
        raise WrongCertificateError(f"the graph calls {node.target}, which is not known here")

    def _find(self, op: str, args: tuple[Any, ...], node: fx.Node) -> Term:
        found = self.known.get(self._key(op, args, None))
        if found is None and op == "aten.clone.default":
            return args[0]  # type: ignore[no-any-return]
        if found is None:
            raise WrongCertificateError(f"the graph computes {node.name}, the certificate does not")
        return found

    def _given(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self.values[value]
        if isinstance(value, (tuple, list)):
            return tuple(map(self._given, value))
        if isinstance(value, (torch.device, torch.layout, torch.memory_format)):
            return f"{type(value).__name__}:{value}"
        return value

    def _attribute(self, module: fx.GraphModule, target: str) -> Term:
        path, _, name = target.rpartition(".")
        tensor: torch.Tensor = getattr(module.get_submodule(path), name)
        shape, device = tuple(tensor.shape), f"device:{tensor.device}"
        args: tuple[Any, ...] = (target,)
        op = "constant" if target.startswith("_constants.") else "attribute"
        if op == "constant":
            raw = tensor.detach().cpu().contiguous().view(-1)
            digest = hashlib.sha256(raw.view(torch.uint8).numpy().tobytes()).hexdigest()
            identity = ("bits", digest) if tensor.numel() else ("empty",)
            args = (identity, shape, tensor.dtype, str(tensor.device))
        term = self.known.get(self._key(op, args, None))
        if term is not None and tensor.is_meta:
            device = str(term.device)  # a weight without values is where it will be once it has any
        if term is None or (term.shape, term.dtype, term.device) != (shape, tensor.dtype, device):
            raise WrongCertificateError(f"the graph reads {target}, the certificate does not")
        return term

    def _key_of(self, term: Term) -> Any:
        """A term as the graph writes it."""
        args, op = term.args, term.op
        if op == "slice":
            op = "aten.slice.Tensor"
        elif op in ("cat", "permute"):
            op = f"aten.{op}.default"
        elif op == "expand":
            op, args = "aten.expand.default", (*args, False)
        elif op == "full":
            op, args = "aten.full.default", (*args[:3], None, args[3], None)
        elif op == "arange":
            start, count, step, dtype, device = args
            end = start + sympy.sympify(count) * step
            op, args = "aten.arange.start_step", (start, end, step, dtype, None, device, None)
        elif op == "cast":
            x, dtype, device = args
            same = device == x.device
            rest = (False, False, None)
            op = "aten.to.dtype" if same else "aten.to.device"
            args = (x, dtype, *rest) if same else (x, device, dtype, *rest)
        return self._key(op, args, term.shape)

    def _key(self, op: str, args: tuple[Any, ...], shape: Any) -> Any:
        args = _each(args, self.whole)
        if op in _VIEWS:
            op, args = "view", (args[0], shape or args[1])
        elif op == "aten.expand.default":
            x, sizes, *_ = args
            added = len(sizes) - len(x.shape)
            whole = tuple(x.shape[d - added] if n == -1 else n for d, n in enumerate(sizes))
            args = (x, shape or whole)
        elif op == "aten.slice.Tensor":
            x, dim, start, end, step = args
            dim %= len(x.shape)
            first = bound(self.terms, 0 if start is None else start, x.shape[dim])
            last = bound(self.terms, 2**62 if end is None else end, x.shape[dim])
            clear = first is not None and last is not None
            args = (x, dim, first, last, step) if clear else args
        return op, self.terms.plain(args)


def digests(path: Path) -> dict[str, str]:
    """The SHA-256 of an ONNX file and of its weights, by file name."""
    files = [path, path.with_name(f"{path.name}.data")]
    found = {}
    for file in files:
        if file.exists():
            with file.open("rb") as stream:
                found[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def bind_to_file(certificate: Mapping[str, Any], folder: Path) -> list[str]:
    """Compares the digests in a certificate with the ONNX files beside it; their names.

    Raises:
        WrongCertificateError: a file is not there, or is another one.
    """
    noted: dict[str, str] = certificate.get("onnx", {})
    for name in noted:
        if Path(name).name != name or not (folder / name).is_file():
            raise WrongCertificateError(f"the ONNX file {name} is not beside it")
    if noted and digests(folder / next(iter(noted))) != noted:
        raise WrongCertificateError("the ONNX file is not the one that it was written with")
    return list(noted)


def _is_whole(term: Term) -> bool:
    if term.op not in ("slice", "aten.slice.Tensor"):
        return False
    source, dim, start, end, step = term.args
    return start in (0, None) and end in (_END, None, source.shape[dim]) and step == 1


def _each(values: tuple[Any, ...], replaced: Callable[[Any], Any]) -> tuple[Any, ...]:
    return tuple(
        _each(value, replaced) if isinstance(value, tuple) else replaced(value) for value in values
    )
