"""The report for a terminal: a line for each kind of branch, and details on request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cachefree.report.report import Branch, Report
from cachefree.report.source import short

__all__ = ["cache_lines", "lines_of", "places", "plain", "styled"]

_WIDTH = 10
_MOST_PLACES = 4


def plain(report: Report, *, details: bool = False) -> str:
    """The report as text."""
    lines = [f"{report.model}: one graph for the first and for later calls"]
    for name, text in lines_of(report, details=details):
        lines.append(f"  {name:<{_WIDTH}}{text}".rstrip())
    return "\n".join(lines)


def styled(report: Report) -> Any:
    """The same for ``rich``, with colours."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    colour = "green" if report.verdict.is_proof else "yellow"
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in lines_of(report):
        table.add_row(f"  {name}", Text(text, style=f"bold {colour}" if name == "verdict" else ""))
    title = Text.assemble((report.model, "bold"), ": one graph for the first and for later calls")
    return Group(title, table)


def lines_of(report: Report, *, details: bool = False) -> Iterator[tuple[str, str]]:
    """The report's lines: what it is about, and what there is to say of it."""
    yield "verdict", f"{report.verdict.name}: {report.verdict.value}"
    for rule, neutral, branches in report.kinds():
        conditions = ", ".join(dict.fromkeys(branch.condition for branch in branches))
        yield "removed", f"{len(branches)} × {conditions}  ({rule}; {neutral})"
        yield "", places(branches, len(branches) if details else _MOST_PLACES)
        for branch in branches if details else ():
            yield from (("", f"  {line}") for line in _excerpt(branch))
    for line in cache_lines(report.slots) if not details else report.slots:
        yield "cache", line
    for region in report.domain.regions:
        yield "domain", str(region)
    for fixed in report.domain.fixed:
        yield "fixed", fixed
    for loop in report.loops:
        yield "loop", loop
    for note in report.notes:
        yield "assumed", note
    if details:
        for number, step in enumerate(report.steps, start=1):
            yield "steps" if number == 1 else "", f"{number}. {step.title}"
            yield from (("", f"   {detail}") for detail in step.details)
        yield from (("asked", question) for question in report.questions)
    else:
        yield "laws", ", ".join(report.laws)
    if report.outline is not None:
        first, later, one = map(report.outline.count, range(3))
        yield "operators", f"{first} in the first path, {later} in later ones, {one} in the graph"
    yield "took", f"{report.seconds:.1f} s"
    if not details:
        yield "more", "report.text(details=True), report.plot()"


def cache_lines(slots: Sequence[str]) -> Iterator[str]:
    """One line for all slots of a cache."""
    if slots:
        count = f"{len(slots)} tensor{'s' if len(slots) > 1 else ''}, "
        yield f"{count}{slots[0]}{' …' if len(slots) > 1 else ''}"


def places(branches: Sequence[Branch], most: int = _MOST_PLACES) -> str:
    """The lines of branches, a file named once: ``model.py:43, 100``."""
    by_file: dict[str, list[int]] = {}
    for branch in branches:
        by_file.setdefault(short(branch.where.file), []).append(branch.where.line)
    told, left = [], most
    for file, numbers in by_file.items():
        numbers = list(dict.fromkeys(numbers))
        if left > 0:
            told.append(f"{file}:{', '.join(map(str, numbers[:left]))}")
        left -= len(numbers)
    return "; ".join(told) + (" …" if left < 0 else "")


def _excerpt(branch: Branch) -> Iterator[str]:
    if branch.excerpt is not None:
        yield f"{short(branch.where.file)}:{branch.where.line} in {branch.where.function}"
        for number, line in enumerate(branch.excerpt.lines, start=branch.excerpt.start):
            mark = ">" if number in branch.excerpt.marked else " "
            yield f"{mark} {number:>4}  {line}"
