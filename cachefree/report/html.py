"""The report as a piece of a page: nothing is loaded, no script runs, light and dark."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence

from cachefree.report.picture import draw
from cachefree.report.report import Branch, Report
from cachefree.report.source import Excerpt, highlighted, short
from cachefree.report.text import places

__all__ = ["STYLE", "code", "details", "page"]

_MOST_SLOTS = 8

STYLE = """
.cachefree{--ink:#1f2328;--dim:#6a737d;--line:#d0d7de;--paper:#fff;--code:#f6f8fa;--mark:#fff8c5;
--good:#116329;--fair:#7d4e00;--bad:#a40e26;--word:#cf222e;--text:#0a3069;--number:#0550ae;
--gone:#ffebe9;--new:#dafbe1;
font:14px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);padding:12px 16px;
border:1px solid var(--line);border-radius:8px;max-width:1220px}
@media (prefers-color-scheme:dark){.cachefree{--ink:#e6edf3;--dim:#8d96a0;--line:#30363d;
--paper:#0d1117;--code:#161b22;--mark:#3a3000;--good:#7ee787;--fair:#e3b341;--bad:#ff7b72;
--word:#ff7b72;--text:#a5d6ff;--number:#79c0ff;--gone:#4b1113;--new:#0f3d1d}}
.cachefree h3{margin:0 0 4px;font-size:16px} .cachefree h4{margin:14px 0 4px;font-size:14px}
.cachefree .good{color:var(--good)} .cachefree .fair{color:var(--fair)}
.cachefree .bad{color:var(--bad)} .cachefree .dim{color:var(--dim)}
.cachefree table{border-collapse:collapse;margin:4px 0}
.cachefree td,.cachefree th{text-align:left;padding:2px 14px 2px 0;vertical-align:top;
border:0;background:none;color:var(--ink);
font-size:13px} .cachefree th{color:var(--dim);font-weight:400}
.cachefree code,.cachefree pre{font:12px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;
color:var(--ink);background:none}
.cachefree pre{background:var(--code);border-radius:6px;padding:8px 0;margin:4px 0;overflow-x:auto}
.cachefree pre span.row{display:block;padding:0 10px} .cachefree pre .marked{background:var(--mark)}
.cachefree pre .gone{background:var(--gone)} .cachefree pre .new{background:var(--new)}
.cachefree .no{display:inline-block;width:3.2em;color:var(--dim);user-select:none}
.cachefree .cf-keyword{color:var(--word)} .cachefree .cf-string{color:var(--text)}
.cachefree .cf-number{color:var(--number)}
.cachefree .cf-comment{color:var(--dim);font-style:italic}
.cachefree details{margin:4px 0} .cachefree summary{cursor:pointer}
.cachefree .wide{overflow-x:auto}
"""


def page(report: Report) -> str:
    """The report as HTML, complete in itself."""
    verdict = report.verdict
    tone = "good" if verdict.is_proof else "fair" if verdict.name != "NOT_CHECKED" else "bad"
    took = f'<span class="dim">· {report.seconds:.1f} s</span>'
    told = f'<b class="{tone}">{verdict.name}</b> {html.escape(verdict.value)} {took}'
    parts = [
        f"<h3>{html.escape(report.model)}: one graph for the first and for later calls</h3>",
        f"<div>{told}</div>",
        _branches(report),
        _cache(report),
        _domain(report),
        _proof(report),
        _picture(report),
        _next(report),
    ]
    return f'<div class="cachefree"><style>{STYLE}</style>{"".join(parts)}</div>'


def details(summary: str, body: str, *, is_open: bool = False) -> str:
    """A part that unfolds. ``summary`` is HTML."""
    return f"<details{' open' if is_open else ''}><summary>{summary}</summary>{body}</details>"


def code(excerpt: Excerpt) -> str:
    """Lines of a file with their numbers, those that are meant marked."""
    rows = []
    for number, line in enumerate(excerpt.lines, start=excerpt.start):
        marked = " marked" if number in excerpt.marked else ""
        rows.append(
            f'<span class="row{marked}"><span class="no">{number}</span>{highlighted(line)}</span>'
        )
    return f"<pre>{''.join(rows)}</pre>"


def _branches(report: Report) -> str:
    parts = [f"<h4>{len(report.branches)} branches are gone</h4>"]
    for rule, neutral, branches in report.kinds():
        parts.append(
            f"<div><b>{len(branches)} ×</b> {html.escape(rule)}: {html.escape(neutral)} "
            f'<span class="dim">{html.escape(places(branches))}</span></div>'
        )
        parts += [_branch(branch, is_open=place == 0) for place, branch in enumerate(branches)]
    return "".join(parts)


def _branch(branch: Branch, *, is_open: bool) -> str:
    where = f"{short(branch.where.file)}:{branch.where.line}"
    function = f" in {branch.where.function}" if branch.where.function else ""
    summary = (
        f"<code>{highlighted(branch.condition)}</code> "
        f'<span class="dim">{html.escape(where + function)}</span>'
    )
    if branch.excerpt is None:
        return f"<div>{summary}</div>"
    return details(summary, code(branch.excerpt), is_open=is_open)


def _cache(report: Report) -> str:
    if report.interface is None:
        return ""
    slots = report.interface.cache
    rows = [
        (
            f"<code>{html.escape(slot.past.path)}</code>",
            _shape(slot.past.shape, slot.growing_axes),
            html.escape(str(slot.past.dtype).removeprefix("torch.")),
            html.escape(slot.neutral),
        )
        for slot in slots
    ]
    heads = ("slot", "axes", "dtype", "on the first call")
    shown = table(heads, rows[:_MOST_SLOTS])
    if len(rows) > _MOST_SLOTS:
        shown += details(f"{len(rows) - _MOST_SLOTS} more", table(heads, rows[_MOST_SLOTS:]))
    plural = "s" if len(slots) > 1 else ""
    return f"<h4>The cache: {len(slots)} tensor{plural}</h4>{shown}"


def _shape(shape: Sequence[object], growing: Sequence[int]) -> str:
    sizes = (
        f"<b>{html.escape(str(size))}</b>" if axis in growing else html.escape(str(size))
        for axis, size in enumerate(shape)
    )
    return f"<code>({', '.join(sizes)})</code>"


def table(heads: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; its cells are HTML."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _domain(report: Report) -> str:
    rows = [
        (html.escape(region.name), f"<code>{html.escape(told or 'every size')}</code>")
        for region in report.domain.regions
        for told in [" and ".join(str(c) for c in region.conditions if not c.is_implied)]
    ]
    lines = [("fixed", html.escape(fixed)) for fixed in report.domain.fixed]
    lines += [("loop", html.escape(loop)) for loop in report.loops]
    lines += [("assumed", html.escape(note)) for note in report.notes]
    return f"<h4>Where it holds</h4>{table(('call', 'sizes'), (*rows, *lines))}"


def _proof(report: Report) -> str:
    if not report.steps:
        return ""
    steps = "".join(
        f"<li>{html.escape(step.title)}{_list(step.details)}</li>" for step in report.steps
    )
    body = f"<ol>{steps}</ol>"
    if report.questions:
        asked = _list(dict.fromkeys(report.questions))
        body += details(f"{len(report.questions)} questions that the code asked of sizes", asked)
    name = "The proof" if report.verdict.is_proof else "What was done"
    return f"<h4>{name}</h4>{details(f'{len(report.steps)} steps', body)}"


def _list(lines: Iterable[str]) -> str:
    items = "".join(f"<li><code>{html.escape(line)}</code></li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def _picture(report: Report) -> str:
    if report.outline is None:
        return ""
    drawn = f'<div class="wide">{draw(report.outline, report.model).svg}</div>'
    return f"<h4>The graphs</h4>{details('both paths and the one graph side by side', drawn)}"


def _next(report: Report) -> str:
    lines = "".join(f'<span class="row">{highlighted(line)}</span>' for line in _calls())
    return f"<h4>What to call next</h4><pre>{lines}</pre>"


def _calls() -> Iterator[str]:
    yield "rewritten(...)  # as the model is called; leave the cache out on the first call"
    yield "cachefree.verify(model, rewritten)  # random batches, chunks and padding"
    yield 'cachefree.to_onnx(rewritten, "decoder.onnx")'
    yield 'decoder = cachefree.load_onnx("decoder.onnx", like=rewritten)'
    yield "torch.onnx.export(rewritten, **rewritten.export_args())  # or any other exporter"
    yield 'rewritten.report.plot().save("paths.svg")'
