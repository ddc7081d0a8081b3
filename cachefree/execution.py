"""How a graph module runs: operators and parameters at hand, with as little Python as can be."""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.graph import _format_target

__all__ = ["make_quick"]

aten = torch.ops.aten


def make_quick(module: fx.GraphModule) -> None:
    """Lets a graph module use its operators and parameters without looking each up by its name.

    ``torch.jit.trace`` sees sizes: operators that are called by overload take plain numbers. An
    error that an operator raises tells the user's line.
    """
    cls: Any = type(module)
    run, quick = cls.forward, _bound(cls.forward, module)

    @functools.wraps(run)
    def forward(self: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return _Traced(self).run(*args)
        if self is not origin() or torch.compiler.is_compiling():
            return run(self, *args, **kwargs)
        try:
            return quick(self, *args, **kwargs)
        except KeyError:  # a parameter became something else, such as a buffer
            return run(self, *args, **kwargs)
        except Exception as error:
            where = _line_of(error, quick, self)
            if where is not None:
                error.add_note(f"raised in the model's code:\n  {where}")
            raise

    origin = weakref.ref(module)
    cls.forward = forward


def _line_of(error: Exception, quick: Any, module: fx.GraphModule) -> str | None:
    """The user's line of the operator that raised an error, where it is known."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code is not quick.__code__:
        trace = trace.tb_next
    if trace is None:
        return None
    name = module.code.splitlines()[trace.tb_lineno - 1].partition(" = ")[0].strip()
    node = next((node for node in module.graph.nodes if node.name == name), None)
    return None if node is None else node.stack_trace


_OVERLOAD = re.compile(r"(?<= = )torch\.ops\.aten\.(\w+)\.(\w+)(?=\()")
_ATTRIBUTE = re.compile(r"(?<= = )(self\.[^;\n]+|getattr\(self[^;\n]+)(?=;|$)", re.MULTILINE)


def _bound(run: Callable[..., Any], module: fx.GraphModule) -> Callable[..., Any]:
    """The generated code with operators, and the dicts of parameters, under names of their own.

    Args:
        run: The function that was generated.
        module: Of what.
    """
    code = module.code
    own: dict[str, Any] = {}
    values = set(re.findall(r"\w+", code))
    held = _held_by_text(module)

    def named(text: str, value: Any) -> str:
        while text in values:
            text = f"_{text}"
        own[text] = value
        return text

    def operator(match: re.Match[str]) -> str:
        # what calling the overload calls
        overload = getattr(getattr(aten, match[1]), match[2])
        return named(f"_{match[1]}_{match[2]}", overload._op)

    def parameter(match: re.Match[str]) -> str:
        if match[1] not in held:
            return match[1]
        holder, name = held[match[1]]
        return f"{named(f'_held_{id(holder)}', holder)}[{name!r}]"

    names = {**run.__globals__}
    exec(_ATTRIBUTE.sub(parameter, _OVERLOAD.sub(operator, code)), names)  # what torch.fx generated
    names.update(own)
    bound: Callable[..., Any] = names["forward"]
    return bound


def _held_by_text(module: fx.GraphModule) -> dict[str, tuple[dict[str, Any], str]]:
    """How the generated code reads each parameter and buffer, with the dict that holds it."""
    found = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            owner = module.get_submodule(path)
            for holder in (owner._parameters, owner._buffers):
                if name in holder:
                    found[_format_target("self", str(node.target))] = (holder, name)
    return found


class _Traced(fx.Interpreter):
    """Runs a graph by Python's bindings, whose arguments ``torch.jit.trace`` records."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in _EXTREMES and any(isinstance(arg, torch.Tensor) for arg in args):
            return _EXTREMES[target](*map(torch.as_tensor, args))
        if target in _TURNED:  # which no TorchScript exporter knows by these names
            turned = args[0].transpose(-2, -1)
            return turned.conj() if target in _CONJUGATED and turned.is_complex() else turned
        if not isinstance(target, torch._ops.OpOverload) or not _takes_traced_sizes(target, args):
            return super().call_function(target, args, kwargs)
        if target is aten.slice.Tensor:
            source, dim, *bounds = args
            index = [slice(None)] * source.dim()
            index[dim] = slice(*bounds)
            return source[tuple(index)]
        name = target._schema.name.removeprefix("aten::")
        function = getattr(torch, name, None) or getattr(torch.Tensor, name)
        return function(*args, **kwargs)


_CONJUGATED = (aten.mH.default, aten.adjoint.default)
_TURNED = (aten.mT.default, *_CONJUGATED)
_EXTREMES: dict[Any, Any] = {torch.sym_max: torch.maximum, torch.sym_min: torch.minimum}


def _takes_traced_sizes(target: torch._ops.OpOverload, args: tuple[Any, ...]) -> bool:
    """Whether a number among the arguments is a tensor, as sizes are while they are traced."""
    for argument, value in zip(target._schema.arguments, args, strict=False):
        values = value if isinstance(value, (tuple, list)) else (value,)
        if "Tensor" not in str(argument.type) and any(isinstance(v, torch.Tensor) for v in values):
            return True
    return False
