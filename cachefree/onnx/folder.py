"""A folder that other programs take: the graph, and the files that say what it is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sympy

from cachefree.errors import CacheFreeError, Refusal
from cachefree.onnx.names import Names
from cachefree.sizes import size_symbol
from cachefree.spec import Interface

__all__ = ["JS_DATA_SUFFIX", "write_folder"]

JS_DATA_SUFFIX = "_data"
"""Behind the name of the graph's file: the name of the weights that Optimum and transformers.js
look for."""
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "chat_template.jinja",
)  # fmt: skip


def write_folder(
    path: Path,
    interface: Interface,
    names: Names,
    *,
    model: Any,
    tokenizer: Any,
    vocabulary: int | None,
    kind: str,
) -> None:
    """Writes what stands beside a graph.

    Args:
        path: The graph's file.
        interface: Its inputs and outputs.
        names: Their names.
        model: The user's model; its ``config`` and ``generation_config`` are written if it has
            them.
        tokenizer: A folder whose tokenizer files are copied, or what has ``save_pretrained``; None
            for none.
        vocabulary: V, where it is known.
        kind: The kind of the cache.

    Raises:
        CacheFreeError: the tokenizer's files are not there.
    """
    folder = path.parent
    config = {**_sizes(interface, names, vocabulary), **_settings(model, "config")}
    config.setdefault("model_type", type(model).__name__.lower())
    generation = _settings(model, "generation_config")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if key not in generation and config.get(key) is not None:
            generation[key] = config[key]
    _put(folder / "config.json", _json(config))
    _put(folder / "generation_config.json", _json(generation))
    genai = _genai(path.name, interface, names, config, generation) if kind != "shared" else None
    if genai is not None:
        _put(folder / "genai_config.json", _json(genai))
    if tokenizer is not None:
        _copy_tokenizer(tokenizer, folder)
    _put(folder / "README.md", _readme(path.name, names, kind, has_genai=genai is not None))


def _settings(model: Any, name: str) -> dict[str, Any]:
    """A model's own settings, those of them that JSON has."""
    settings: Any = getattr(model, name, None)
    found = settings.to_dict() if hasattr(settings, "to_dict") else {}
    if not isinstance(found, Mapping):
        return {}
    return {key: value for key, value in found.items() if value is None or _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(part) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float, bool))


def _keys(interface: Interface, names: Names) -> list[tuple[str, Sequence[Any]]]:
    """The names of the past keys with their shapes, a layer each."""
    return [
        (name, spec.shape)
        for name, spec in zip(names.inputs, interface.inputs, strict=True)
        if name.startswith("past_key_values.") and name.endswith(".key")
    ]


def _sizes(interface: Interface, names: Names, vocabulary: int | None) -> dict[str, Any]:
    """What the shapes tell: layers, heads, their size, the vocabulary."""
    found: dict[str, Any] = {} if vocabulary is None else {"vocab_size": vocabulary}
    keys = _keys(interface, names)
    if keys and all(len(shape) == 4 for _, shape in keys):
        _, shape = keys[0]
        found |= {
            "num_hidden_layers": len(keys),
            "num_key_value_heads": int(shape[1]) if sympy.sympify(shape[1]).is_Integer else None,
            "head_dim": int(shape[3]) if sympy.sympify(shape[3]).is_Integer else None,
        }
    return found


def _largest_length(interface: Interface) -> int:
    """How many tokens the domain has room for."""
    base = dict.fromkeys(interface.symbols, 1) | dict.fromkeys(interface.past_symbols, 0)
    lengths = [1 << power for power in range(1, 18)]
    query = str(size_symbol("query"))
    fits = [n for n in lengths if query in base and interface.domain.holds({**base, query: n})]
    return max(fits, default=lengths[-1])


def _genai(
    file: str,
    interface: Interface,
    names: Names,
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
) -> dict[str, Any] | None:
    """What onnxruntime-genai reads; None where the cache is not keys and values a layer."""
    keys = _keys(interface, names)
    plain = [name for name in names.inputs if not name.startswith("past_key_values.")]
    known = {"input_ids", "attention_mask", "position_ids"}
    if not keys or len(keys) * 2 != len(interface.cache) or not known.issuperset(plain):
        return None
    heads = config.get("num_key_value_heads")
    size = config.get("head_dim")
    queries = config.get("num_attention_heads") or config.get("n_head") or heads
    return {
        "model": {
            "type": "decoder",
            "context_length": config.get("max_position_embeddings") or _largest_length(interface),
            "vocab_size": config.get("vocab_size"),
            "bos_token_id": generation.get("bos_token_id") or 0,
            "eos_token_id": generation.get("eos_token_id") or 0,
            "pad_token_id": generation.get("pad_token_id") or generation.get("eos_token_id") or 0,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": file,
                "head_size": size,
                "hidden_size": config.get("hidden_size") or config.get("n_embd")
                or (queries or 0) * (size or 0),
                "num_attention_heads": queries,
                "num_hidden_layers": len(keys),
                "num_key_value_heads": heads,
                "inputs": {
                    **{name: name for name in plain},
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": names.logits,
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"past_present_share_buffer": False, "do_sample": False, "num_beams": 1,
                   "max_length": config.get("max_position_embeddings")
                   or _largest_length(interface)},
    }  # fmt: skip


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
        if file.parent.resolve() != folder.resolve():
            shutil.copyfile(file, folder / file.name)


def _put(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _readme(file: str, names: Names, kind: str, *, has_genai: bool) -> str:
    parts = [_OURS.format(file=file)]
    if kind == "shared":
        parts.append(_SHARED)
    else:
        if "input_ids" in names.inputs and names.logits is not None:
            parts += [_OPTIMUM.format(file=file), _JS.format(name=file.removesuffix(".onnx"))]
        if has_genai:
            parts.append(_GENAI)
    return "# One graph for the first call and every later one\n\n" + "\n".join(parts)


_OURS = """Written by `cachefree.to_onnx`. The cache is always a tensor: of zero length on the first
call.

```python
import cachefree

decoder = cachefree.load_onnx("{file}")
ids = decoder.generate(input_ids, 20)
```
"""
_SHARED = """Past and present share a buffer here, which `cachefree.load_onnx` drives. For other
programs, export with `kv="concat"`.
"""
_OPTIMUM = """Optimum (Python), which needs a `model_type` in `config.json` that transformers knows:

```python
from optimum.onnxruntime import ORTModelForCausalLM

model = ORTModelForCausalLM.from_pretrained(".", file_name="{file}", use_cache=True)
model.generate(input_ids, max_new_tokens=20)
```
"""
_JS = """transformers.js (with the same condition, and a tokenizer in this folder):

```js
import {{ AutoModelForCausalLM, env }} from "@huggingface/transformers";

env.localModelPath = "..";
const model = await AutoModelForCausalLM.from_pretrained("this-folder", {{
  subfolder: "", model_file_name: "{name}", dtype: "fp32", use_external_data_format: true,
}});
```
"""
_GENAI = """onnxruntime-genai (`genai_config.json` says what is what):

```python
import onnxruntime_genai

model = onnxruntime_genai.Model(".")
```
"""
