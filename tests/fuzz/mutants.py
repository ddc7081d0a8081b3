"""Wrong siblings of the test models: one change in the source of one model's classes.

A change is made everywhere, or only on one path: where a name that carries the cache is None or
not.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.util
import inspect
import itertools
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tests import models as zoo
from tests.models.case import ModelCase

from .oracle import Outcome, Subject, judge

__all__ = ["Mutant", "judge_mutant", "mutant", "mutations"]


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A changed model.

    Attributes:
      case: The name of the test model.
      home: The file of its class, below ``tests/models``.
      change: What was changed, with its line.
      source: The whole file after the change.
    """

    case: str
    home: str
    change: str
    source: str

    def __str__(self) -> str:
        return f"{self.home}:{self.case}: {self.change}"


def _homes() -> dict[str, ModuleType]:
    """The files of test models that have cases of their own, by name."""
    return {
        name: module
        for name, module in sorted(vars(zoo).items())
        if isinstance(module, ModuleType) and getattr(module, "CASES", ())
    }


def mutant(seed: int) -> Mutant:
    """The mutant of a seed."""
    draw = random.Random(seed)
    homes = _homes()
    while True:
        home = draw.choice(list(homes))
        case = draw.choice([c for c in homes[home].CASES if not c.may_refuse and c.device == "cpu"])
        source = inspect.getsource(homes[home])
        tree = ast.parse(source)
        found = mutations(tree, _class_names(case))
        if not found:
            continue
        node, change, text, names = draw.choice(found)
        changed = _with_path(draw, node, change, names)
        before = ast.unparse(node)
        result = ast.unparse(_Replace(node, changed).visit(tree))
        line = getattr(node, "lineno", 0)
        return Mutant(
            case.name, home, f"line {line}, {text}: {before} → {ast.unparse(changed)}", result
        )


def _class_names(case: ModelCase) -> set[str]:
    model = case.build()
    kinds = {type(module) for module in model.modules()}
    return {base.__name__ for kind in kinds for base in kind.__mro__}


def mutations(
    tree: ast.Module, classes: set[str]
) -> list[tuple[ast.expr, ast.expr, str, tuple[str, ...]]]:
    """All changes of expressions in the methods of these classes, and in the file's functions."""
    found: list[tuple[ast.expr, ast.expr, str, tuple[str, ...]]] = []
    for top in tree.body:
        if isinstance(top, ast.ClassDef) and top.name in classes:
            methods = [m for m in top.body if isinstance(m, ast.FunctionDef)]
            places = [m for m in methods if m.name != "__init__"]
        elif isinstance(top, ast.FunctionDef) and not _builds(top):
            places = [top]
        else:
            continue
        for place in places:
            names = _names(place)
            for node in itertools.chain.from_iterable(map(ast.walk, place.body)):
                found += [(node, change, text, names) for change, text in _changes(node)]
    return found


def _builds(function: ast.FunctionDef) -> bool:
    """Whether a function draws inputs or builds a case, and is no part of a model."""
    names = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
    arguments = {argument.arg for argument in function.args.args}
    return bool(
        names & {"seeded", "ModelCase", "generator"} or arguments & {"generator", "outputs"}
    )


_OPERATORS: dict[type, tuple[type, ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div, ast.Add),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mod,),
    ast.Mod: (ast.FloorDiv,),
}
_COMPARISONS: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq, ast.GtE),
    ast.NotEq: (ast.Eq,),
}
_TWINS = {
    "cos": "sin",
    "sin": "cos",
    "zeros": "ones",
    "ones": "zeros",
    "tril": "triu",
    "triu": "tril",
    "softmax": "log_softmax",
    "relu": "gelu",
    "gelu": "relu",
    "max": "min",
    "min": "max",
    "cumsum": "cumprod",
    "exp": "sigmoid",
    "float": "half",
    "sum": "mean",
    "mean": "sum",
    "maximum": "minimum",
}


