"""Every snippet of the documentation runs; those that are said to raise do."""

from __future__ import annotations

import contextlib
import io
import linecache
import os
import re
import subprocess
import sys
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
        name
        for name in cachefree.__all__
        if name.endswith("Error") and name not in ("CacheFreeError", "CertificateError")
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
    assert all(page.name in nav for page in DOCS.glob("*.md"))
    api = (DOCS / "api.md").read_text()
    missing = [name for name in cachefree.__all__ if f".{name}\n" not in f"{api}\n"]
    assert not missing
