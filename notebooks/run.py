"""Runs the notebooks in place: ``python -m notebooks.run [1 5 …]``."""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
SECONDS = 600
"""A cell that takes longer is stopped."""
LIMIT_SECONDS = 120
"""What a whole notebook may take, on two cores."""


def paths(numbers: list[str] | None = None) -> list[Path]:
    """The notebooks, or those with these numbers."""
    every = sorted(HERE.glob("*.ipynb"))
    return [path for path in every if not numbers or path.name.partition("-")[0] in numbers]


def executed(path: Path) -> nbformat.NotebookNode:
    """A notebook with the outputs of a run of its own, in an empty folder."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=SECONDS,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
        )
        found = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        client.execute(env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, found))})
    return portable(notebook)


def portable(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A notebook without what only one run on one machine shows: bars, logs, times, its paths."""
    ours = {f"{HERE.parent}/": "", f"{Path(sys.prefix).resolve()}/": ".venv/"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    text = nbformat.writes(notebook)
    for path, said in ours.items():
        text = text.replace(path, said)
    text = re.sub(r"(/tmp/)?ipykernel_\d+/", "ipykernel/", text)
    return nbformat.reads(text, as_version=4)


def main() -> None:
    """Runs them and writes them back; says which took longer than they may."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("numbers", nargs="*", help="which; all where none is named")
    late = []
    for path in paths(parser.parse_args().numbers):
        started = time.perf_counter()
        notebook = executed(path)
        nbformat.write(notebook, path)
        seconds, size = time.perf_counter() - started, path.stat().st_size / 1000
        sys.stdout.write(f"{path.name:32} {seconds:6.1f} s {size:8.0f} kB\n")
        late += [path.name] if seconds > LIMIT_SECONDS else []
    sys.exit(f"took more than {LIMIT_SECONDS} s: {', '.join(late)}" if late else None)


if __name__ == "__main__":
    main()
