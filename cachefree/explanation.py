"""The answer of `cachefree.explain`, as text, as HTML and as plain values."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cachefree.advice import Change
from cachefree.errors import Refusal
from cachefree.report import Branch, Outline, Picture, Report, excerpt
from cachefree.report.html import STYLE, code, details, page, table
from cachefree.report.picture import draw
from cachefree.report.source import highlighted, short
from cachefree.report.text import plain

__all__ = ["Explanation"]


@dataclass(frozen=True, repr=False)
class Explanation:
    """What would be done with a model, or why it is refused.

    Attributes:
        model: The model's class.
        report: What a rewrite reports; None where it refuses.
        error: The class of the error that it raises.
        refusals: Why, each with its line.
        changes: Changes of the code with which it would go, where such are known.
        branches: Where the first call and later calls go different ways.
        outline: Both paths line by line, as far as they were captured.
        seconds: The time that it took.
    """

    model: str
    report: Report | None
    error: str = ""
    refusals: tuple[Refusal, ...] = ()
    changes: tuple[Change, ...] = ()
    branches: tuple[Branch, ...] = ()
    outline: Outline | None = None
    seconds: float = 0.0

    @property
    def is_rewritable(self) -> bool:
        """Whether `cachefree.rewrite` would give a graph."""
        return self.report is not None

    def plot(self) -> Picture:
        """Both paths side by side, and the one graph where there is one.

        Raises:
            ValueError: the model was refused before its paths were captured.
        """
        if self.outline is None:
            raise ValueError("the model was refused before its paths were captured")
        return draw(self.outline, self.model)

    def __str__(self) -> str:
        if self.report is not None:
            return "\n".join((*self._differences(), "", plain(self.report, details=True)))
        lines = [f"{self.model}: refused ({self.error})", ""]
        lines += ["\n\n".join(map(str, self.refusals))]
        if self.branches:
            lines += ["", *self._differences()]
        for change in self.changes:
            lines += ["", f"what would help: {change.why}", change.diff]
        return "\n".join(lines)

    __repr__ = __str__

    def _differences(self) -> Iterator[str]:
        yield f"{self.model}: where the first call and later calls go different ways"
        for branch in self.branches:
            yield f"  {short(branch.where.file)}:{branch.where.line}  {branch.condition}"
        for block, row in self.outline.differing if self.outline is not None else ():
            first, later, _ = row.operators
            times = f"  (× {len(block.names)})" if len(block.names) > 1 else ""
            yield f"  line {row.line}: {row.text}{times}"
            yield f"      first call: {', '.join(first) or 'nothing'}; later: " + (
                ", ".join(later) or "nothing"
            )

    def as_dict(self) -> dict[str, Any]:
        """The explanation as plain values, for JSON."""
        return {
            "model": self.model,
            "is_rewritable": self.is_rewritable,
            "error": self.error or None,
            "refusals": [_refusal(refusal) for refusal in self.refusals],
            "changes": [
                {"why": c.why, "file": c.file, "line": c.line, "diff": c.diff} for c in self.changes
            ],
            "branches": [
                {"file": b.where.file, "line": b.where.line, "condition": b.condition}
                for b in self.branches
            ],
            "report": None if self.report is None else self.report.as_dict(),
        }

    def _repr_html_(self) -> str:
        if self.report is not None:
            return page(self.report)
        title = f'{html.escape(self.model)}: <span class="bad">refused</span>'
        parts = [f"<h3>{title}</h3>", f'<div class="dim">{html.escape(self.error)}</div>']
        parts += map(_refusal_html, self.refusals)
        if self.changes:
            parts.append("<h4>What would help</h4>")
        parts += map(_change_html, self.changes)
        if self.branches:
            rows = [
                (
                    f"<code>{highlighted(b.condition)}</code>",
                    html.escape(f"{short(b.where.file)}:{b.where.line}"),
                )
                for b in self.branches
            ]
            parts.append(f"<h4>Where the paths part</h4>{table(('condition', 'line'), rows)}")
        if self.outline is not None:
            drawn = f'<div class="wide">{self.plot().svg}</div>'
            parts.append(details("both paths side by side", drawn))
        return f'<div class="cachefree"><style>{STYLE}</style>{"".join(parts)}</div>'


def _refusal(refusal: Refusal) -> dict[str, Any]:
    where = refusal.where
    return {
        "what": refusal.what,
        "why": refusal.why,
        "remedy": refusal.remedy,
        "file": where.file if where else None,
        "line": where.line if where else None,
    }


def _refusal_html(refusal: Refusal) -> str:
    parts = [f"<h4>{html.escape(refusal.what)}</h4>"]
    if refusal.where is not None:
        parts.append(f'<div class="dim">{html.escape(str(refusal.where))}</div>')
        shown = excerpt(refusal.where.file, refusal.where.line)
        if shown is not None:
            parts.append(code(shown))
    if refusal.why:
        parts.append(details("why", f"<pre>{html.escape(refusal.why)}</pre>"))
    if refusal.remedy:
        parts.append(f"<div><b>What to do:</b> {html.escape(refusal.remedy)}</div>")
    return "".join(parts)


def _change_html(change: Change) -> str:
    rows = []
    for line in change.diff.splitlines():
        kind = {"-": " gone", "+": " new"}.get(line[:1], "")
        is_head = line.startswith(("---", "+++", "@@"))
        shown = html.escape(line) if is_head else html.escape(line[:1]) + highlighted(line[1:])
        rows.append(f'<span class="row{"" if is_head else kind}">{shown}</span>')
    return f"<div>{html.escape(change.why)}</div><pre>{''.join(rows)}</pre>"
