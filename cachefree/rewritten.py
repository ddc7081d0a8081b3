"""What `cachefree.rewrite` gives back: a module that is called as the model is, over one graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx, nn

from cachefree.capture import SizeSpec, TensorSpec
from cachefree.errors import DomainError, Refusal
from cachefree.graph import assemble, mirror
from cachefree.report import Report
from cachefree.sizes import compiled
from cachefree.spec import Interface
from cachefree.structure import MismatchError, Structure

__all__ = ["Calling", "Rewritten"]


@dataclass
class Calling:
    """How the model's own call becomes flat tensors, and flat tensors its own result.

    Attributes:
        parameters: The arguments that the graph was captured with, by name, in order; a variadic
            one as ``*name``.
        signature: Of the model's ``forward``.
        structure: The structure of the dict of these arguments on a later call.
        leaves: One spec a leaf of it.
        caches: Where the call takes the cache.
        results: The structure of the result.
        result_leaves: One spec a leaf of it.
        mode_matters: Why training mode would compute something else; empty where it would not.
        functions: Size expressions, compiled.
    """

    parameters: tuple[str, ...]
    signature: inspect.Signature
    structure: Structure
    leaves: tuple[TensorSpec | SizeSpec, ...]
    caches: tuple[CachePlace, ...]
    results: Structure
    result_leaves: tuple[TensorSpec | SizeSpec, ...]
    mode_matters: str = ""
    functions: dict[Any, Callable[[Mapping[str, int]], Any]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "functions": {}}


@dataclass
class CachePlace:
    """Where the call takes a part of the cache.

    Attributes:
        parameter: The argument.
        steps: The entry inside it, where the argument is a container.
        structure: Of the cache there.
        leaves: One spec a leaf.
    """

    parameter: str
    steps: tuple[Any, ...]
    structure: Structure
    leaves: tuple[TensorSpec | SizeSpec, ...]

    @property
    def path(self) -> str:
        """As Python writes it."""
        return self.parameter.lstrip("*") + "".join(f"[{step!r}]" for step in self.steps)


class Rewritten(nn.Module):
    """One graph, called as the model is.

    A cache argument takes the model's own structure of tensors; ``None``, or leaving it out, means
    the neutral cache. Parameters and buffers are the model's own objects under the model's own
    names.

    Attributes:
        graph_module: The ``torch.fx.GraphModule``: flat tensors in and out, no control flow, no
            ``None``.
        interface: Its inputs, outputs and cache slots.
        report: What was done and shown.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        interface: Interface,
        calling: Calling,
        report: Report,
        origin: Origin | None = None,
    ) -> None:
        super().__init__()
        self.__dict__["_graph_module"] = graph_module
        self.interface = interface
        self.calling = calling
        self.report = report
        self.__dict__["_origin"] = origin
        self._share(graph_module)
        self.training = False

    def _share(self, graph_module: fx.GraphModule) -> None:
        self.__dict__["_graph_module"] = graph_module
        self.__dict__["_modules"].clear()
        self.__dict__["_parameters"] = graph_module._parameters
        self.__dict__["_buffers"] = graph_module._buffers
        for name, child in graph_module.named_children():
            self.add_module(name, child)

    @property
    def graph_module(self) -> fx.GraphModule:
        """The one graph: flat tensors in the order of ``interface.inputs``, out in that of
        ``interface.outputs``."""
        return self.__dict__["_graph_module"]  # type: ignore[no-any-return]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own call.

        Raises:
            DomainError: the call is outside the domain of the verdict.
        """
        self._refresh()
        flat = self.flatten_call(*args, **kwargs)
        return self.unflatten_result(self.graph_module(*flat), flat)

    def flatten_call(self, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        """The model's own call as the graph's flat inputs, with the neutral cache put in where none
        is given.

        Raises:
            DomainError: an argument, a structure, a dtype or a size is not one that the graph was
                captured for.
        """
        named = self._named(args, kwargs)
        empty = self._take_caches(named)
        try:
            leaves = self.calling.structure.take(named, "")
        except MismatchError as error:
            raise DomainError(self._mismatch(str(error))) from None
        sizes = self._sizes(leaves, empty)
        flat = []
        for leaf, spec in zip(leaves, self.calling.leaves, strict=True):
            if isinstance(spec, TensorSpec):
                flat.append(self._neutral_tensor(spec, sizes, leaves) if leaf is _NEUTRAL else leaf)
            elif (
                leaf is not _NEUTRAL and not _is_tracing() and leaf != self._value(spec.expr, sizes)
            ):
                raise DomainError(
                    self._mismatch(
                        f"{spec.path} is {leaf!r} where {self._value(spec.expr, sizes)!r} follows from the sizes"
                    )
                )
        return flat

    def unflatten_result(
        self, flat_outputs: Sequence[torch.Tensor], flat_inputs: Sequence[torch.Tensor]
    ) -> Any:
        """The graph's flat outputs in the model's own structure and classes."""
        tensors = iter(flat_outputs)
        sizes: dict[str, int] | None = None
        leaves: list[Any] = []
        for spec in self.calling.result_leaves:
            if isinstance(spec, TensorSpec):
                leaves.append(next(tensors))
            else:
                sizes = sizes if sizes is not None else self.sizes_of(flat_inputs)
                leaves.append(self._value(spec.expr, sizes))
        return self.calling.results.rebuild(leaves)

    def sizes_of(self, flat_inputs: Sequence[torch.Tensor]) -> dict[str, int]:
        """The size of each symbol in a flat call."""
        sizes: dict[str, int] = {}
        for tensor, spec in zip(flat_inputs, self.interface.inputs, strict=True):
            for size, expr in zip(tensor.shape, spec.shape, strict=True):
                if isinstance(expr, sympy.Symbol):
                    sizes.setdefault(str(expr), size)
        return self._solved(flat_inputs, sizes)

    def empty_cache(
        self,
        batch_size: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """The neutral cache, in the model's own structure.

        Args:
            batch_size: B.
            device: Where; by default where the parameters are.
            dtype: Of its floating-point tensors; by default the model's.

        Returns:
            What the cache argument takes. A dict by argument where there are several.
        """
        sizes = {**dict.fromkeys(self.interface.symbols, 0), "batch": batch_size}
        values = {
            place.path: place.structure.rebuild(
                [
                    self._neutral(
                        spec,
                        sizes,
                        torch.device(device) if device is not None else self._device(),
                        dtype,
                    )
                    if isinstance(spec, TensorSpec)
                    else self._value(spec.expr, sizes)
                    for spec in place.leaves
                ]
            )
            for place in self.calling.caches
        }
        return next(iter(values.values())) if len(values) == 1 else values

    def neutral_slots(self, sizes: Mapping[str, int]) -> list[torch.Tensor]:
        """The neutral cache as flat tensors, in the order of ``interface.cache``."""
        known = {**dict.fromkeys(self.interface.symbols, 0), **sizes}
        known.update(dict.fromkeys(self.interface.past_symbols, 0))
        specs = [
            spec
            for place in self.calling.caches
            for spec in place.leaves
            if isinstance(spec, TensorSpec)
        ]
        return [self._neutral(spec, known, self._device(), None) for spec in specs]

    def export_args(self, exporter: str = "onnx", *, names: str = "optimum") -> dict[str, Any]:
        """Keyword arguments for an exporter, for ``graph_module``.

        Args:
            exporter: ``"onnx"`` for ``torch.onnx.export``, ``"torch"`` for ``torch.export.export``,
                ``"trace"`` for ``torch.jit.trace`` …
            names: The scheme of the input and output names.
        """
        from cachefree.onnx.export import export_arguments

        return export_arguments(self, exporter, names)

    # The call's arguments.

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        calling = self.calling
        try:
            bound = calling.signature.bind_partial(*args, **kwargs)
        except TypeError as error:
            raise DomainError(self._mismatch(str(error))) from None
        given: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            kind = calling.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                given[f"*{name}"] = value
            elif kind is inspect.Parameter.VAR_KEYWORD:
                given.update(value)
            else:
                given[name] = value
        for name, value in given.items():
            if name not in calling.parameters and not self._is_default(name, value):
                raise DomainError(
                    Refusal(
                        f"The argument {name!r} was given, but the graph was captured without it.",
                        why="What a graph was captured without it cannot take: the argument would be ignored.",
                        remedy=f"Rewrite again with {name!r} in example_inputs.",
                    )
                )
        return {
            name: given[name] if name in given else self._left_out(name)
            for name in calling.parameters
        }

    def _is_default(self, name: str, value: Any) -> bool:
        if value is None:
            return True
        parameter = self.calling.signature.parameters.get(name.lstrip("*"))
        if parameter is None:
            return False
        if parameter.kind is parameter.VAR_POSITIONAL:
            return value == ()
        return parameter.default is value or (
            isinstance(value, (bool, int, float, str))
            and type(value) is type(parameter.default)
            and value == parameter.default
        )

    def _left_out(self, name: str) -> Any:
        """What stands for an argument that a call leaves out."""
        place = self.calling.parameters.index(name)
        child = self.calling.structure.children[place]
        if child.leaf_count == 0 and child.kind == "constant":
            return child.value  # a flag: the value that the graph was captured with
        if any(cache.parameter == name and not cache.steps for cache in self.calling.caches):
            return None
        raise DomainError(
            Refusal(
                f"The argument {name!r} is missing.",
                why="The graph was captured with it; whether it is given chooses a path of the model's code.",
                remedy=f"Give {name!r}, or rewrite again with example_inputs that leave it out.",
            )
        )

    def _take_caches(self, named: dict[str, Any]) -> bool:
        """Puts markers for the neutral cache into places that are empty; whether all of them
        are."""
        empties = []
        for cache in self.calling.caches:
            value = _inside(named[cache.parameter], cache.steps)
            is_empty = _is_empty(value)
            empties.append(is_empty)
            if is_empty:
                markers = [_NEUTRAL] * len(cache.leaves)
                named[cache.parameter] = _with(
                    named[cache.parameter], cache.steps, cache.structure.rebuild(markers)
                )
        if any(empties) and not all(empties):
            given = [
                cache.path
                for cache, empty in zip(self.calling.caches, empties, strict=True)
                if not empty
            ]
            raise DomainError(
                self._mismatch(f"only a part of the cache is given: {', '.join(given)}")
            )
        return all(empties)

    def _sizes(self, leaves: Sequence[Any], is_first: bool) -> dict[str, int]:
        """The size of each symbol, after checking ranks, dtypes and sizes."""
        sizes: dict[str, int] = dict.fromkeys(self.interface.past_symbols, 0) if is_first else {}
        pairs = [
            (leaf, spec)
            for leaf, spec in zip(leaves, self.calling.leaves, strict=True)
            if isinstance(spec, TensorSpec) and leaf is not _NEUTRAL
        ]
        for leaf, spec in pairs:
            self._check_type(leaf, spec)
            for axis, (size, expr) in enumerate(zip(leaf.shape, spec.shape, strict=True)):
                if isinstance(expr, sympy.Symbol):
                    known = sizes.setdefault(str(expr), size)
                    if not _is_tracing() and known != size:
                        raise DomainError(self._wrong_size(spec, axis, size, f"{expr} = {known}"))
                elif isinstance(expr, int) and not _is_tracing() and size != expr:
                    raise DomainError(self._wrong_size(spec, axis, size, str(expr)))
        tensors = [leaf for leaf, _ in pairs]
        for leaf, spec in pairs[1:]:
            if leaf.device != tensors[0].device and not _is_tracing():
                first = pairs[0][1].path
                raise DomainError(
                    self._mismatch(
                        f"{spec.path} is on {leaf.device} where {first} is on {tensors[0].device}"
                    )
                )
        sizes = self._solved(tensors, sizes, [spec for _, spec in pairs])
        if _is_tracing():
            return sizes
        for leaf, spec in pairs:
            for axis, (size, expr) in enumerate(zip(leaf.shape, spec.shape, strict=True)):
                if not isinstance(expr, (int, sympy.Symbol)) and size != self._value(expr, sizes):
                    raise DomainError(
                        self._wrong_size(spec, axis, size, f"{expr} = {self._value(expr, sizes)}")
                    )
        self._check_domain(sizes)
        return sizes

    def _solved(
        self, tensors: Sequence[torch.Tensor], sizes: dict[str, int], specs: Any = None
    ) -> dict[str, int]:
        """Symbols that occur only inside expressions, solved from one size each."""
        missing = [name for name in self.interface.symbols if name not in sizes]
        for name in missing:
            symbol = sympy.Symbol(name, integer=True, nonnegative=True)
            for tensor, spec in zip(tensors, specs or self.interface.inputs, strict=True):
                for size, expr in zip(tensor.shape, spec.shape, strict=True):
                    if (
                        name not in sizes
                        and isinstance(expr, sympy.Basic)
                        and symbol in expr.free_symbols
                    ):
                        others = {s: sizes.get(str(s)) for s in expr.free_symbols - {symbol}}
                        if None not in others.values() and sympy.diff(expr, symbol).is_Integer:
                            found = sympy.solve(sympy.Eq(expr.subs(others), size), symbol)
                            sizes[name] = int(found[0]) if found else 0
        return sizes

    def _check_type(self, leaf: Any, spec: TensorSpec) -> None:
        if not isinstance(leaf, torch.Tensor):
            raise DomainError(
                self._mismatch(
                    f"{spec.path} is {type(leaf).__name__} {leaf!r} where a tensor is expected"
                )
            )
        if leaf.dim() != len(spec.shape):
            shape = ", ".join(map(str, spec.shape))
            raise DomainError(
                self._mismatch(f"{spec.path} has rank {leaf.dim()} where ({shape}) is expected")
            )
        if leaf.dtype != spec.dtype:
            raise DomainError(
                self._mismatch(f"{spec.path} is {leaf.dtype} where {spec.dtype} is expected")
            )

    def _check_domain(self, sizes: Mapping[str, int]) -> None:
        for region in self.interface.domain.regions:
            if all(self._holds(condition.fact, sizes) for condition in region.conditions):
                return
        given = ", ".join(f"{name} = {size}" for name, size in sorted(sizes.items()))
        regions = "; ".join(map(str, self.interface.domain.regions))
        lines = [
            c.where
            for region in self.interface.domain.regions
            for c in region.conditions
            if c.where
        ]
        raise DomainError(
            Refusal(
                f"A call with {given} is outside the domain.",
                why=f"The graph was shown to equal the model where: {regions}.",
                remedy="Call inside the domain, or rewrite with examples of these sizes.",
                where=lines[0] if lines else None,
            )
        )

    def _wrong_size(self, spec: TensorSpec, axis: int, size: int, expected: str) -> Refusal:
        shape = ", ".join(map(str, spec.shape))
        return self._mismatch(
            f"{spec.path} has size {size} on axis {axis} where {expected} is expected; its shape is ({shape})"
        )

    def _mismatch(self, what: str) -> Refusal:
        text = what.replace("['", "", 1).replace("']", "", 1) if what.startswith("['") else what
        return Refusal(
            f"{text}.",
            why="The graph was captured for arguments of one structure, and was shown to equal the model for these.",
            remedy="Call it as the model was called in example_inputs, or rewrite again with such inputs.",
        )

    def _value(self, expr: Any, sizes: Mapping[str, int]) -> Any:
        if not isinstance(expr, sympy.Basic):
            return expr
        functions = self.calling.functions
        if expr not in functions:
            functions[expr] = compiled(expr)
        return functions[expr](sizes)

    def _holds(self, fact: Any, sizes: Mapping[str, int]) -> bool:
        return bool(fact is True or fact == sympy.true or self._value(fact, sizes))

    # The neutral cache.

    def _neutral_tensor(
        self, spec: TensorSpec, sizes: Mapping[str, int], leaves: Sequence[Any]
    ) -> torch.Tensor:
        device = next(
            (
                leaf.device
                for leaf in leaves
                if isinstance(leaf, torch.Tensor) and leaf is not _NEUTRAL
            ),
            self._device(),
        )
        return self._neutral(spec, sizes, device, None)

    def _neutral(
        self,
        spec: TensorSpec,
        sizes: Mapping[str, int],
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> torch.Tensor:
        kind = dtype if dtype is not None and spec.dtype.is_floating_point else spec.dtype
        return torch.zeros(
            [self._value(size, sizes) for size in spec.shape], dtype=kind, device=device
        )

    def _device(self) -> torch.device:
        for tensor in (*self.parameters(), *self.buffers()):
            return tensor.device
        return torch.device("cpu")

    # Being a good module.

    def _refresh(self) -> None:
        origin: Origin | None = self.__dict__["_origin"]
        if _is_tracing():
            return
        if self.training and self.calling.mode_matters:
            raise DomainError(
                Refusal(
                    "The rewritten model was called in training mode.",
                    why=f"The graph was captured in evaluation mode, and {self.calling.mode_matters}.",
                    remedy="Call rewritten.eval().",
                )
            )
        if origin is not None and origin.has_changed():
            fresh = origin.again()
            self.interface, self.calling, self.report = fresh.interface, fresh.calling, fresh.report
            self.__dict__["_origin"] = fresh.__dict__["_origin"]
            training = self.training
            self._share(fresh.graph_module)
            self.train(training)

    def __getstate__(self) -> dict[str, Any]:
        graph_module = self.graph_module
        state = {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("_graph_module", "_origin")
        }
        return {**state, "_copied": graph_module}

    def __setstate__(self, state: dict[str, Any]) -> None:
        copied = state.pop("_copied")
        self.__dict__.update(state)
        self.__dict__["_origin"] = None
        holder = nn.Module()
        holder.__dict__.update(
            {
                "_modules": self.__dict__["_modules"],
                "_parameters": self.__dict__["_parameters"],
                "_buffers": self.__dict__["_buffers"],
            }
        )
        self._share(assemble(copied.graph, mirror(holder), _constants(copied)))


@dataclass
class Origin:
    """The model that a graph came from, to notice when it changes.

    Attributes:
        model: The model.
        again: Rewrites it again.
        watched: Dictionaries of children with the identities that they had.
        types: The dtypes of all parameters and buffers.
    """

    model: nn.Module
    again: Callable[[], Rewritten]
    watched: list[tuple[dict[str, Any], tuple[int, ...]]]
    types: list[tuple[dict[str, Any], tuple[Any, ...]]]

    @classmethod
    def of(cls, model: nn.Module, again: Callable[[], Rewritten]) -> Origin:
        """Watches a model."""
        watched, types = [], []
        for module in model.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                watched.append((hooks, tuple(map(id, hooks.values()))))  # type: ignore[arg-type]
            if module._modules:
                watched.append((module._modules, tuple(map(id, module._modules.values()))))
            for tensors in (module._parameters, module._buffers):
                if tensors:
                    types.append((tensors, tuple(map(_type_of, tensors.values()))))
        return cls(model, again, watched, types)

    def has_changed(self) -> bool:
        """Whether a submodule was replaced, or a parameter has another dtype or class."""
        return any(
            tuple(map(id, children.values())) != ids for children, ids in self.watched
        ) or any(tuple(map(_type_of, tensors.values())) != types for tensors, types in self.types)


def _type_of(tensor: Any) -> Any:
    return None if tensor is None else (tensor.dtype, type(tensor), tensor.shape)


_NEUTRAL: Any = torch.empty(
    0, device="meta"
)  # stands for a leaf of the neutral cache until the sizes are known


def _is_tracing() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _inside(value: Any, steps: tuple[Any, ...]) -> Any:
    for step in steps:
        if isinstance(value, Mapping) and step not in value:
            return None
        value = None if value is None else value[step]
    return value


def _with(container: Any, steps: tuple[Any, ...], value: Any) -> Any:
    """A copy of nested containers with another entry."""
    if not steps:
        return value
    if isinstance(container, tuple):
        parts = list(container)
        parts[steps[0]] = _with(parts[steps[0]], steps[1:], value)
        return tuple(parts)
    copied = container.copy()
    copied[steps[0]] = _with(
        container.get(steps[0]) if isinstance(container, Mapping) else container[steps[0]],
        steps[1:],
        value,
    )
    return copied


def _is_empty(value: Any) -> bool:
    if value is None:
        return True
    if isinstance(value, torch.Tensor):
        return value.dim() == 1 and value.shape[0] == 0
    if isinstance(value, (tuple, list)):
        return all(_is_empty(part) for part in value)
    return isinstance(value, Mapping) and not value


def _constants(graph_module: fx.GraphModule) -> dict[str, torch.Tensor]:
    holder = graph_module._modules.get("_constants")
    return dict(holder.named_buffers()) if holder is not None else {}
