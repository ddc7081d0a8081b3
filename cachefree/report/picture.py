"""A picture of the two paths and the one graph side by side, layers folded, as SVG."""

from __future__ import annotations

import html
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from cachefree.report.outline import COLUMNS, Outline, Row

__all__ = ["Picture", "draw"]

_CODE, _COLUMN, _GAP, _MARGIN = 400, 236, 16, 14
_LINE, _PAD, _RISE = 16, 6, 9  # a text's base line is so far below its top
_LETTERS, _CODE_LETTERS = 32, 56
_WIDTH = 2 * _MARGIN + _CODE + 3 * (_COLUMN + _GAP) + 8
_MOST_NAMES = 6

# Not every program that draws SVG knows CSS variables: each colour is written where it is used.
_COLOURS = {
    # selector: (property, in light surroundings, in dark ones)
    "text": ("fill", "#1f2328", "#e6edf3"),
    ".dim": ("fill", "#6a737d", "#8d96a0"),
    ".paper": ("fill", "#ffffff", "#0d1117"),
    ".frame,.wire,.box": ("stroke", "#d0d7de", "#30363d"),
    ".box": ("fill", "#f6f8fa", "#161b22"),
    ".box.first": ("fill", "#ddf4ff", "#0c2d6b"),
    ".box.later": ("fill", "#fff1e5", "#4a2208"),
    ".box.one": ("fill", "#dafbe1", "#0f3d1d"),
    ".first-only": ("fill", "#0550ae", "#79c0ff"),
    ".later-only": ("fill", "#953800", "#ffb77c"),
    ".put-in": ("fill", "#116329", "#7ee787"),
}
_FONT = "11px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace"
_SHAPES = (
    f".cfp text{{font:{_FONT}}}"
    ".cfp .frame{fill:none;stroke-dasharray:4 3}"
    ".cfp .head,.cfp .first-only,.cfp .later-only,.cfp .put-in{font-weight:700}"
)


def _style() -> str:
    """The style sheet; every selector is below the picture's own class."""

    def rules(which: int) -> str:
        return "".join(
            ",".join(f".cfp {part}" for part in selector.split(","))
            + f"{{{colour[0]}:{colour[which]}}}"
            for selector, colour in _COLOURS.items()
        )

    return f"{_SHAPES}{rules(1)}@media (prefers-color-scheme:dark){{{rules(2)}}}"


