"""Imports point one way, and what belongs to others is named at the border only."""

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import cachefree

ROOT = Path(cachefree.__file__).parent

# Data flows down this list and imports point up it: a room may import from the rooms above its own
# line. Rooms on one line do not know each other. A new file needs a place here.
LINES: tuple[frozenset[str], ...] = tuple(
    frozenset(line.split())
    for line in (
        "errors structure settings dataflow signatures vocabulary progress recurrent offered",
        "cutting known_values glances padded_sizes",
        "looked_up collecting",
        "execution fakes checker sizes calls places fixed stand_ins token_scan",
        "alike token_places held_code value_questions scripted",
        "reach idle_draws",
        "recorders",
        "loop_values",
        "loops",
        "token_ranges token_slots loop_questions",
        "token_rows",
        "grown_rows",
        "remembered spelling provenance explaining memos",
        "surroundings baked held like_integers sameness other_sizes",
        "isolation spec terms faithful jumps origin copies",
        "call_checks exact_slices symbolic_python size_nodes fake_runs repeated_calls counted",
        "plain_results",
        "other_runs",
        "graph report facts capture placed_rows",
        "one_round",
        "scans",
        "randomness storages in_place inverse_views strided",
        "axes_in_place",
        "containers reading dimensions inputs laws doubled",
        "recipes thresholds",
        "first_only",
        "candidates trials normal example_sizes domains calling sampling",
        "units",
        "search size_facts",
        "size_answers",
        "later_call",
        "discover",
        "lifting refills unread_inputs",
        "align shapes preconditions results written",
        "regimes rules neutral",
        "common_sizes uniform_inputs beside",
        "encoder prefix_joins",
        "encoder_call",
        "write_once in_a_row",
        "starts",
        "one_token prefix tested",
        "start_rows",
        "stepped step_starts",
        "encoder_argument left_out outlines",
        "certify onnx branches",
        "assembly certificate proof steps kept rowless scale",
        "hoisted_domain",
        "hoisting request",
        "paths",
        "graphs",
        "summary",
        "rewritten advice",
        "explanation",
        "rewrite",
        "explain",
        "verify verification",
        "demo_model",
        "demo",
        "cli",
        "__main__",
    )
)
PLACE = {room: number for number, line in enumerate(LINES) for room in line}

# Which rooms may import a package that is neither the standard library nor torch, with the sympy
# that comes with it.
BORDER = {
    "hypothesis": {"verify", "verification"},
    "IPython": {"report"},
    "numpy": {"onnx", "verify", "verification"},
    "onnx": {"onnx"},
    "onnx_ir": {"onnx"},
    "onnxruntime": {"onnx", "verification"},
    "onnxscript": {"onnx"},
    "rich": {"cli", "report"},
    "tqdm": {"cli", "demo", "progress"},
    "transformers": {"cli", "containers", "inputs"},
    "z3": {"facts", "laws"},
}

# Names of architectures: a rule or a law that needs one has missed its mechanism.
ARCHITECTURES = re.compile(
    r"(?<![a-z])(gpt_?\d|gpt_?neo\w*|llama|mistral|mixtral|gemma|qwen|bloom|opt_?\d|bart|mbart|"
    r"whisper|t5|bert|falcon|phi_?\d|mamba|rwkv|chatglm|glm|musicgen|deepseek)(?![a-z])",
    re.IGNORECASE,
)
NAMES_ALLOWED_IN = {"demo", "demo_model", "cli"}


def room_of(path: Path) -> str:
    """The first part of a module's name below `cachefree`."""
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def sources() -> Iterator[tuple[str, Path, ast.Module]]:
    """Each file of the package, but for `cachefree/__init__.py`, which is the front door."""
    for path in sorted(ROOT.rglob("*.py")):
        if path != ROOT / "__init__.py":
            yield room_of(path), path, ast.parse(path.read_text(), str(path))


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """The absolute name and line of each import, wherever in the file it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module == "cachefree":
                yield from ((f"cachefree.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module, node.lineno


def rooms_imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """The rooms of this package that a file imports."""
    for name, line in imports(tree):
        package, _, rest = name.partition(".")
        if package == "cachefree" and rest.partition(".")[0] in rooms():
            yield rest.partition(".")[0], line


def rooms() -> set[str]:
    return {room_of(path) for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"}


def test_every_room_has_a_place() -> None:
    assert rooms() <= PLACE.keys(), "give the new file a place in LINES above"


def test_imports_point_one_way() -> None:
    wrong = [
        f"{path.relative_to(ROOT.parent)}:{line}: {room} imports {other}"
        for room, path, tree in sources()
        for other, line in rooms_imported(tree)
        if other != room and PLACE.get(other, -1) >= PLACE.get(room, len(LINES))
    ]
    assert not wrong, "\n".join(wrong)


def test_no_two_rooms_import_each_other() -> None:
    graph: dict[str, set[str]] = {}
    for room, _, tree in sources():
        graph.setdefault(room, set()).update(
            other for other, _ in rooms_imported(tree) if other != room
        )
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_packages_of_others_stay_at_the_border() -> None:
    known = {*sys.stdlib_module_names, "torch", "sympy", "cachefree"}
    wrong = [
        f"{path.relative_to(ROOT.parent)}:{line}: {room} imports {package}"
        for room, path, tree in sources()
        for package, line in ((name.partition(".")[0], line) for name, line in imports(tree))
        if package not in known and room not in BORDER.get(package, ())
    ]
    assert not wrong, "\n".join(wrong)


def test_no_rule_names_an_architecture() -> None:
    wrong = [
        f"{path.relative_to(ROOT.parent)}:{number}: {match[0]}"
        for room, path, _ in sources()
        if room not in NAMES_ALLOWED_IN
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        for match in ARCHITECTURES.finditer(line)
    ]
    assert not wrong, "\n".join(wrong)
