"""Every snippet of the documentation runs; those that are said to raise do."""

from __future__ import annotations

import contextlib
import io
import linecache
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import cachefree

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
RAISES = re.compile(r"# raises (\w+)")
QUICK = ("add-a-law.md", "algebra.md", "exporters.md", "index.md")


def snippets(page: Path) -> list[tuple[int, str]]:
    """The blocks of a page, each with the line on which it begins."""
    text = page.read_text()
    return [
        (text[: match.start(1)].count("\n"), match[1])
        for match in BLOCK.finditer(text)
        if "--8<--" not in match[1]
    ]


PAGES = [page for page in sorted(DOCS.glob("*.md")) if snippets(page)]


@pytest.mark.parametrize(
    "page",
    [page if page.name in QUICK else pytest.param(page, marks=pytest.mark.slow) for page in PAGES],
    ids=lambda page: page.stem,
)
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": f"page_{page.stem}"}
    for start, code in snippets(page):
        name = f"{page}, the block at line {start}"
        padded = "\n" * start + code  # so that messages name the line of the page
        linecache.cache[name] = (len(padded), None, padded.splitlines(keepends=True), name)
        program = compile(padded, name, "exec")
        expected = RAISES.search(code)
        with contextlib.redirect_stdout(io.StringIO()):
            if expected is None:
                exec(program, names)
                continue
            with pytest.raises(getattr(cachefree, expected[1])):
                exec(program, names)


README = DOCS.parent / "README.md"


class MyDecoder(torch.nn.Module):
    """What the README calls the user's own: four layers, with a vocabulary for its token ids."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.tokens, self.scores = torch.nn.Embedding(4000, 8), torch.nn.Linear(8, 4000)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 16) for _ in range(layers))

    def forward(self, input_ids: torch.Tensor, past: Any = None) -> Any:
        x, present = self.tokens(input_ids), []
        for i, layer in enumerate(self.layers):
            k, v = layer(x).chunk(2, dim=-1)
            if past is not None:
                k, v = torch.cat([past[i][0], k], dim=1), torch.cat([past[i][1], v], dim=1)
            hidden = torch.ones(x.shape[1], k.shape[1], dtype=torch.bool)
            hidden = hidden.triu(k.shape[1] - x.shape[1] + 1)
            x = x + (x @ k.mT).masked_fill(hidden, -torch.inf).softmax(-1) @ v
            present.append((k, v))
        return self.scores(x), tuple(present)


def run_of_readme(layers: int) -> Iterator[dict[str, Any]]:
    """The names that are there after each block, run in the current directory."""
    torch.manual_seed(0)
    names: dict[str, Any] = {"MyDecoder": lambda: MyDecoder(layers)}
    for start, code in snippets(README):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile("\n" * start + code, str(README), "exec"), names)
        yield names


def test_the_first_block_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = next(run_of_readme(layers=1))
    assert names["past"][0][1].shape == (1, 4, 8)


@pytest.mark.slow
def test_all_blocks_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    monkeypatch.chdir(tmp_path)
    run = run_of_readme(layers=4)
    safetensors.save_file(next(run)["model"].state_dict(), "model.safetensors")
    assert len(list(run)) == 2
    assert len(list(tmp_path.glob("decoder-stage*of4.onnx"))) == 4


def test_the_readme_tells_how_to_install_what_works_and_what_else_there_is() -> None:
    text = README.read_text()
    told = {
        "Install": ("pip install .", "verify", "rich"),
        "What works": ("docs/transformers.md", "docs/packages.md", "docs/clients.md"),
        "What to use when": ("Optimum", "transformers' exporter", "onnx-diagnostic", "genai"),
    }
    for title, words in told.items():
        section = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
        assert all(word in section for word in words), title
    assert text.count("\n|---|---|\n") >= 3
    extras = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["project"]
    install = text.split("\n## Install\n")[1].split("\n## ")[0]
    assert all(f"`{extra}`" in install for extra in extras["optional-dependencies"])
    assert all((DOCS.parent / path).exists() for path in re.findall(r"\]\(([^:)]+)\)", text))


class Pairs(torch.nn.Module):
    """Two layers, whose cache is a tuple of tuples: what is flat and what is not differ."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: torch.Tensor, past: Any = None) -> Any:
        present = []
        for i, layer in enumerate(self.layers):
            k = v = layer(x)
            if past is not None:
                k, v = torch.cat([past[i][0], k], dim=1), torch.cat([past[i][1], v], dim=1)
            x = x + (k * v).cumsum(dim=1)[:, -x.shape[1] :]
            present.append((k, v))
        return x, tuple(present)


def test_the_calls_of_exporters_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = (DOCS / "exporters.md").read_text().split("```python")[0]
    calls = re.findall(r"^\| [^|]+ \| `([^|]+)` \|", table, re.MULTILINE)
    assert len(calls) >= 5
    monkeypatch.chdir(tmp_path)
    rewritten = cachefree.rewrite(Pairs().eval(), (torch.zeros(2, 5, 4),))
    names = {"cachefree": cachefree, "torch": torch, "rewritten": rewritten}
    for call in calls:
        with contextlib.redirect_stdout(io.StringIO()):
            eval(call, names)


def test_a_traced_model_is_told_how_to_trace_the_graph() -> None:
    rewritten = cachefree.rewrite(Pairs().eval(), (torch.zeros(2, 5, 4),))
    with pytest.raises(cachefree.CaptureError) as caught:
        cachefree.rewrite(torch.jit.trace(Pairs().eval(), (torch.zeros(2, 5, 4),)))
    call = re.search(r"torch\.jit\.trace\(.*\)\)", str(caught.value))
    assert call is not None
    traced = eval(call[0], {"torch": torch, "rewritten": rewritten})
    x = torch.ones(2, 3, 4)
    flat = [part for pair in rewritten.empty_cache(batch_size=2) for part in pair]
    torch.testing.assert_close(traced(x, *flat)[0], rewritten(x)[0])


def test_every_error_has_a_failing_and_a_fixed_example() -> None:
    text = (DOCS / "errors.md").read_text()
    errors = [
        name for name in cachefree.__all__ if name.endswith("Error") and name != "CacheFreeError"
    ]
    assert errors
    for name in errors:
        assert f"\n## {name}\n" in text, name
        section = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert f"# raises {name}" in section, name
        assert sum("# raises" not in block for block in BLOCK.findall(section)) >= 1, name


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(build, cwd=DOCS.parent, env=environment, check=True)
    assert (tmp_path / "errors" / "index.html").is_file()


def test_every_page_is_reached_and_every_public_name_is_documented() -> None:
    nav = (DOCS.parent / "mkdocs.yml").read_text()
    reached = re.findall(r"^  - .+: (\S+\.md)$", nav, re.MULTILINE)
    assert sorted(reached) == sorted(page.name for page in DOCS.glob("*.md")), "each once"
    api = (DOCS / "api.md").read_text()
    missing = [name for name in cachefree.__all__ if f".{name}\n" not in f"{api}\n"]
    assert not missing
