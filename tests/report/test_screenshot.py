"""What a browser makes of the report: where its texts stand, and a picture, light and dark."""

from __future__ import annotations

import html
import json
import re
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

import cachefree
from cachefree.report.picture import draw
from tests.clients.programs import CHROMIUM

from .test_picture import Decoder, layered

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs the browser chromium"),
]
WIDTH = 1400
LEAST_CONTRAST = 80
"""Between the lightest and the darkest pixel of a text, of 255."""

_PAGE = """<!doctype html><meta charset=utf-8>
<style>body{margin:8px}@media (prefers-color-scheme:dark){body{background:#000}}</style>
BODY<script>
document.querySelectorAll('details').forEach(part => part.open = true);
const texts = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode, range = document.createRange();
  if (!node.data.trim() || node.parentElement.closest('style, script')) continue;
  range.selectNodeContents(node);
  for (const at of range.getClientRects())
    texts.push([node.data.trim(), [at.left, at.top, at.right, at.bottom]]);
}
const boxes = [...document.querySelectorAll('svg .box')].map(box => {
  const at = box.getBoundingClientRect(); return [at.left, at.top, at.right, at.bottom]});
document.title = JSON.stringify({texts, boxes,
  height: Math.ceil(document.body.getBoundingClientRect().bottom + 8),
  width: document.documentElement.scrollWidth});
</script>"""


def _chromium(page: Path, height: int, *options: str) -> str:
    return subprocess.run(
        [
            *(str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu"),
            *("--hide-scrollbars", f"--window-size={WIDTH},{height}", *options, page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout


def _bodies() -> dict[str, Any]:
    example = (torch.tensor([[1, 2, 3], [4, 5, 6]]),)
    return {
        "report": lambda: cachefree.rewrite(Decoder().eval(), example).report._repr_html_(),
        "picture": lambda: draw(layered(48), "Decoder").svg,
        "picture of two kinds": lambda: draw(layered(48, kinds=2), "Decoder").svg,
    }


@pytest.fixture(scope="module", params=_bodies())
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(_PAGE.replace("BODY", _bodies()[request.param]()))
    return path


@pytest.fixture(scope="module")
def found(page: Path) -> dict[str, Any]:
    """Where the texts and the boxes of the picture stand."""
    title = re.search(r"<title>(.*?)</title>", _chromium(page, 1000, "--dump-dom"), re.DOTALL)
    assert title is not None
    return dict(json.loads(html.unescape(title[1])))


def test_all_is_on_the_page_and_nothing_covers_another(found: dict[str, Any]) -> None:
    assert found["width"] == WIDTH, "nothing to scroll to the side"
    assert len(found["texts"]) > 20
    for text, (left, top, right, bottom) in found["texts"]:
        assert 0 <= left < right <= WIDTH, text
        assert 0 <= top < bottom <= found["height"], text
    for (one, a), (other, b) in combinations(found["texts"], 2):
        assert not _overlap(a, b), (one, other)
    for one, other in combinations(found["boxes"], 2):
        assert not _overlap(one, other)


def test_no_text_leaves_its_box(found: dict[str, Any]) -> None:
    assert len(found["boxes"]) >= 8
    for text, at in found["texts"]:
        for box in found["boxes"]:
            if _overlap(at, box):
                assert box[0] <= at[0], text
                assert at[2] <= box[2], text
                assert box[1] - 1 <= at[1], text
                assert at[3] <= box[3] + 1, text


def _overlap(one: list[float], other: list[float]) -> bool:
    """Whether they share more than the pixel at which lines of text may touch."""
    return (
        min(one[2], other[2]) - max(one[0], other[0]) > 1
        and min(one[3], other[3]) - max(one[1], other[1]) > 1
    )


def test_it_can_be_read_in_light_and_in_dark(
    page: Path, found: dict[str, Any], tmp_path: Path
) -> None:
    images = pytest.importorskip("PIL.Image")
    means = []
    for name, options in (("light", ()), ("dark", ("--force-dark-mode",))):
        shot = tmp_path / f"{name}.png"
        _chromium(page, found["height"], *options, f"--screenshot={shot}")
        image = images.open(shot).convert("L")
        assert image.size == (WIDTH, found["height"])
        colours = image.histogram()
        means.append(sum(value * count for value, count in enumerate(colours)) / sum(colours))
        for text, at in found["texts"]:
            darkest, lightest = image.crop([round(side) for side in at]).getextrema()
            assert lightest - darkest > LEAST_CONTRAST, f"{text!r} can hardly be read in {name}"
    light, dark = means
    assert light > 200
    assert dark < 55