def _changes(node: ast.AST) -> Iterator[tuple[ast.expr, str]]:
    """The changes of one expression."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        for value in _other_numbers(node.value):
            yield ast.Constant(value), "constant"
    elif isinstance(node, ast.BinOp):
        for operator in _OPERATORS.get(type(node.op), ()):
            yield ast.BinOp(node.left, operator(), node.right), "operator"
        if isinstance(node.op, (ast.Sub, ast.Add)):
            yield ast.BinOp(node, ast.Add(), ast.Constant(1)), "off by one"
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        for comparison in _COMPARISONS.get(type(node.ops[0]), ()):
            yield ast.Compare(node.left, [comparison()], node.comparators), "comparison"
    elif isinstance(node, ast.Call):
        yield from _other_calls(node)
    elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute):
        if node.value.attr == "shape" and isinstance(node.ctx, ast.Load):
            yield ast.BinOp(node, ast.Add(), ast.Constant(1)), "size + 1"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        yield node.operand, "not inverted"


def _other_numbers(value: float) -> tuple[float, ...]:
    if isinstance(value, int):
        return (value + 1, value - 1)
    return (value * 1.5, -value) if value else (0.5,)


def _other_calls(node: ast.Call) -> Iterator[tuple[ast.expr, str]]:
    function = node.func
    if isinstance(function, ast.Attribute) and function.attr in _TWINS:
        twin = ast.Attribute(function.value, _TWINS[function.attr], ast.Load())
        yield ast.Call(twin, node.args, node.keywords), "function"
    if (
        node.args
        and isinstance(node.args[0], (ast.Tuple, ast.List))
        and len(node.args[0].elts) == 2
    ):
        turned = type(node.args[0])(node.args[0].elts[::-1], ast.Load())
        yield ast.Call(function, [turned, *node.args[1:]], node.keywords), "order"
    if isinstance(function, ast.Attribute) and function.attr in (
        "masked_fill",
        "softmax",
        "matmul",
    ):
        yield ast.BinOp(node, ast.Mult(), ast.Constant(1.25)), "scale"
        yield ast.BinOp(node, ast.Add(), ast.Constant(0.25)), "bias"
    if isinstance(function, ast.Attribute) and function.attr == "cat":
        yield ast.BinOp(node, ast.Mult(), ast.Constant(1.25)), "scale"


_PATHS = re.compile("past|cache|mem|state|kv|history|prev|carry|buffer")


def _names(function: ast.FunctionDef) -> tuple[str, ...]:
    """The names in a function that may carry the cache."""
    names = {argument.arg for argument in function.args.args}
    names |= {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    return tuple(sorted(name for name in names if _PATHS.search(name)))


def _with_path(
    draw: random.Random, node: ast.expr, change: ast.expr, names: tuple[str, ...]
) -> ast.expr:
    """The change everywhere, on one path, or beyond a size."""
    kind = draw.choices(("everywhere", "path", "size"), (3, 3, 2))[0]
    if kind == "everywhere" or _is_in_pattern(node):
        return change
    if kind == "path" and names:
        name = draw.choice(names)
        test = f"fuzzed_absent(locals(), {name!r}) is {draw.choice(('True', 'False'))}"
    else:
        size = draw.choice((1, 6, 9, 12))
        axis = draw.choice((0, 1))
        operator = draw.choice(("==", ">", ">=")) if size > 1 else "=="
        test = f"fuzzed_size(locals(), {axis}) {operator} {size}"
    return ast.IfExp(ast.parse(test, mode="eval").body, change, node)


def _is_in_pattern(node: ast.expr) -> bool:
    return not isinstance(getattr(node, "ctx", ast.Load()), ast.Load)


_TOOLS = """

def fuzzed_absent(names, name):
    return names.get(name) is None


def fuzzed_size(names, axis):
    for value in names.values():
        if isinstance(value, torch.Tensor) and value.dim() > axis:
            return value.shape[axis]
    return 0
"""


def _with_tools(source: str) -> str:
    """The file with the functions that a change calls, before anything that may call them."""
    tree = ast.parse(source)
    plain = (ast.Import, ast.ImportFrom, ast.Expr)
    start = next(at for at, node in enumerate(tree.body) if not isinstance(node, plain))
    tree.body[start:start] = ast.parse(_TOOLS).body
    return ast.unparse(tree)


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        return self.new if node is self.old else self.generic_visit(node)


GRID: tuple[tuple[int, tuple[int, ...]], ...] = (
    (1, (1,) * 14),
    (2, (3, 1, 1, 6, 1)),
    (2, (1, 1, 12, 2)),
    (3, (8, 1, 2)),
    (5, (2, 4, 1)),
    (2, (13, 1, 1)),
    (1, (6, 2, 2, 2, 1)),
    (7, (2, 1)),
    (10, (2, 1)),
)


def judge_mutant(one: Mutant) -> Outcome:
    """Judges a mutant against itself."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{one.home}.py"
        file.write_text(_with_tools(one.source))
        with contextlib.ExitStack() as stack:
            try:
                module = stack.enter_context(_loaded(file, one.home))
            except Exception as error:  # noqa: BLE001 - such a file is no model
                return Outcome("invalid", str(error))
            case = next(case for case in module.CASES if case.name == one.case)
            return judge(_subject(case), GRID)


@contextlib.contextmanager
def _loaded(file: Path, home: str) -> Iterator[ModuleType]:
    name = f"{zoo.__name__}.{home}_changed"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[name]


def _subject(case: ModelCase) -> Subject:
    assert case.prefill is not None
    assert case.step is not None

    def call(
        outputs: Any, batch: int, past: int, query: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(7)
        if past == 0:
            return case.prefill(batch, query, generator)
        return case.step(outputs, batch, past, query, generator)

    return Subject(case.build, call, case.example_inputs, dict(case.rewrite_options))
