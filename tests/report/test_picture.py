"""The picture: what is drawn, what is folded, and that a browser can show it."""

from __future__ import annotations

import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import cachefree
from cachefree.report.outline import Outline, Row, blocks_of
from cachefree.report.picture import draw

SVG = "{http://www.w3.org/2000/svg}"


class Layer(nn.Module):
    """Joins its keys, and a window in every other one."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.keys = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, past: torch.Tensor | None = None):
        k = self.keys(x)
        if past is not None:
            k = torch.cat([past, k], dim=1)
        n, m = x.shape[1], k.shape[1]
        hidden = torch.ones(n, m, dtype=torch.bool).triu(m - n + 1)
        return x + (x @ k.mT).masked_fill(hidden, -torch.inf).softmax(-1) @ k, k


class Decoder(nn.Module):
    def __init__(self, layers: int = 3, dim: int = 4) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, dim)
        self.layers = nn.ModuleList(Layer(dim) for _ in range(layers))

    def forward(self, ids: torch.Tensor, past: tuple[torch.Tensor, ...] | None = None):
        x, present = self.emb(ids), []
        for place, layer in enumerate(self.layers):
            x, k = layer(x, None if past is None else past[place])
            present.append(k)
        return x, tuple(present)


@pytest.fixture(scope="module")
def report() -> cachefree.Report:
    return cachefree.rewrite(Decoder().eval(), (torch.tensor([[1, 2, 3], [4, 5, 6]]),)).report


def texts(svg: str, style: str) -> list[str]:
    root = ElementTree.fromstring(svg)
    return ["".join(node.itertext()).strip() for node in root.iter() if node.get("class") == style]


def test_equal_layers_are_drawn_once(report: cachefree.Report) -> None:
    svg = report.plot().svg
    frames = [node for node in ElementTree.fromstring(svg).iter() if node.get("data-layers")]
    assert [frame.get("data-layers") for frame in frames] == ["3"]
    assert "layers.0 – layers.2  × 3" in texts(svg, "head")


def test_what_differs_is_coloured(report: cachefree.Report) -> None:
    svg = report.plot().svg
    assert texts(svg, "later-only") == ["cat", "cat", "only in the later path"]
    assert texts(svg, "first-only") == ["only in the first path"]
    assert any("k = torch.cat([past, k], dim=1)" in text for text in texts(svg, "code"))
    assert texts(svg, "dim").count("past →") == 2


def test_the_columns_count_their_operators(report: cachefree.Report) -> None:
    assert report.outline is not None
    first, later, one = map(report.outline.count, range(3))
    assert later == first + 3, "one join a layer"
    assert 0 < one <= later
    assert {f"{first} operators", f"{later} operators"} <= set(texts(report.plot().svg, "dim"))


def test_no_box_leaves_the_picture_or_covers_another(report: cachefree.Report) -> None:
    root = ElementTree.fromstring(report.plot().svg)
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    boxes = list(_boxes(root))
    assert len(boxes) > 9
    for x, y, w, h in boxes:
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height
    for place, (x, y, w, h) in enumerate(boxes):
        for x2, y2, w2, h2 in boxes[place + 1 :]:
            assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y


def _boxes(root: ElementTree.Element) -> Iterator[tuple[float, float, float, float]]:
    for node in root.iter(f"{SVG}rect"):
        if (node.get("class") or "").startswith("box"):
            x, y, w, h = (float(node.get(name, 0)) for name in ("x", "y", "width", "height"))
            yield x, y, w, h


def test_a_line_of_code_stands_beside_its_operators(report: cachefree.Report) -> None:
    root = ElementTree.fromstring(report.plot().svg)
    operators = [node.get("y") for node in root.iter(f"{SVG}text") if node.get("class") is None]
    code = [node.get("y") for node in root.iter(f"{SVG}text") if node.get("class") == "code"]
    assert len(code) >= 3
    assert set(code) <= set(operators)


def layered(layers: int, kinds: int = 1) -> Outline:
    """An outline of a deep decoder, as one of many operators gives it."""
    rows = [Row("embed", "m.py", 1, "x = embed(ids)", (("embedding",),) * 3)]
    for layer in range(layers):
        kind = layer % kinds
        for line in range(10, 40):
            same = ("linear", "view", "transpose")
            rows.append(Row(f"layers.{layer}.mlp", "m.py", line, f"line {line}", (same,) * 3))
        joins: tuple[str, ...] = ("cat",) * (kind + 1)
        rows.append(
            Row(
                f"layers.{layer}.attn",
                "m.py",
                50,
                "k = cat",
                ((), joins, joins),
                (False, True, True),
            )
        )
    return Outline(tuple(rows), blocks_of(rows))


def test_a_deep_model_is_no_longer_than_a_shallow_one() -> None:
    deep, shallow = (draw(layered(layers), "Decoder").svg for layers in (48, 4))
    assert len(deep) < len(shallow) + 20
    assert "layers.0 – layers.47  × 48" in texts(deep, "head")
    height = float(ElementTree.fromstring(deep).get("height", 0))
    assert height < 400, "it fits on a screen"


def test_layers_of_two_kinds_are_two_blocks() -> None:
    svg = draw(layered(48, kinds=2), "Decoder").svg
    assert "layers.0, 2, 4, …  × 24" in texts(svg, "head")
    assert "layers.1, 3, 5, …  × 24" in texts(svg, "head")


def test_it_is_saved_and_shows_itself(report: cachefree.Report, tmp_path: Path) -> None:
    picture = report.plot()
    picture.save(tmp_path / "paths.svg")
    assert (tmp_path / "paths.svg").read_text() == picture._repr_svg_() == picture.svg
    assert len(repr(picture)) < 100


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
def test_a_browser_lays_it_out(report: cachefree.Report, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        f"<meta charset=utf-8><body style=margin:0>{report._repr_html_()}<script>"
        "document.querySelectorAll('details').forEach(part => part.open = true);"
        "const svg = document.querySelector('svg').getBoundingClientRect();"
        "const box = [...document.querySelectorAll('svg text')].filter(text => {"
        "  const at = text.getBoundingClientRect(); return at.right > svg.right + 1});"
        "document.title = [svg.width > 900, svg.height > 150, box.length].join(' ');"
        "document.body.innerHTML = '<p id=found>' + document.title</script>"
    )
    found = subprocess.run(
        [
            "chromium",
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    assert '<p id="found">true true 0' in found
