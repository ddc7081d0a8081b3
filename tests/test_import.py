"""`import cachefree` loads torch and the standard library, and nothing that a call may not need."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEFT_FOR_LATER = (
    "hypothesis",
    "numpy.testing",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "rich",
    "transformers",
    "z3",
)


def modules_after(statement: str) -> set[str]:
    """The names of all modules that a fresh interpreter has after `statement`."""
    program = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(json.loads(finished.stdout))


@pytest.fixture(scope="module")
def added_to_torch() -> set[str]:
    return modules_after("import torch, cachefree") - modules_after("import torch")


@pytest.mark.parametrize("package", LEFT_FOR_LATER)
def test_import_leaves_it_for_later(added_to_torch: set[str], package: str) -> None:
    loaded = {name for name in added_to_torch if f"{name}.".startswith(f"{package}.")}
    assert not loaded


def test_import_adds_only_itself_and_the_standard_library(added_to_torch: set[str]) -> None:
    allowed = {*sys.stdlib_module_names, "cachefree", "torch"}
    assert {name.partition(".")[0] for name in added_to_torch} <= allowed


def test_type_checkers_are_told_that_the_package_is_typed() -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel")
    files = wheel.WheelBuilder(str(ROOT)).recurse_included_files()
    assert {"cachefree/py.typed", "cachefree/__init__.py"} <= {f.distribution_path for f in files}
