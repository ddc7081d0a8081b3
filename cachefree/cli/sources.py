"""Where a model comes from: a module, a file, or a folder of transformers."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from cachefree.errors import CacheFreeError, Refusal

__all__ = ["Source", "SourceError", "load", "parsed_inputs"]

_INPUT = re.compile(r"(?P<name>[A-Za-z_]\w*)=(?P<dtype>\w+)\[(?P<sizes>[\d,\s]*)\]")


class SourceError(CacheFreeError):
    """The model could not be loaded.

    Cause: there is no such module, file or name, or its code raises.
    Remedy: the message says which.
    """


@dataclass(frozen=True)
class Source:
    """A model with its example inputs, where the factory gave some.

    Attributes:
        model: The model, in evaluation mode.
        inputs: Example inputs, or None.
        notes: What a person should know of it.
    """

    model: Any
    inputs: Any = None
    notes: tuple[str, ...] = ()


def load(text: str, *, needs_weights: bool, trusts_code: bool = False) -> Source:
    """Loads what a command line names.

    Args:
        text: ``module:factory``, ``file.py:factory``, or a folder.
        needs_weights: Whether a transformers folder has to have weights, or its config will do.
        trusts_code: Whether Python files of a transformers folder may run.

    Raises:
        SourceError: it cannot be loaded.
    """
    folder = Path(text)
    if folder.is_dir():
        return _from_folder(folder, needs_weights=needs_weights, trusts_code=trusts_code)
    place, separator, name = text.rpartition(":")
    if not separator or place.endswith(("/", "\\")) or len(place) < 2:
        place, name = text, ""
    module = _module(place)
    return _made(_named(module, name, text), text)


def parsed_inputs(texts: Sequence[str]) -> dict[str, Any] | None:
    """``ids=int64[2,5]`` as a dict of zeros.

    Raises:
        SourceError: a text is written otherwise.
    """
    import torch

    inputs = {}
    for text in texts:
        match = _INPUT.fullmatch(text.strip())
        dtype = getattr(torch, match["dtype"], None) if match else None
        if match is None or not isinstance(dtype, torch.dtype):
            raise SourceError(
                Refusal(
                    f"--input {text} cannot be read.",
                    remedy="Write a name, a dtype of torch and sizes: --input ids=int64[2,5].",
                )
            )
        sizes = [int(size) for size in match["sizes"].split(",") if size.strip()]
        inputs[match["name"]] = torch.zeros(sizes, dtype=dtype)
    return inputs or None


def _module(place: str) -> ModuleType:
    if place.endswith(".py"):
        return _of_file(Path(place))
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and place.startswith(error.name):
            hint = " Is the current directory the right one?"
            raise SourceError(
                Refusal(
                    f"There is no module, file or folder {place!r}.",
                    remedy="Name package.module:factory, path/to/file.py:factory or a folder."
                    + hint,
                )
            ) from error
        raise _broken(place, error) from error
    except Exception as error:
        raise _broken(place, error) from error


def _of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise SourceError(Refusal(f"There is no file {path}.", remedy="Check the path."))
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _broken(str(path), error) from error
    return module


def _named(module: ModuleType, name: str, text: str) -> Any:
    from torch import nn

    if name:
        found: Any = module
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is not None:
            return found
    own = [
        other
        for other, value in vars(module).items()
        if (
            isinstance(value, nn.Module)
            or (inspect.isclass(value) and issubclass(value, nn.Module))
        )
        and getattr(value, "__module__", module.__name__) == module.__name__
    ]
    if not name and len(own) == 1:
        return vars(module)[own[0]]
    what = f"has no {name!r}" if name else "is named without a factory"
    factories = [other for other, value in vars(module).items() if _is_factory(value, module)]
    told = [f"Its models are {', '.join(own)}."] if own else []
    told += [f"Functions without arguments are {', '.join(factories)}."] if factories else []
    one = (factories or own[-1:] or ["factory"])[0]
    raise SourceError(
        Refusal(
            f"{module.__name__} {what}.",
            why=" ".join(told),
            remedy=f"Name one: {text.partition(':')[0]}:{one}.",
        )
    )


def _is_factory(value: Any, module: ModuleType) -> bool:
    """Whether it is a function of the file's own that can be called as it is."""
    if not inspect.isfunction(value) or value.__module__ != module.__name__:
        return False
    parameters = inspect.signature(value).parameters.values()
    return not value.__name__.startswith("_") and all(
        p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters
    )


