"""Scripted functions: run as the Python that they were written in, or refused by name.

TorchScript runs without Python: it takes sizes as plain numbers, and what it asks about them is
not heard. ``torch.jit.script`` keeps the function that it compiled, so that this runs in its place
while a model is looked at, where the two can only mean the same.
"""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import torch

from cachefree.errors import Refusal, SourceLine
from cachefree.sizes import is_users

__all__ = ["of_a_script", "run_as_written", "scripted_at"]

_ScriptFunction = torch.jit.ScriptFunction
_MEANS_ANOTHER = frozenset(("jit", "is_scripting", "is_tracing", "compiler", "isinstance", "type"))
_NUMBERS = {
    "IntType": (int, torch.SymInt),
    "FloatType": (float, torch.SymFloat),
    "BoolType": (bool, torch.SymBool),
    "StringType": (str,),
    "TensorType": (torch.Tensor,),
    "NoneType": (type(None),),
}


@contextlib.contextmanager
def run_as_written() -> Iterator[None]:
    """Within the block this thread runs the Python of scripted functions in their place."""
    thread, compiled = threading.get_ident(), _ScriptFunction.__call__
    written: dict[Any, FunctionType | None] = {}

    def call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread:
            if self not in written:
                written[self] = _written(self)
            function = written[self]
            if function is not None:
                given = _given(self.schema, args, kwargs)
                if given is not None:
                    return _returned(self.schema.returns[0].type, function(**given))
        return compiled(self, *args, **kwargs)

    _ScriptFunction.__call__ = call  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        _ScriptFunction.__call__ = compiled  # type: ignore[method-assign]


def _written(script: Any) -> FunctionType | None:
    """The Python of a scripted function; None where it may mean something else by now.

    That is where its code may ask what it runs as, and where what was compiled stands in lines of
    other functions than those that the names in it stand for now.
    """
    function = getattr(script, "_torchdynamo_inline", None)
    codes = _codes(function) if isinstance(function, FunctionType) else None
    if codes is None:
        return None
    lines = {(code.co_filename, line) for code in codes for line in _lines(code)}
    compiled = re.findall(r"# (.*):(\d+):\d+$", str(script.inlined_graph), re.MULTILINE)
    # some of TorchScript's own functions are compiled of text; a user's must have a file
    own = {(file, int(line)) for file, line in compiled if is_users(file) and file != "<string>"}
    return function if own <= lines else None


def _lines(code: CodeType) -> range:
    """The lines of a file that a function stands in."""
    last = max(line for _, _, line in code.co_lines() if line is not None)
    return range(code.co_firstlineno, last + 1)


def _codes(function: FunctionType) -> set[CodeType] | None:
    """The user's code that a function runs; None where it may ask what it runs as."""
    seen: set[CodeType] = set()
    waiting = [function]
    while waiting:
        function = waiting.pop()
        codes = [function.__code__]
        while codes:
            code = codes.pop()
            if code in seen:
                continue
            seen.add(code)
            if _MEANS_ANOTHER & {*code.co_names}:
                return None
            codes += [part for part in code.co_consts if isinstance(part, CodeType)]
            called = (function.__globals__.get(name) for name in code.co_names)
            waiting += [part for part in map(_python_of, called) if part is not None]
    return seen


def _python_of(value: Any) -> FunctionType | None:
    """The user's function that a name stands for, scripted or not."""
    if isinstance(value, _ScriptFunction):
        value = getattr(value, "_torchdynamo_inline", None)
    if isinstance(value, FunctionType) and is_users(value.__code__.co_filename):
        return value
    return None


def _given(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments by name, as TorchScript converts them; None where it is not plain how."""
    named = {**dict(zip((part.name for part in schema.arguments), args, strict=False)), **kwargs}
    if len(named) != len(args) + len(kwargs):
        return None
    found = {}
    for part in schema.arguments:
        if part.name in named:
            try:
                found[part.name] = _converted(part.type, named.pop(part.name))
            except TypeError:
                return None
        elif not part.has_default_value():
            return None
    return None if named else found


def _converted(kind: Any, value: Any) -> Any:
    name = kind.kind()
    if name == "OptionalType":
        return None if value is None else _converted(kind.getElementType(), value)
    if name == "ListType" and isinstance(value, (list, tuple)):
        return [_converted(kind.getElementType(), part) for part in value]
    if name == "TupleType" and isinstance(value, tuple):
        kinds = kind.elements()
        if len(kinds) == len(value):
            return tuple(map(_converted, kinds, value))
    if name == "FloatType" and type(value) in _NUMBERS["IntType"]:
        return torch.sym_float(value)
    if type(value) in _NUMBERS.get(name, ()) or (
        name == "TensorType" and isinstance(value, torch.Tensor)
    ):
        return value
    raise TypeError(f"{type(value)} as {kind}")


def _returned(kind: Any, value: Any) -> Any:
    """What TorchScript gives back: a list where Python has a ``torch.Size``."""
    if kind.kind() == "ListType" and isinstance(value, tuple):
        return list(value)
    if kind.kind() == "TupleType" and type(value) is tuple:
        return tuple(map(_returned, kind.elements(), value))
    return value


def scripted_at(where: SourceLine | None) -> str | None:
    """The scripted function of a module that a line of it names."""
    if where is None:
        return None
    homes = [m for m in list(sys.modules.values()) if getattr(m, "__file__", None) == where.file]
    for name in re.findall(r"[^\W\d]\w*", where.text):
        if any(isinstance(vars(home).get(name), _ScriptFunction) for home in homes):
            return str(name)
    return None


def of_a_script(function: str, met: str, where: SourceLine | None) -> Refusal:
    """What is said of a scripted function that cannot be captured."""
    return Refusal(
        f"The scripted function {function!r} cannot be captured.",
        why=f"{met} TorchScript takes sizes as plain numbers, and what it asks about them and "
        "about values cannot be heard.",
        remedy="Call the Python function, without torch.jit.script. The one graph can be traced: "
        'torch.jit.trace(rewritten.graph_module, **rewritten.export_args("trace", flat=True)).',
        where=where,
    )
