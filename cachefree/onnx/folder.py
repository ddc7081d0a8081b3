"""A folder that other programs take: the graph, and the files that say what it is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cachefree.errors import CacheFreeError, Refusal
from cachefree.onnx.client_settings import (
    Shown,
    genai_settings,
    generation_settings,
    model_settings,
)
from cachefree.onnx.folder_readme import readme

__all__ = ["GENAI_FILE", "JS_DATA_SUFFIX", "write_folder"]

GENAI_FILE = "genai_config.json"

JS_DATA_SUFFIX = "_data"
"""Behind the name of the graph's file: the name of the weights that Optimum and transformers.js
look for."""
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "chat_template.jinja", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


def write_folder(
    path: Path, shown: Shown, data: Iterable[Path], *, model: Any, tokenizer: Any, kind: str
) -> None:
    """Writes what stands beside a graph.

    Args:
        path: A file of the graph's name, in the directory that is written to.
        shown: What it takes and gives.
        data: The files with weights.
        model: The user's model; its ``config`` and ``generation_config`` are written if it has
            them.
        tokenizer: A folder whose tokenizer files are copied, or what has ``save_pretrained``; None
            for none.
        kind: The kind of the cache.

    Raises:
        CacheFreeError: the tokenizer's files are not there.
    """
    folder = path.parent
    config = {**model_settings(model, shown), "transformers.js_config": _js_settings(data)}
    generation = generation_settings(model, config)
    genai = genai_settings(path.name, shown, config, generation) if kind != "shared" else None
    _put(folder / "config.json", _json(config))
    _put(folder / "generation_config.json", _json(generation))
    if genai is not None:
        _put(folder / GENAI_FILE, _json(genai))
    if tokenizer is not None:
        _copy_tokenizer(tokenizer, folder)
    _put(folder / "README.md", readme(path.name, shown, kind, has_genai=genai is not None))


def _js_settings(data: Iterable[Path]) -> dict[str, Any]:
    """What transformers.js asks for: a file's name without a suffix, and where weights are."""
    files = sorted(file for file in data if file.name.endswith(f".onnx{JS_DATA_SUFFIX}"))
    stored = {file.name.removesuffix(JS_DATA_SUFFIX): 1 for file in files if file.stat().st_size}
    return {"dtype": "fp32", "use_external_data_format": stored}


def _copy_tokenizer(tokenizer: Any, folder: Path) -> None:
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(os.fspath(folder))
        return
    source = Path(tokenizer)
    found = [source / name for name in _TOKENIZER_FILES if (source / name).is_file()]
    if not found:
        raise CacheFreeError(
            Refusal(
                f"There are no files of a tokenizer in {source}.",
                why=f"Known are {', '.join(_TOKENIZER_FILES)}.",
                remedy="Give the folder of the tokenizer, the tokenizer itself, or leave it out.",
            )
        )
    for file in found:
        shutil.copyfile(file, folder / file.name)


def _put(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
