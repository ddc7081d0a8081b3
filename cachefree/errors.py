"""The errors that cachefree raises, each with its cause and its remedy.

Every message says what happened, where (module path and the user's own ``file:line``), why, and
what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = [
    "CacheFreeError",
    "CacheNotFoundError",
    "CaptureError",
    "CertificateError",
    "DomainError",
    "EquivalenceError",
    "Refusal",
    "SourceLine",
    "StageError",
    "UnsupportedBranchError",
]


@dataclass(frozen=True)
class SourceLine:
    """A line of the user's own code.

    Attributes:
        file: The path of the file, as Python knows it.
        line: The line's number, from 1.
        function: The name of the function that the line is in.
        module: The qualified name of the ``nn.Module`` that was running, ``""`` for the model
            itself.
    """

    file: str
    line: int
    function: str = ""
    module: str = field(default="", compare=False)

    @property
    def text(self) -> str:
        """The line as it stands in its file, stripped; empty where the file cannot be read."""
        import linecache

        return linecache.getline(self.file, self.line).strip()

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}"
        if self.function:
            place += f" in {self.function}"
        if self.module:
            place += f" (module {self.module!r})"
        return place


@dataclass(frozen=True)
class Refusal:
    """Why something was not rewritten.

    It is a value, so that all refusals of a model can be told at once.

    Attributes:
        what: One sentence: what was met.
        why: Why it cannot be rewritten soundly.
        remedy: What the user can do.
        where: The user's line, where it is known.
        also: Other lines that have a part in it.
        snippet: Python that shows it, to be pasted: its lines stand at the margin.
    """

    what: str
    why: str = ""
    remedy: str = ""
    where: SourceLine | None = None
    also: tuple[SourceLine, ...] = ()
    snippet: str = ""

    def __str__(self) -> str:
        lines = [self.what]
        if self.where is not None:
            lines.append(f"  where: {self.where}")
            if self.where.text:
                lines.append(f"         {self.where.text}")
        if self.why:
            lines.append(f"  why:   {self.why}")
        if self.remedy:
            lines.append(f"  do:    {self.remedy}")
        if self.snippet:
            lines += ["", self.snippet]
        return "\n".join(lines)


class CacheFreeError(Exception):
    """The root of all errors of cachefree.

    Cause: something was refused or did not hold. Remedy: the message's ``do:`` line.
    """

    def __init__(self, *refusals: Refusal | str) -> None:
        self.refusals: tuple[Refusal, ...] = tuple(
            Refusal(refusal) if isinstance(refusal, str) else refusal for refusal in refusals
        )
        super().__init__("\n\n".join(str(refusal) for refusal in self.refusals))

    def __reduce__(self) -> tuple[type[CacheFreeError], tuple[Refusal, ...]]:
        return (type(self), self.refusals)


class CacheNotFoundError(CacheFreeError):
    """No argument of the model carries a cache, or several could and none is the obvious one.

    Cause: no optional argument accepts what an output of the first call gives.
    Remedy: name the argument with ``cache=`` and, where the outputs do not feed it directly, give
    ``carry=``.
    """


class CaptureError(CacheFreeError):
    """The model could not be run or traced as given.

    Cause: example inputs that do not run, or code that depends on the values of tensors.
    Remedy: the message names the line of the model's code and what it needs.
    """


class UnsupportedBranchError(CacheFreeError):
    """The two paths of the model differ in a way that no rule closes soundly.

    All refusals are listed.

    Cause: the first call and the later calls compute different things, or this could not be proved
    otherwise.
    Remedy: make the two paths agree at the named lines, or accept random tests with
    ``check="test"``.
    """


class DomainError(CacheFreeError, ValueError):
    """A call outside the domain in which the rewritten model was shown to equal the original.

    Cause: another input structure, size, dtype or mode than the verdict covers.
    Remedy: call inside the domain (``rewritten.report.domain``), or rewrite again with such inputs
    as examples.
    """


class CertificateError(CacheFreeError):
    """A certificate that does not show what it says, or that is about something else.

    Cause: it was changed, it belongs to another graph or file, or the proof is wrong.
    Remedy: take it again from the rewritten model; report it where that one does not hold either.
    """


class EquivalenceError(CacheFreeError, AssertionError):
    """Two runs that must agree do not.

    Cause: the smallest counterexample is in the message, with a snippet that reproduces it.
    Remedy: report it; a rewritten model that was proved must not fail here.
    """


class StageError(CacheFreeError):
    """A stage of a pipeline is gone, does not answer, or could not compute its part.

    Cause: a process was killed or hangs, or its part of a call failed; the message says which.
    Remedy: start all processes again; where a part failed, the message has the reason.
    """


def raise_all(error: type[CacheFreeError], refusals: Sequence[Refusal]) -> None:
    """Raises ``error`` with all ``refusals`` if there are any."""
    if refusals:
        raise error(*refusals)
