"""Every snippet of the documentation runs; those that are said to raise do."""

from __future__ import annotations

import contextlib
import io
import linecache
import re
from pathlib import Path
from typing import Any

import pytest

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
def test_snippets_run(page: Path) -> None:
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


def test_every_page_is_reached_and_every_public_name_is_documented() -> None:
    nav = (DOCS.parent / "mkdocs.yml").read_text()
    assert all(page.name in nav for page in DOCS.glob("*.md"))
    api = (DOCS / "api.md").read_text()
    missing = [name for name in cachefree.__all__ if f".{name}\n" not in f"{api}\n"]
    assert not missing
