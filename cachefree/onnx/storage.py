"""ONNX files on disk.

Looked at before they are opened, and written so that no half of one is ever seen.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cachefree.errors import CacheFreeError, Refusal

__all__ = [
    "UnwritableError",
    "check_storage",
    "data_file",
    "files_beside",
    "files_of",
    "new_folder",
    "replace_files",
    "unwritable",
]


class UnwritableError(CacheFreeError):
    """A path cannot be written.

    Cause: its directory does not exist, may not be written to, or is full.
    Remedy: choose another path.
    """


def data_file(path: Path) -> Path:
    """Where the weights of an ONNX file are: ``model.onnx.data`` beside ``model.onnx``."""
    return path.with_name(path.name + ".data")


def files_of(path: Path) -> list[Path]:
    """A graph that was just written, and the file of its weights where it has one.

    What an earlier export left under these names is gone by then.
    """
    return [file for file in (path, data_file(path)) if file.exists()]


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[None]:
    """Makes a folder; if the block raises, what was made here goes again where it is empty.

    Raises:
        UnwritableError: it cannot be made.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(path, error) from error
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):  # it holds something, or was never made
                folder.rmdir()
        raise


@contextlib.contextmanager
def files_beside(folder: Path, names: Iterable[str]) -> Iterator[Path]:
    """A temporary directory; what is written there is moved to the folder when the block ends.

    If the block raises, nothing has changed.

    Args:
        folder: The folder.
        names: Files that an earlier export may have left: those that are not written again go.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".beside.", dir=folder) as directory:
            yield Path(directory)
            for name in {*names} - {*os.listdir(directory)}:
                (folder / name).unlink(missing_ok=True)
            for path in sorted(Path(directory).rglob("*")):
                target = folder / path.relative_to(directory)
                if path.is_dir():
                    target.mkdir(exist_ok=True)
                else:
                    os.replace(path, target)
    except OSError as error:
        raise unwritable(folder, error) from error


def check_storage(path: Path) -> tuple[dict[str, str], bool]:
    """Looks at a file without reading weights.

    Returns:
        Its metadata, and whether a weight is bfloat16.

    Raises:
        CacheFreeError: the file or its data is missing, cut off, or no ONNX file.
    """
    import onnx

    if not path.is_file():
        raise CacheFreeError(Refusal(f"There is no file {path}.", remedy="Check the path."))
    try:
        model = onnx.load(os.fspath(path), load_external_data=False)
    except Exception as error:
        raise CacheFreeError(Refusal(f"{path} is no ONNX file.", why=_first_line(error))) from error
    if not model.graph.node:
        raise CacheFreeError(Refusal(f"{path} is no ONNX file.", why="It holds no graph."))
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external({entry.key: entry.value for entry in tensor.external_data}, path)
    types = {tensor.data_type for tensor in model.graph.initializer}
    types |= {value.type.tensor_type.elem_type for value in model.graph.input}
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    return metadata, onnx.TensorProto.BFLOAT16 in types


def _check_external(entry: dict[str, str], path: Path) -> None:
    location = entry.get("location", "")
    data = path.parent / location
    if Path(location).name != location:
        raise CacheFreeError(
            Refusal(
                f"{path} names a data file in another directory: {location!r}.",
                why="A file is read from nowhere but beside the model.",
                remedy="Export the model again.",
            )
        )
    if not data.is_file():
        raise CacheFreeError(
            Refusal(
                f"The weights of {path} are missing: there is no file {data}.",
                why="An ONNX file keeps large weights in a data file beside it.",
                remedy=f"Put {location} beside {path.name}, or export the model again.",
            )
        )
    try:
        offset, length = int(entry.get("offset", 0)), int(entry.get("length", 0))
    except ValueError:
        offset, length = -1, -1
    if offset < 0 or length < 0:
        raise CacheFreeError(
            Refusal(
                f"{path} does not say where its weights are: offset {entry.get('offset')!r},"
                f" length {entry.get('length')!r}.",
                why="Both are numbers of bytes in a file that nobody has edited.",
                remedy="Copy the file again, or export the model again.",
            )
        )
    end = offset + length
    if data.stat().st_size < end:
        raise CacheFreeError(
            Refusal(
                f"The weights of {path} are cut off.",
                why=f"{data} has {data.stat().st_size} bytes of at least {end}.",
                remedy="Copy the file again, or export the model again.",
            )
        )


@contextlib.contextmanager
def replace_files(path: Path, weights: str | None = None) -> Iterator[Path]:
    """A path in a temporary directory; what is written there takes the place of the old files.

    The files are moved when the block ends, the data first, and put back as they were if a move
    fails. If the block raises, nothing has changed.

    Args:
        path: Where the graph is to be.
        weights: The name of the file with its weights; None: that of `data_file`.

    Raises:
        UnwritableError: the directory cannot be written to.
        CacheFreeError: another process writes this file.
    """
    with contextlib.ExitStack() as alone:
        try:
            alone.enter_context(_alone(path))
        except OSError as error:
            raise unwritable(path, error) from error
        yield from _replaced(path, weights)


def _replaced(path: Path, weights: str | None) -> Iterator[Path]:
    try:
        directory = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        if path.is_dir():
            raise unwritable(path, IsADirectoryError("it is a directory"))
        yield directory / path.name
        targets = [path.with_name(weights) if weights else data_file(path), path]
        beside = [path.with_name(name) for name in sorted(os.listdir(directory))]
        _move([*(file for file in beside if file not in targets), *targets], directory)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keeps other processes from writing a file; a process that dies gives it free."""
    try:
        import fcntl
    except ImportError:  # a system without such locks
        yield
        return
    name = path.with_name(f".{path.name}.lock")
    while True:
        lock = os.open(name, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise CacheFreeError(
                Refusal(
                    f"{path} is being written by another process or thread.",
                    remedy="Wait for it, or choose another path.",
                )
            ) from error
        if _is_same(lock, name):
            break
        os.close(lock)  # whoever had it before has just removed it
    try:
        yield
    finally:
        name.unlink(missing_ok=True)
        os.close(lock)


def _is_same(lock: int, name: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), name.stat())
    except FileNotFoundError:
        return False


def _move(targets: list[Path], directory: Path) -> None:
    """Moves the new files into place; the old ones are kept aside until all are."""
    kept: list[tuple[Path, Path]] = []
    moved: list[Path] = []
    try:
        for target in targets:
            if target.exists():
                aside = directory / f"old-{target.name}"
                os.replace(target, aside)
                kept.append((aside, target))
            if (directory / target.name).exists():
                os.replace(directory / target.name, target)
                moved.append(target)
    except BaseException:
        for target in moved:
            target.unlink(missing_ok=True)
        for aside, target in kept:
            os.replace(aside, target)
        raise


def unwritable(path: Path, error: Exception) -> UnwritableError:
    """The error of a path that cannot be written."""
    return UnwritableError(
        Refusal(
            f"{path} cannot be written.",
            why=_first_line(error),
            remedy="Choose a path in a directory that exists and that you may write to.",
        )
    )


def _first_line(error: Any) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0]
