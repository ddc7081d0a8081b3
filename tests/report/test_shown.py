"""What a notebook and a terminal show of a report."""

from __future__ import annotations

import io
import pickle
import re
from html.parser import HTMLParser

import pytest

import cachefree
from cachefree.report import excerpt
from tests.small import Small, rewritten_small, small

VOID = {"br", "hr", "img", "meta", "link", "input"}


class WellFormed(HTMLParser):
    """Every tag is closed, in order; nothing is loaded and no script runs."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


class Escaped(Small):
    """A condition with signs that HTML has a meaning for."""

    def forward(self, ids, past=None):
        name = "<b>&" if past is None else "later"
        logits, present = super().forward(ids, past)
        assert name
        return logits, present


@pytest.fixture(scope="module")
def report() -> cachefree.Report:
    return rewritten_small(small(Escaped)).report


def test_the_page_is_complete_in_itself(report: cachefree.Report) -> None:
    page = WellFormed(report._repr_html_())
    assert not page.links
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert page.tags.count("svg") == 1
    assert "@media (prefers-color-scheme:dark)" in report._repr_html_()
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", report._repr_html_())


def test_the_page_says_what_was_removed_and_shown(report: cachefree.Report) -> None:
    text = report._repr_html_()
    assert "PROVED_EXACT" in text
    assert "test_shown.py" in text
    assert "&lt;b&gt;&amp;" in text
    assert "<b>&" not in text
    assert '<span class="row marked">' in text
    assert "(batch, <b>past</b>, 6)" in text
    assert "zero length on axis 1" in text
    assert "cat([e, x], d) = x" in text
    assert "first call" in text
    assert "cachefree.to_onnx" in text
    assert text.count("<details") >= 3


def test_details_show_the_lines_and_the_proof(report: cachefree.Report) -> None:
    text = report.text(details=True)
    assert re.search(r'> +\d+  +name = "<b>&" if past is None else "later"', text)
    assert "1. The first path was captured" in text
    assert "past[1]: (batch, past, 6), zero length on axis 1" in text
    assert len(text) > len(report.text())
    assert repr(report) == str(report) == report.text()


def test_rich_shows_the_same_lines(report: cachefree.Report) -> None:
    console = pytest.importorskip("rich.console").Console(width=200, file=io.StringIO())
    console.print(report)
    shown = console.file.getvalue()
    for words in ("PROVED_EXACT", "past is None", "zero length on axis 1", "every size"):
        assert words in shown, words


def test_lines_are_those_that_ran_whatever_happens_to_the_file(tmp_path) -> None:
    file = tmp_path / "model.py"
    file.write_text("a = 1\n\nif past is None:\n    b = 2\n\n\n\n")
    found = excerpt(str(file), 3, 4)
    file.write_text("nothing\n")
    assert found is not None
    assert found.lines == ("a = 1", "", "if past is None:", "    b = 2")
    assert found.marked == (3, 4)
    assert excerpt(str(tmp_path / "absent.py"), 3) is None
    assert excerpt(str(file), 99) is None


def test_a_copy_shows_the_same(report: cachefree.Report) -> None:
    copied = pickle.loads(pickle.dumps(report))
    assert copied._repr_html_() == report._repr_html_()
    assert copied.plot().svg == report.plot().svg


def test_a_report_without_graphs_says_so(report: cachefree.Report) -> None:
    copied = pickle.loads(pickle.dumps(report))
    copied.outline, copied.interface, copied.steps = None, None, ()
    assert "PROVED_EXACT" in copied._repr_html_()
    with pytest.raises(ValueError, match="no graphs to draw"):
        copied.plot()


def test_a_test_is_not_called_a_proof() -> None:
    class Scaled(Small):
        def forward(self, ids, past=None):
            logits, present = super().forward(ids, past)
            if past is not None:
                logits = logits * logits.double().softmax(-1).sum(-1, keepdim=True).float()
            return logits, present

    report = rewritten_small(small(Scaled), check="test").report
    for text in (report._repr_html_(), report.text(details=True)):
        assert "TESTED" in text
        assert "roved" not in text
        assert "proof" not in text.lower()
