"""What each command does; each gives a person's text or plain values, and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachefree.cli.parser import DIFFERENT, OK
from cachefree.cli.sources import Source, load, parsed_inputs
from cachefree.errors import CacheFreeError, Refusal

__all__ = ["COMMANDS", "Answer", "MissingPartError", "note"]


class MissingPartError(CacheFreeError):
    """A package or a part that the command needs is not installed.

    Cause: an extra was left out.
    Remedy: the message says which to install.
    """


@dataclass(frozen=True)
class Answer:
    """What a command gives.

    Attributes:
        shown: For a person: a text, or what ``rich`` can show.
        plain: The same as plain values.
        code: The exit code.
    """

    shown: Any
    plain: Mapping[str, Any]
    code: int = OK


def note(text: str) -> None:
    """A word to a person who watches; nothing where nobody does."""
    if sys.stderr.isatty():
        print(f"cachefree: {text}", file=sys.stderr)


@contextlib.contextmanager
def _written(path: Path) -> Iterator[Any]:
    """A file that is there whole or not at all."""
    from cachefree.onnx.storage import unwritable

    try:
        with _replaced(path) as file:
            yield file
    except OSError as error:
        raise unwritable(path, OSError(error.errno, error.strerror)) from error


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[Any]:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", text=True)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            yield file
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def _source(options: argparse.Namespace, *, needs_weights: bool) -> Source:
    note(f"loading {options.model}")
    inputs = parsed_inputs(options.input)
    source = load(options.model, needs_weights=needs_weights, trusts_code=options.trust_remote_code)
    for text in source.notes:
        note(text)
    return source if inputs is None else Source(source.model, inputs, source.notes)


def _options(options: argparse.Namespace) -> dict[str, Any]:
    names = options.method.split(",")
    return {
        "cache": options.cache,
        "method": names[0] if len(names) == 1 else tuple(names),
    }


def _rewritten(options: argparse.Namespace, source: Source) -> Any:
    import cachefree

    note("rewriting")
    return cachefree.rewrite(source.model, source.inputs, check=options.accept, **_options(options))


def _explain(options: argparse.Namespace) -> Answer:
    import cachefree

    source = _source(options, needs_weights=False)
    found = cachefree.explain(source.model, source.inputs, **_options(options))
    _pages(options, found, None if found.outline is None else found.plot)
    return Answer(str(found), found.as_dict(), OK if found.is_rewritable else DIFFERENT)


def _rewrite(options: argparse.Namespace) -> Answer:
    report = _rewritten(options, _source(options, needs_weights=False)).report
    _pages(options, report, report.plot)
    shown = report.text(details=True) if options.details else report
    return Answer(shown, report.as_dict())


def _pages(options: argparse.Namespace, found: Any, plot: Callable[[], Any] | None) -> None:
    if options.html is not None:
        with _written(options.html) as file:
            file.write("<!doctype html><meta charset=utf-8><title>cachefree</title>")
            file.write(f"<body>{found._repr_html_()}</body>\n")
    if options.svg is not None and plot is None:
        note("the model was refused before there was a picture to draw")
    elif options.svg is not None and plot is not None:
        with _written(options.svg) as file:
            file.write(plot().svg)


def _verify(options: argparse.Namespace) -> Answer:
    import torch

    import cachefree

    _needs("hypothesis")
    source = _source(options, needs_weights=True)
    rewritten = _rewritten(options, source)
    note("comparing on random calls")
    backends = tuple(options.backend or ("eager", "onnxruntime"))
    named = [getattr(torch, name) for name in options.dtype or () if name != "own"]
    found = cachefree.verify(
        source.model,
        rewritten,
        backends=backends,
        dtypes=named if options.dtype else None,
        max_examples=options.examples,
        seed=options.seed,
    )
    plain = {
        "equal": True,
        "verdict": rewritten.report.verdict.name,
        "generations": found.generations,
        "calls": found.calls,
        "differences": dict(found.differences),
        "dtypes": {
            str(dtype).removeprefix("torch."): dict(other.differences)
            for dtype, other in found.dtypes.items()
        },
        "left_out": dict(found.left_out),
    }
    return Answer(f"{rewritten.report.verdict.name}\n{found}", plain)


def _export(options: argparse.Namespace) -> Answer:
    import cachefree
    from cachefree.onnx.storage import files_of
    from cachefree.onnx.writing import ENCODER_FILE

    rewritten = _rewritten(options, _source(options, needs_weights=True))
    path = cachefree.to_onnx(
        rewritten, options.output, names=options.names, opset=options.opset, progress=note
    )
    files = files_of(path)
    if rewritten.encoder_interface is not None:
        files += files_of(path.with_name(ENCODER_FILE))
    verdict = rewritten.report.verdict
    shown = [f"{verdict.name}: {verdict.value}"]
    shown += [f"{file}  {file.stat().st_size / 1e6:.1f} MB" for file in files]
    plain = {"path": str(path), "files": [*map(str, files)], "verdict": verdict.name}
    return Answer("\n".join(shown), plain)


def _check(options: argparse.Namespace) -> Answer:
    import cachefree

    checker = getattr(cachefree, "check_certificate", None)
    if checker is None:
        raise MissingPartError(
            Refusal(
                "This version of cachefree has no checker of certificates.",
                remedy="Use cachefree verify, which compares on random calls.",
            )
        )
    path = Path(options.model)
    if path.is_file() and path.suffix != ".py":
        found = checker(path)
    else:
        options.accept = "prove"
        found = checker(_rewritten(options, _source(options, needs_weights=False)))
    return Answer(str(found), {"checked": True, "steps": str(found)})


def _demo(options: argparse.Namespace) -> Answer:
    from cachefree.demo import main
    from cachefree.onnx.storage import files_of

    arguments = ["--out", str(options.out), "--steps", str(options.steps)]
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        path = main([*arguments, *(["--large"] if options.large else [])])
    return Answer("", {"files": [*map(str, files_of(path))]})


def _completion(options: argparse.Namespace) -> Answer:
    from cachefree.cli.completion import script

    text = script(options.shell)
    return Answer(text, {"script": text})


def _needs(package: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise MissingPartError(
            Refusal(
                f"The command needs {package}, which is not installed.",
                remedy=f"pip install {package}",
            )
        )


COMMANDS: dict[str, Callable[[argparse.Namespace], Answer]] = {
    "check": _check,
    "completion": _completion,
    "demo": _demo,
    "explain": _explain,
    "export": _export,
    "rewrite": _rewrite,
    "verify": _verify,
}
