"""How a graph module runs: its operators called by overload, with as little Python as can be."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

__all__ = ["make_quick"]

aten = torch.ops.aten


def make_quick(module: fx.GraphModule) -> None:
    """Lets a graph module call its operators without looking each of them up by its name.

    ``torch.jit.trace`` sees sizes: operators that are called by overload take plain numbers.
    """
    cls: Any = type(module)
    run, quick = cls.forward, _bound(cls.forward, module.code)

    @functools.wraps(run)
    def forward(self: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return _Traced(self).run(*args)
        if torch.compiler.is_compiling():
            return run(self, *args, **kwargs)
        return quick(self, *args, **kwargs)

    cls.forward = forward


_OVERLOAD = re.compile(r"(?<= = )torch\.ops\.aten\.(\w+)\.(\w+)(?=\()")


def _bound(run: Callable[..., Any], code: str) -> Callable[..., Any]:
    """The generated code with each operator under a name of its own.

    Args:
        run: The function that was made of it.
        code: The code.
    """
    operators: dict[str, Any] = {}
    values = set(re.findall(r"\w+", code))

    def name(match: re.Match[str]) -> str:
        text = f"_{match[1]}_{match[2]}"
        while text in values:
            text = f"_{text}"
        # what calling the overload calls
        operators[text] = getattr(getattr(aten, match[1]), match[2])._op
        return text

    names = {**run.__globals__}
    exec(_OVERLOAD.sub(name, code), names)  # what torch.fx generated
    names.update(operators)
    bound: Callable[..., Any] = names["forward"]
    return bound


class _Traced(fx.Interpreter):
    """Runs a graph by Python's bindings, whose arguments ``torch.jit.trace`` records."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in _EXTREMES and any(isinstance(arg, torch.Tensor) for arg in args):
            return _EXTREMES[target](*map(torch.as_tensor, args))
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


_EXTREMES: dict[Any, Any] = {torch.sym_max: torch.maximum, torch.sym_min: torch.minimum}


def _takes_traced_sizes(target: torch._ops.OpOverload, args: tuple[Any, ...]) -> bool:
    """Whether a number among the arguments is a tensor, as sizes are while they are traced."""
    for argument, value in zip(target._schema.arguments, args, strict=False):
        values = value if isinstance(value, (tuple, list)) else (value,)
        if "Tensor" not in str(argument.type) and any(isinstance(v, torch.Tensor) for v in values):
            return True
    return False
