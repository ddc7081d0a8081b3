"""Mutants of the laws and of the checker: a change in one function, which the tests have to notice.

``python -m tests.fuzz.source_mutants 100`` draws a hundred, runs on each the tests of the laws of
that file (or those of certificates), and prints what survives. A child process each: the code of
the changed functions is put into the loaded module.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import importlib
import os
import random
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LAWS = (
    "attention", "hiding", "identity", "join", "linear", "masks", "padding", "scan", "scatter",
    "sequence", "shape", "tables", "zero_signs", "zeros",
)  # fmt: skip
CHECKER = ("numbers", "replay", "shapes", "sizes", "terms")
LIMIT = 90
"""Seconds after which a mutant that has not ended counts as noticed."""

_OTHER: dict[type[ast.AST], type[ast.AST]] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE,
    ast.GtE: ast.Gt, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.And: ast.Or, ast.Or: ast.And, ast.Add: ast.Sub, ast.Sub: ast.Add,
}  # fmt: skip


def changes(node: ast.AST) -> Iterator[tuple[str, Callable[[], None]]]:
    """Each change of one node, in words, and what makes it."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _OTHER:
        other = _OTHER[type(node.ops[0])]()
        yield "another comparison", lambda: node.ops.__setitem__(0, other)  # type: ignore[call-overload]
    if isinstance(node, ast.BoolOp):
        yield "and for or", lambda: setattr(node, "op", _OTHER[type(node.op)]())
        for place in range(len(node.values)):
            yield f"without condition {place}", lambda p=place: node.values.pop(p)  # type: ignore[misc]
    if isinstance(node, ast.BinOp) and type(node.op) in _OTHER:
        yield "plus for minus", lambda: setattr(node, "op", _OTHER[type(node.op)]())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "without not", lambda: setattr(node, "op", ast.UAdd()) or _plain(node)
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield "one more", lambda: setattr(node, "value", node.value + 1)  # type: ignore[operator]
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        yield "not so", lambda: setattr(node, "value", not node.value)
    if isinstance(node, ast.If):
        yield "never", lambda: setattr(node, "test", ast.Constant(value=False))
    if (
        isinstance(node, ast.Call)
        and len(node.args) > 1
        and not isinstance(node.args[1], ast.Starred)
    ):
        yield "arguments swapped", lambda: node.args.__setitem__(slice(0, 2), node.args[1::-1])
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("all", "any"):
        name = {"all": "any", "any": "all"}[node.func.id]  # type: ignore[attr-defined]
        yield "all for any", lambda: setattr(node.func, "id", name)


def _plain(node: ast.UnaryOp) -> None:
    """``not x`` as ``bool(x)``."""
    node.op = ast.Not()
    node.operand = ast.UnaryOp(op=ast.Not(), operand=node.operand)


def sites(tree: ast.Module) -> Iterator[tuple[int, int, int, str]]:
    """Places of changes inside of functions: number of the node, of the change, line, words."""
    inside: set[int] = set()
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            inside.update(id(n) for statement in function.body for n in ast.walk(statement))
    for number, node in enumerate(ast.walk(tree)):
        if id(node) in inside:
            for which, (words, _) in enumerate(changes(node)):
                yield number, which, getattr(node, "lineno", 0), words


def changed(source: str, number: int, which: int) -> ast.Module:
    """The source with one change."""
    tree = ast.parse(source)
    node = list(ast.walk(tree))[number]
    list(changes(node))[which][1]()
    return ast.fix_missing_locations(tree)


def put_in(module: types.ModuleType, tree: ast.Module) -> None:
    """Gives the functions of a loaded module the code that they have in a tree."""
    codes = _codes(compile(tree, module.__file__ or "", "exec"))
    seen: set[int] = set()
    for holder in (module, *(v for v in vars(module).values() if isinstance(v, type))):
        for value in vars(holder).values():
            function = getattr(value, "__func__", getattr(value, "fget", value))
            function = getattr(function, "__wrapped__", function)
            if isinstance(function, types.FunctionType) and id(function) not in seen:
                seen.add(id(function))
                if function.__module__ == module.__name__ and function.__qualname__ in codes:
                    function.__code__ = codes[function.__qualname__]


def _codes(code: types.CodeType) -> dict[str, types.CodeType]:
    found = {}
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            found[part.co_qualname] = part
            found.update(_codes(part))
    return found


