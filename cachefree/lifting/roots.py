"""Where a model can keep something between two calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn

from cachefree.lifting.contents import entries

__all__ = ["roots_of"]


def roots_of(model: nn.Module) -> dict[str, Any]:
    """The modules, and the containers that their hooks and methods hold in closures, by name.

    Args:
        model: Any module.

    Returns:
        Name → container: ``""`` for the model itself, the qualified names of its modules, and the
        names of the variables of closures.
    """
    roots: dict[str, Any] = dict(model.named_modules())
    seen = {id(root) for root in roots.values()}
    for module in list(roots.values()):
        for function in _functions(module):
            for name, value in _captured(function):
                if id(value) not in seen and _is_container(value):
                    seen.add(id(value))
                    roots[_unused(name, roots)] = value
    return roots


def _is_container(value: Any) -> bool:
    return not isinstance(value, nn.Module) and entries(value) is not None


def _unused(name: str, roots: dict[str, Any]) -> str:
    while name in roots:
        name += "_"
    return name


def _functions(module: nn.Module) -> Iterator[Callable[..., Any]]:
    yield from module._forward_hooks.values()
    yield from module._forward_pre_hooks.values()
    for value in vars(module).values():
        if callable(value) and not isinstance(value, (nn.Module, type)):
            yield value
    for cls in type(module).__mro__:
        if not cls.__module__.startswith("torch.") and cls is not object:
            yield from (value for value in vars(cls).values() if callable(value))


def _captured(function: Any, depth: int = 3) -> Iterator[tuple[str, Any]]:
    """What a function holds besides its arguments, by the names that its code gives it."""
    if depth == 0 or isinstance(function, type):
        return
    if isinstance(function, partial):
        named = {**{f"args{i}": part for i, part in enumerate(function.args)}, **function.keywords}
        yield from named.items()
        yield from _captured(function.func, depth - 1)
        return
    owner = getattr(function, "__self__", None)
    if owner is not None and not isinstance(owner, nn.Module):
        yield type(owner).__name__, owner
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    cells = getattr(function, "__closure__", None) or ()
    for name, cell in zip(code.co_freevars if code is not None else (), cells, strict=False):
        try:
            value = cell.cell_contents
        except ValueError:  # a variable that has no value yet
            continue
        yield name, value
        if callable(value) and not isinstance(value, nn.Module):
            yield from _captured(value, depth - 1)
    if code is None and callable(function) and hasattr(function, "__dict__"):
        yield type(function).__name__, vars(function)
