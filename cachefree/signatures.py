"""What a model takes, where its ``forward`` says no more than ``*args, **kwargs``."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

__all__ = ["signature_of"]

_Parameters = dict[str, inspect.Parameter]


def signature_of(model: nn.Module) -> inspect.Signature:
    """The signature of a model's ``forward``, with what stands behind ``*args`` and ``**kwargs``.

    Where they are handed to a submodule, these are the submodule's parameters; where ``kwargs`` is
    asked for names, these names.
    """
    compiled = getattr(model, "_orig_mod", None)  # what torch.compile wraps
    if isinstance(compiled, nn.Module):
        return signature_of(compiled)
    return _signature(model.forward, model)


def _signature(forward: Callable[..., Any], model: nn.Module) -> inspect.Signature:
    signature = inspect.signature(forward)
    own = signature.parameters
    rest = next((p.name for p in own.values() if p.kind is p.VAR_KEYWORD), None)
    if rest is None:
        return signature
    tree = _tree(forward)
    found = {name: p for name, p in own.items() if p.kind is not p.VAR_KEYWORD}
    for module, call in _handed_on(tree, rest, model):
        inner = _signature(module.forward, module).parameters
        several = [p for p in found.values() if p.kind is p.VAR_POSITIONAL]
        is_all = bool(several) and any(isinstance(arg, ast.Starred) for arg in call.args)
        given = {keyword.arg for keyword in call.keywords if keyword.arg}
        given |= set(list(inner)[: sum(not isinstance(a, ast.Starred) for a in call.args)])
        if is_all:
            found = {name: p for name, p in found.items() if p not in several}
        for name, parameter in inner.items():
            if name not in given and name not in found:
                found[name] = _passed(parameter, is_all)
    for name, is_needed in _asked_for(tree, rest):
        default = inspect.Parameter.empty if is_needed else None
        found.setdefault(
            name, inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        )
    found.setdefault(rest, own[rest])
    return _ordered(signature, found)


def _passed(parameter: inspect.Parameter, is_all: bool) -> inspect.Parameter:
    """A submodule's parameter as one of the model's: by keyword, unless positions go through."""
    by_position = parameter.kind in (
        parameter.POSITIONAL_ONLY,
        parameter.POSITIONAL_OR_KEYWORD,
    )
    if by_position and not is_all:
        return parameter.replace(kind=parameter.KEYWORD_ONLY)
    return parameter


def _ordered(signature: inspect.Signature, found: _Parameters) -> inspect.Signature:
    """The parameters in the order that Python asks for; as it was where there is none."""
    ordered = sorted(found.values(), key=lambda parameter: parameter.kind)
    try:
        return signature.replace(parameters=ordered)
    except ValueError:
        return signature


def _tree(forward: Callable[..., Any]) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return ast.Module([], [])


def _handed_on(tree: ast.AST, rest: str, model: nn.Module) -> Iterator[tuple[nn.Module, ast.Call]]:
    """The submodules that are called with all keyword arguments, and the calls."""
    arguments = next((n.args.args for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)), [])
    own = arguments[0].arg if arguments else "self"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and any(
            keyword.arg is None and isinstance(keyword.value, ast.Name) and keyword.value.id == rest
            for keyword in node.keywords
        ):
            module = _submodule(node.func, model, own)
            if isinstance(module, nn.Module) and module is not model:
                yield module, node


def _submodule(function: ast.expr, model: nn.Module, own: str) -> Any:
    """What ``self.a.b`` (or ``self.a.b.forward``) is; ``own`` is how the code calls ``self``."""
    if isinstance(function, ast.Name):
        return model if function.id == own else None
    if not isinstance(function, ast.Attribute):
        return None
    above = _submodule(function.value, model, own)
    if function.attr == "forward":
        return above
    return getattr(above, function.attr, None) if isinstance(above, nn.Module) else None


def _asked_for(tree: ast.AST, rest: str) -> Iterator[tuple[str, bool]]:
    """The names that the keyword arguments are asked for, and whether they have to be there."""
    for node in ast.walk(tree):
        key: Any = None
        is_needed = False
        if isinstance(node, ast.Subscript) and _is_name(node.value, rest):
            key, is_needed = node.slice, isinstance(node.ctx, ast.Load)
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and _is_name(node.func.value, rest)
            and node.func.attr in ("get", "pop", "setdefault")
            and node.args
        ):
            key = node.args[0]
        elif isinstance(node, ast.Compare) and _is_name(node.comparators[0], rest):
            key = node.left
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            yield key.value, is_needed


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name