def _made(found: Any, text: str) -> Source:
    from torch import nn

    if not isinstance(found, nn.Module):
        if not callable(found):
            raise SourceError(
                Refusal(
                    f"{text} is {type(found).__name__}, and no model and nothing that makes one.",
                    remedy="Name a function that returns the model.",
                )
            )
        try:
            found = found()
        except Exception as error:
            raise _broken(f"{text}()", error) from error
    inputs = None
    if isinstance(found, tuple) and len(found) == 2:
        found, inputs = found
    if not isinstance(found, nn.Module):
        raise SourceError(
            Refusal(
                f"{text} gives {type(found).__name__}, not a model.",
                remedy="Return an nn.Module, or (model, example_inputs).",
            )
        )
    notes = ("the model was put into evaluation mode",) if found.training else ()
    return Source(found.eval(), inputs, notes)


def _broken(place: str, error: Exception) -> SourceError:
    from cachefree.explaining import line_of

    missing = isinstance(error, TypeError) and "argument" in str(error)
    return SourceError(
        Refusal(
            f"{place} raises {type(error).__name__}: {error}",
            remedy="Write a function without arguments that makes the model, and name that."
            if missing
            else "Mend it, or name another factory.",
            where=line_of(error),
        )
    )


def _from_folder(folder: Path, *, needs_weights: bool, trusts_code: bool) -> Source:
    if not (folder / "config.json").is_file():
        raise SourceError(
            Refusal(
                f"{folder} has no config.json.",
                why="A folder is taken as a model of transformers.",
                remedy="Name a file of it: path/to/file.py:factory.",
            )
        )
    try:
        import transformers
    except ImportError as error:
        raise SourceError(
            Refusal("A folder needs transformers.", remedy="pip install transformers")
        ) from error
    import torch

    has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trusts_code)
        kind = _auto_class(transformers, config)
        if has_weights and needs_weights:
            model = kind.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trusts_code
            )
            return Source(model.eval())
        with torch.device("cpu" if needs_weights else "meta"):
            model = kind.from_config(config, trust_remote_code=trusts_code)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise SourceError(
            Refusal(
                f"transformers does not load {folder}: {type(error).__name__}: "
                + str(error).split("\n")[0],
                why=_version(transformers, folder),
                remedy="Pass --trust-remote-code if its own Python files are to run."
                if "trust_remote_code" in str(error)
                else "Load it in a function of your own, and name that.",
            )
        ) from error
    note = ("there are no weights in the folder: random ones are used",) if needs_weights else ()
    return Source(model.eval(), None, note)


def _version(transformers: Any, folder: Path) -> str:
    """Which version loads the folder, and which one wrote it, where that is told."""
    import json

    try:
        written = json.loads((folder / "config.json").read_text()).get("transformers_version")
    except (OSError, ValueError, AttributeError):
        written = None
    saved = f", and the folder was written by {written}" if written else ""
    return f"It is version {getattr(transformers, '__version__', 'unknown')}{saved}."


def _auto_class(transformers: Any, config: Any) -> Any:
    """The class of transformers that has a head for this configuration."""
    names = ["AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq"]
    if getattr(config, "is_encoder_decoder", False):
        names = [*names[1:], names[0]]
    for name in names:
        kind = getattr(transformers, name)
        if type(config) in kind._model_mapping or name in getattr(config, "auto_map", {}):
            return kind
    return transformers.AutoModel