def tests_of_laws(name: str) -> list[Callable[[], None]]:
    """Near misses first: they take no time."""
    from tests.laws import test_laws as tests
    from tests.laws.equations import fires_and_holds

    parts = vars(importlib.import_module(f"cachefree.laws.{name}")).values()
    own = {getattr(law, "name", "") for part in parts if isinstance(part, tuple) for law in part}
    laws = [law for law in tests.TRIED if law in own]

    def near(law: str, instance: Any) -> None:
        tests.test_law_leaves_a_near_miss_alone(law, instance)

    found = [(near, law, i) for law in laws for i in tests.TRIED[law].near_misses]
    found += [(fires_and_holds, law, i) for law in laws for i in tests.TRIED[law].applies]
    return [lambda t=test, law=law, i=i: t(law, i) for test, law, i in found]  # type: ignore[misc]


def tests_of_certificates() -> list[Callable[[], None]]:
    """What the tests of certificates ask, of one certificate and of some that have to hold."""
    import cachefree
    from tests import test_certificate as tests
    from tests.models import CASES
    from tests.small import rewritten_small, small

    rewritten = rewritten_small(small())
    content = tests.minimal(rewritten.certificate.content)
    wholes = [rewritten.certificate.content]
    for case in CASES:
        if case.name in tests.REPLAYED:
            one = cachefree.rewrite(case.build(), case.example_inputs, **case.rewrite_options)
            wholes.append(one.certificate.content)

    def hold() -> None:
        assert all(tests.holds(whole) for whole in (content, *wholes))

    def facts() -> None:
        for fact, holds in tests.FACTS:
            tests.test_facts_about_sizes_are_decided(fact, holds)
        tests.test_nothing_is_shown_where_elimination_gives_up()

    asked = [
        tests.test_every_step_of_a_minimal_certificate_is_needed,
        tests.test_no_step_passes_for_one_of_another_law,
        tests.test_no_step_is_trusted_that_can_be_replayed,
        tests.test_no_step_leads_elsewhere,
    ]
    found: list[Callable[[], None]] = [hold, facts]
    found += [lambda t=test: t(content) for test in asked]  # type: ignore[misc]
    found += [
        lambda c=change: tests.test_no_claim_can_be_changed(content, c)  # type: ignore[misc]
        for change in tests.CHANGES.values()
    ]
    return [*found, lambda: tests.test_no_term_can_be_changed(content, rewritten)]


def is_noticed(module: types.ModuleType, tree: ast.Module, tests: list[Callable[[], None]]) -> bool:
    """Whether a test fails on a mutant, in a process of its own."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            signal.alarm(LIMIT)
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            put_in(module, tree)
            for test in tests:
                test()
            os._exit(0)
        os._exit(1)
    return os.waitpid(child, 0)[1] != 0


def main(arguments: list[str] | None = None) -> int:
    """Draws mutants and prints those that no test notices."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz.source_mutants", description=__doc__
    )
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="when to stop")
    parser.add_argument("--of", choices=("laws", "checker", "both"), default="both")
    parser.add_argument("--file", help="one of these files alone, without its folder")
    given = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    names = [f"cachefree.laws.{name}" for name in LAWS] if given.of != "checker" else []
    names += [f"cachefree.checker.{name}" for name in CHECKER] if given.of != "laws" else []
    drawn = []
    if given.file is not None:
        names = [name for name in names if name.endswith(f".{given.file}")]
    for name in names:
        module = importlib.import_module(name)
        source = Path(module.__file__ or "").read_text()
        drawn += [(module, source, site) for site in sites(ast.parse(source))]
    random.Random(given.seed).shuffle(drawn)
    tests: dict[str, list[Callable[[], None]]] = {}
    counts: collections.Counter[tuple[str, bool]] = collections.Counter()
    began = time.monotonic()
    for module, source, (number, which, line, words) in drawn[: given.count]:
        if time.monotonic() - began > 60 * given.minutes:
            break
        room, name = module.__name__.split(".")[1:]
        if room == "laws" and name not in tests:
            tests[name] = tests_of_laws(name)
        elif room == "checker" and room not in tests:
            tests[room] = tests_of_certificates()
        asked = tests[name] if room == "laws" else tests["checker"]
        noticed = is_noticed(module, changed(source, number, which), asked)
        counts[room, noticed] += 1
        if not noticed:
            text = source.splitlines()[line - 1].strip()
            print(f"{module.__name__}:{line}: {words}: {text}", flush=True)
    for room in sorted({room for room, _ in counts}):
        killed, alive = counts[room, True], counts[room, False]
        print(f"{room}: {killed + alive} mutants, {killed} noticed, {alive} not")
    print(f"seed {given.seed}, {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
