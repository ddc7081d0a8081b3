"""What is asked of a program: refused with a reason, or equal to itself at every size of a grid."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import itertools
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import cachefree
from tests.assertions import same

from .programs import VOCABULARY

__all__ = ["GRID", "Outcome", "Subject", "judge", "judge_source", "loaded"]

GRID: tuple[tuple[int, tuple[int, ...]], ...] = (
    (1, (1,) * 18),
    *((2, (n, 1, 17 - n)) for n in range(1, 17, 2)),
    *((1, (2, n, 1)) for n in range(2, 17, 3)),
    *((b, (2, 1, 3)) for b in range(3, 10)),
    (5, (1, 2, 16, 1)),
    (2, (1, 1, 1, 1, 14, 1, 2)),
    (1, (4, 4, 4, 4, 1, 3)),
    (2, (2,) * 9),
    (3, (3,) * 5),
    (5, (1,) * 14),
)
"""Batch, then the lengths of calls. Every size in `faults` is passed, reached and met."""
LIMIT = 240
"""Seconds after which a program is given up."""


FAILURES = ("wrong", "crash", "slow", "idle")
"""Idle: it was rewritten, and no call is inside its domain, so that nothing was compared."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model and how it is called.

    Attributes:
      build: Makes it, always with the same weights.
      call: ``(outputs of the call before or None, batch, past, query)`` → ``(args, kwargs)``.
      example: Of a first call; None where the model tells.
      options: Of `cachefree.rewrite`.
    """

    build: Callable[[], torch.nn.Module]
    call: Callable[[Any, int, int, int], tuple[tuple[Any, ...], dict[str, Any]]]
    example: Any
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a program.

    Attributes:
      kind: ``refused``, ``equal``; ``wrong`` (a wrong value), ``crash`` (an error that is none of
        cachefree's), ``slow``, ``idle``; ``invalid`` where the program itself does not run.
      text: The reason, or the failure.
      compared: How many calls were compared.
      outside: How many calls were outside the domain.
    """

    kind: str
    text: str = ""
    compared: int = 0
    outside: int = 0

    @property
    def is_failure(self) -> bool:
        return self.kind in FAILURES


def judge(subject: Subject, grid: tuple[tuple[int, tuple[int, ...]], ...] = GRID) -> Outcome:
    """Rewrites a model and compares it with itself, call after call."""
    if not _runs(subject, grid):
        return Outcome("invalid")
    try:
        with _at_most(LIMIT), _one_attention():
            rewritten = cachefree.rewrite(
                subject.build(), subject.example, progress=False, **subject.options
            )
    except cachefree.CacheFreeError as error:
        return Outcome("refused", str(error))
    except TimeoutError:
        return Outcome("slow", f"more than {LIMIT} seconds")
    except Exception:  # noqa: BLE001 - whatever it is, it is what is looked for
        return Outcome("crash", traceback.format_exc())
    compared = outside = 0
    for batch, lengths in grid:
        for feeds_own in (False, True):
            done, left, failure = _chain(subject, rewritten, batch, lengths, feeds_own=feeds_own)
            compared += done
            outside += left
            if failure:
                text = f"{failure}\n{rewritten.report}"
                return Outcome("wrong", text, compared, outside)
    kind = "equal" if compared else "idle"
    return Outcome(kind, rewritten.report.verdict.name, compared, outside)


def _runs(subject: Subject, grid: tuple[tuple[int, tuple[int, ...]], ...]) -> bool:
    """Whether the model itself runs at an ordinary first and later call."""
    model, outputs = subject.build(), None
    try:
        for past, query in ((0, 3), (3, 2)):
            outputs = _called(model, subject.call(outputs, 2, past, query))
    except Exception:  # noqa: BLE001 - such a program is no program
        return False
    return True


def _chain(
    subject: Subject,
    rewritten: Any,
    batch: int,
    lengths: tuple[int, ...],
    *,
    feeds_own: bool,
) -> tuple[int, int, str]:
    """Calls in a row, each fed with the cache of the model, or of the rewritten one."""
    model = subject.build()
    rewritten.reset()
    is_kept = rewritten.keeper is not None
    if is_kept and not feeds_own:
        return 0, 0, ""
    compared = outside = past = 0
    theirs: Any = None
    mine: Any = None
    for query in lengths:
        where = f"batch {batch}, past {past}, query {query}, calls {lengths}"
        given = mine if feeds_own else theirs
        call = copy.deepcopy(subject.call(given, batch, past, query))
        try:
            theirs = _called(model, subject.call(theirs, batch, past, query))
        except Exception:  # noqa: BLE001 - the model has no value there to be equal to
            break
        try:
            mine = _called(rewritten, call)
        except cachefree.CacheFreeError:
            outside += 1
            if feeds_own:
                break
        except Exception:  # noqa: BLE001 - whatever it is, it is what is looked for
            return compared, outside, f"{where}: the rewritten model\n{traceback.format_exc()}"
        else:
            try:
                same(mine, theirs, where)
            except AssertionError as error:
                return compared, outside, str(error)
            compared += 1
        past += query
    return compared, outside, ""


def _called(model: Any, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    args, kwargs = call
    with torch.no_grad(), _one_attention():
        return copy.deepcopy(model(*args, **kwargs))


@contextlib.contextmanager
def _one_attention() -> Iterator[None]:
    """``nn.MultiheadAttention`` as with gradients.

    Its other kernel gives nan instead of zeros for a row that sees nothing.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def judge_source(source: str, grid: tuple[tuple[int, tuple[int, ...]], ...] = GRID) -> Outcome:
    """Judges the source of a random program."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "program.py"
        file.write_text(source)
        return judge_file(file, grid)


def judge_file(file: Path, grid: tuple[tuple[int, tuple[int, ...]], ...] = GRID) -> Outcome:
    """Judges the file of a random program."""
    try:
        with loaded(file) as module:
            return judge(subject_of(module), grid)
    except SyntaxError as error:
        return Outcome("invalid", str(error))


_numbers = itertools.count()


@contextlib.contextmanager
def loaded(file: Path) -> Iterator[ModuleType]:
    """A file as a module, for as long as the block lasts."""
    name = f"random_program_{next(_numbers)}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[name]


def subject_of(module: ModuleType) -> Subject:
    """The model of a random program's module, and its calls."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCABULARY, (16, 64), generator=generator)
    states = torch.randn(16, 5, 8, generator=generator)

    def call(
        outputs: Any, batch: int, past: int, query: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids = tokens[:batch, past : past + query].contiguous()
        return (), module.arguments(outputs, ids, states[:batch].contiguous(), past)

    return Subject(module.build, call, call(None, 2, 0, 3)[1])