@dataclass(frozen=True)
class Picture:
    """An SVG picture, self-contained, for light and dark surroundings.

    Attributes:
        svg: Its text.
    """

    svg: str = field(repr=False)

    def _repr_svg_(self) -> str:
        return self.svg

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it to a file."""
        with open(path, "w", encoding="utf-8") as file:
            file.write(self.svg)


def draw(outline: Outline, title: str) -> Picture:
    """The picture of an outline."""
    return Picture(_Drawing().run(outline, title))


class _Drawing:
    def __init__(self) -> None:
        self.parts: list[str] = []
        self.y = _MARGIN
        self.last: list[int | None] = [None, None, None]  # where the box above in a column ends

    def run(self, outline: Outline, title: str) -> str:
        self._heads(outline, title)
        for block in outline.blocks:
            top = self.y
            if block.title:
                self.y += _LINE + _PAD
                self._text(_MARGIN + 8, top + _LINE, block.title, "head")
            for rows in _runs(block.rows):
                if len(rows) > 1:
                    self._same(rows)
                else:
                    self._row(rows[0])
            if block.title:
                self.y += _PAD
                self.parts.append(
                    f'<rect class="frame" data-layers="{len(block.names)}" x="{_MARGIN}" '
                    f'y="{top + 2}" width="{_WIDTH - 2 * _MARGIN}" height="{self.y - top - 2}" '
                    'rx="6"/>'
                )
                self.y += _PAD
        self._legend()
        return (
            f'<svg class="cfp" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {self.y}" '
            f'width="{_WIDTH}" height="{self.y}" role="img" '
            f'aria-label="The paths of {html.escape(title, quote=True)}">'
            f'<style>{_style()}</style><rect class="paper" width="100%" height="100%"/>'
            f"{''.join(self.parts)}</svg>"
        )

    def _heads(self, outline: Outline, title: str) -> None:
        self._text(_MARGIN + 8, self.y + _LINE, title, "head")
        for column, name in enumerate(COLUMNS):
            self._text(_x(column) + 8, self.y + _LINE, name, "head")
            told = f"{outline.count(column)} operators"
            self._text(_x(column) + 8, self.y + 2 * _LINE, told, "dim")
        self._text(_MARGIN + 8, self.y + 2 * _LINE, "the line of the code", "dim")
        self.y += 3 * _LINE

    def _same(self, rows: Sequence[Row]) -> None:
        """Lines that are the same everywhere, in one line of the picture."""
        names = [name for row in rows for name in row.operators[2] or row.operators[1]]
        told = _counted(names)
        shown = ", ".join(told[:_MOST_NAMES]) + (" …" if len(told) > _MOST_NAMES else "")
        told_lines = f"{len(rows)} lines, the same in both"
        self._text(_MARGIN + 8, self.y + _PAD + _RISE, told_lines, "dim")
        lines = _wrapped([(name, "dim") for name in shown.split(", ")])
        self._boxes([lines, lines, lines], ["same"] * 3)

    def _row(self, row: Row) -> None:
        text = row.text if len(row.text) <= _CODE_LETTERS else f"{row.text[: _CODE_LETTERS - 1]}…"
        self._text(_MARGIN + 8, self.y + _PAD + _RISE, f"{row.line or '':>4} {text}", "code")
        first, later, one = row.operators
        marked = [
            _marked(first, [(later, "first-only")]),
            _marked(later, [(first, "later-only")]),
            _marked(one, [(later, "put-in"), (first, "later-only")]),
        ]
        for names, reads in zip(marked, row.reads_cache, strict=True):
            if reads:
                names.insert(0, ("past →", "dim"))
        kinds = [
            kind if any(style == only for _, style in names) else "same"
            for names, kind, only in zip(
                marked,
                ("first", "later", "later"),
                ("first-only", "later-only", "later-only"),
                strict=True,
            )
        ]
        if any(style == "put-in" for _, style in marked[2]):
            kinds[2] = "one"
        self._boxes([_wrapped(names) for names in marked], kinds)

    def _boxes(self, columns: Sequence[list[list[tuple[str, str]]]], kinds: Sequence[str]) -> None:
        height = max(1, *map(len, columns)) * _LINE + _PAD
        for column, (lines, kind) in enumerate(zip(columns, kinds, strict=True)):
            if not lines:
                continue
            x, middle = _x(column), _x(column) + _COLUMN // 2
            above = self.last[column]
            if above is not None and self.y > above:
                self.parts.append(
                    f'<line class="wire" x1="{middle}" y1="{above}" x2="{middle}" y2="{self.y}"/>'
                )
            self.parts.append(
                f'<rect class="box {kind}" x="{x}" y="{self.y}" width="{_COLUMN}" '
                f'height="{height}" rx="4"/>'
            )
            for number, line in enumerate(lines):
                spans = " ".join(
                    f'<tspan class="{style}">{html.escape(name)}</tspan>' for name, style in line
                )
                self.parts.append(
                    f'<text x="{x + 8}" y="{self.y + _PAD + _RISE + number * _LINE}">{spans}</text>'
                )
            self.last[column] = self.y + height
        self.y += height + 4

    def _legend(self) -> None:
        self.y += _LINE
        x = _MARGIN + 8
        for name, style in (
            ("only in the first path", "first-only"),
            ("only in the later path", "later-only"),
            ("put in so that one graph is both", "put-in"),
        ):
            self._text(x, self.y, name, style)
            x += 8 * len(name) + 20
        self.y += _MARGIN

    def _text(self, x: int, y: int, text: str, style: str) -> None:
        escaped = html.escape(text)
        self.parts.append(
            f'<text class="{style}" x="{x}" y="{y}" xml:space="preserve">{escaped}</text>'
        )


def _x(column: int) -> int:
    return _MARGIN + _CODE + _GAP + column * (_COLUMN + _GAP)


def _runs(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Lines that are the same in both paths together, each of the others by itself."""
    for is_same, group in groupby(rows, key=lambda row: row.is_same):
        found = list(group)
        yield from ([found] if is_same else ([row] for row in found))


def _marked(
    names: Sequence[str], others: Sequence[tuple[Sequence[str], str]]
) -> list[tuple[str, str]]:
    """Operators with a style each: that of the first of the others which lacks it."""
    lacking = [(Counter(names) - Counter(other), style) for other, style in others]
    marked = []
    for name in reversed(names):  # what was there before keeps its place, what comes after is new
        style = ""
        for left, kind in lacking:
            if left[name] > 0:
                left[name] -= 1
                style = style or kind
        marked.append((name, style))
    marked.reverse()
    return [
        (f"{name} ×{count}" if count > 1 else name, style)
        for (name, style), count in ((key, len(list(run))) for key, run in groupby(marked))
    ]


def _counted(names: Sequence[str]) -> list[str]:
    return [f"{name} ×{n}" if n > 1 else name for name, n in Counter(names).items()]


def _wrapped(names: Sequence[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    lines: list[list[tuple[str, str]]] = []
    left = 0
    for name, style in names:
        if len(name) > left or not lines:
            lines.append([])
            left = _LETTERS
        lines[-1].append((name, style))
        left -= len(name) + 1
    return lines
