"""The programs that take an exported folder, each in a process of its own.

Where they are is said by environment variables, or they are where `make clients` puts them:

CACHEFREE_OPTIMUM_PYTHON  an interpreter that has optimum-onnx
CACHEFREE_GENAI_PYTHON    an interpreter that has onnxruntime-genai
CACHEFREE_NODE_MODULES    a folder whose node_modules has transformers.js and puppeteer-core
CACHEFREE_CHROMIUM        a Chromium; else one that is on the path
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
INSTALLED = HERE.parent.parent / ".clients"


def _place(variable: str, usual: str) -> Path:
    return Path(os.environ.get(variable) or INSTALLED / usual)


OPTIMUM = _place("CACHEFREE_OPTIMUM_PYTHON", "optimum/bin/python")
GENAI = _place("CACHEFREE_GENAI_PYTHON", "genai/bin/python")
NODE = _place("CACHEFREE_NODE_MODULES", "node")
CHROMIUM = os.environ.get("CACHEFREE_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def _missing(program: str) -> str | None:
    """What is not there of what a program needs."""
    needed = {
        "optimum": [(OPTIMUM, "CACHEFREE_OPTIMUM_PYTHON")],
        "genai": [(GENAI, "CACHEFREE_GENAI_PYTHON")],
        "transformers.js": [
            (NODE / "node_modules/@huggingface/transformers", "CACHEFREE_NODE_MODULES")
        ],
        "browser": [
            (NODE / "node_modules/puppeteer-core", "CACHEFREE_NODE_MODULES"),
            (Path(CHROMIUM or "chromium"), "CACHEFREE_CHROMIUM"),
        ],
    }[program]
    if program in ("transformers.js", "browser") and shutil.which("node") is None:
        return "there is no Node"
    for path, variable in needed:
        if not path.exists():
            return f"there is no {path.name}: `make clients` installs it, or set {variable}"
    return None


def needs(program: str) -> pytest.MarkDecorator:
    """Skips a test, before anything is made for it, where a program is not there."""
    why = _missing(program)
    return pytest.mark.skipif(why is not None, reason=f"{program}: {why}")


def _run(command: list[Any], asked: dict[str, Any]) -> Any:
    """What a program wrote last, as JSON."""
    done = subprocess.run(
        [str(part) for part in command],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def optimum(folder: Path, name: str, new: int, **asked: Any) -> list[list[int]]:
    """Rows of tokens by a class of Optimum."""
    told = {"open": {}, **asked, "folder": str(folder), "class": name, "new": new}
    return _run([OPTIMUM, HERE / "generate_optimum.py"], told)  # type: ignore[no-any-return]


def genai(folder: Path, new: int, **asked: Any) -> list[list[int]]:
    """Rows of tokens by onnxruntime-genai."""
    told = {**asked, "folder": str(folder), "new": new}
    return _run([GENAI, HERE / "generate_genai.py"], told)  # type: ignore[no-any-return]


def transformers_js(folder: Path, name: str, new: int, **asked: Any) -> list[list[int]]:
    """Rows of tokens by a class of transformers.js, in Node."""
    told = {**asked, "folder": str(folder), "class": name, "new": new, "modules": str(NODE)}
    return _run(["node", HERE / "generate_transformers.mjs"], told)  # type: ignore[no-any-return]


def browser(folder: Path, file: str, new: int, **asked: Any) -> dict[str, Any]:
    """What a page generated with onnxruntime-web in a Chromium without a window."""
    told = {**asked, "folder": str(folder), "file": file, "new": new, "modules": str(NODE)}
    return _run(  # type: ignore[no-any-return]
        ["node", HERE / "generate_web.mjs"], {**told, "chromium": CHROMIUM}
    )
