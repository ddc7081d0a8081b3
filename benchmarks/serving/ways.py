"""Ways to run one model: eager, compiled, each kind of ONNX file, and the files of others.

A way is made once, in a process of its own, and opened by each process that measures it. Those that
need another interpreter are run where an environment variable names one, as in ``tests/clients``:
`CACHEFREE_OPTIMUM_PYTHON`, `CACHEFREE_GENAI_PYTHON`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.serving.sizes import Sizes, build

__all__ = ["GENAI", "OURS", "Running", "available", "make", "open_way"]

OURS = ("concat", "attention", "shared", "int8", "int4")
GENAI = "genai"
_FILES = {"optimum": "optimum/model.onnx", "transformers": "transformers/decode.onnx"}
_PYTHON = {"optimum": "CACHEFREE_OPTIMUM_PYTHON", GENAI: "CACHEFREE_GENAI_PYTHON"}


@dataclass(frozen=True)
class Running:
    """A decoder that is ready: tokens, and a cache or None, in; the next cache out."""

    call: Callable[[torch.Tensor, Any], Any]


def available(model: str) -> list[str]:
    """The ways that this machine has for a model; others' exporters take transformers' own."""
    ways = ["eager", "compile", *OURS]
    if model == "transformers":
        ways += ["transformers", *(way for way, name in _PYTHON.items() if os.environ.get(name))]
    return ways


def make(way: str, model: str, sizes: Sizes, folder: Path) -> None:
    """Writes what a way runs; ``cachefree`` writes every kind of its own."""
    if way == "cachefree":
        _write_ours(build(model, sizes), folder)
    elif way == "transformers":
        _write_by_transformers(build(model, sizes), folder)
    elif way in _PYTHON:
        checkpoint = folder / "checkpoint"
        if not checkpoint.exists():
            build(model, sizes).save_pretrained(checkpoint)
            _write_words(checkpoint, sizes.vocabulary)
        python = os.environ[_PYTHON[way]]
        target = str(folder / way)
        commands = {
            "optimum": [python, "-c", _BY_OPTIMUM, str(checkpoint), target],
            GENAI: [
                python, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint),
                "-o", target, "-p", "fp32", "-e", "cpu", "-c", str(folder / "cache"),
            ],
        }  # fmt: skip
        lean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run(commands[way], check=True, env=lean, stdout=subprocess.DEVNULL)


def _write_words(checkpoint: Path, vocabulary: int) -> None:
    """A tokenizer of one word a token: onnxruntime-genai's builder asks for one."""
    import tokenizers

    known = {f"w{number}": number for number in range(vocabulary)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="w0"))
    tokenizer.save(os.fspath(checkpoint / "tokenizer.json"))
    (checkpoint / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )


_BY_OPTIMUM = """
import sys
from optimum.onnxruntime import ORTModelForCausalLM
ORTModelForCausalLM.from_pretrained(sys.argv[1], export=True).save_pretrained(sys.argv[2])
"""


def _write_ours(model: Any, folder: Path) -> None:
    import cachefree

    rewritten = cachefree.rewrite(model, check="off")
    for kind in ("concat", "attention", "shared"):
        path = cachefree.to_onnx(rewritten, folder / f"{kind}.onnx", kv=kind)  # type: ignore[arg-type]
        found = cachefree.load_onnx(path)
        if found.kv.reasons:
            raise SystemExit(f"kv={kind} is joined: {found.kv}")
    for bits in (8, 4):
        quantise(folder / "concat.onnx", folder / f"int{bits}.onnx", bits)


def quantise(source: Path, target: Path, bits: int) -> None:
    """Weights of ``MatMul`` in so many bits, in blocks of 32, by ONNX Runtime's own tool."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(source), bits=bits, block_size=32)
    quantizer.process()
    quantizer.model.save_model_to_file(os.fspath(target), use_external_data_format=True)


def _write_by_transformers(model: Any, folder: Path) -> None:
    from transformers.exporters.auto import AutoHfExporter
    from transformers.exporters.configs import OnnxConfig

    settings = OnnxConfig(dynamic=True)
    ids = torch.ones(2, 6, dtype=torch.int64)
    exported = AutoHfExporter.from_config(settings).export_for_generation(
        model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, settings
    )
    exported.save_pretrained(folder / "transformers")
    found = sorted((folder / "transformers").rglob("*.onnx"))
    decode = [path for path in found if "decode" in path.name or "decode" in path.parent.name]
    if len(decode) != 1:
        raise SystemExit(f"transformers wrote {[path.name for path in found]}, no decode step")
    if decode[0] != folder / _FILES["transformers"]:
        for path in decode[0].parent.iterdir():  # weights stand beside a graph
            shutil.copy(path, folder / "transformers")
        shutil.copy(decode[0], folder / _FILES["transformers"])


def open_way(way: str, model: str, sizes: Sizes, folder: Path) -> Running:
    """Opens what `make` wrote, with one thread."""
    if way in ("eager", "compile"):
        return _torch(build(model, sizes), is_compiled=way == "compile")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if way in _FILES:
        file = folder / _FILES[way]
        beside = file.with_name("prefill.onnx")  # where a step is one token, and no first call
        files = [file, beside] if beside.exists() else [file]
        sessions = [
            onnxruntime.InferenceSession(each, options, providers=["CPUExecutionProvider"])
            for each in files
        ]
        return Running(_by_names(*sessions))
    import cachefree

    decoder = cachefree.load_onnx(
        folder / f"{way}.onnx", providers=["CPUExecutionProvider"], session_options=options
    )
    plain = {spec.name for spec in decoder.interface.inputs if not spec.is_cache}

    def call(ids: torch.Tensor, cache: Any) -> Any:
        slots, past = ({}, 0) if cache is None else cache
        given = _given(plain, ids, past)
        outputs = decoder(**given, **slots)
        return decoder.next_cache(outputs), past + ids.shape[1]

    return Running(call)


def _given(names: set[str], ids: torch.Tensor, past: int) -> dict[str, torch.Tensor]:
    """The inputs that are no cache, of those that a graph takes."""
    batch, new = ids.shape
    whole = past + new
    every = {
        "input_ids": ids,
        "attention_mask": torch.ones(batch, whole, dtype=torch.int64),
        "position_ids": torch.arange(past, whole)[None].expand(batch, new).contiguous(),
        "cache_position": torch.arange(past, whole),
    }
    return {name: value for name, value in every.items() if name in names}


def _torch(model: Any, *, is_compiled: bool) -> Running:
    run = torch.compile(model, dynamic=True) if is_compiled else model

    def call(ids: torch.Tensor, cache: Any) -> Any:
        with torch.inference_mode():
            outputs = run(ids, cache) if not hasattr(model, "generate") else run(
                input_ids=ids, past_key_values=cache, use_cache=True
            )  # fmt: skip
        return outputs[1]

    return Running(call)


def _by_names(session: Any, first: Any = None) -> Callable[[torch.Tensor, Any], Any]:
    """Drives files of others: their cache are the inputs of rank four, in order."""
    import onnxruntime

    inputs, outputs = session.get_inputs(), session.get_outputs()
    pasts = [value for value in inputs if len(value.shape) == 4]
    presents = [value.name for value in outputs if len(value.shape) == 4]
    plain = {value.name for value in inputs} - {value.name for value in pasts}
    wanted = [value.name for value in outputs]
    if len(pasts) != len(presents) or not pasts:
        raise SystemExit(f"{len(pasts)} pasts, {len(presents)} presents: this file has no cache")

    def fed(names: set[str], ids: torch.Tensor, past: int) -> dict[str, Any]:
        return {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(value.numpy())
            for name, value in _given(names, ids, past).items()
        }

    def call(ids: torch.Tensor, cache: Any) -> Any:
        if cache is None and first is not None:
            given = [value.name for value in first.get_outputs() if len(value.shape) == 4]
            taken = {value.name for value in first.get_inputs()}
            return first.run_with_ort_values(given, fed(taken, ids, 0)), ids.shape[1]
        values, past = cache or ([_empty(value) for value in pasts], 0)
        feeds = fed(plain, ids, past)
        feeds |= dict(zip((value.name for value in pasts), values, strict=True))
        found = dict(zip(wanted, session.run_with_ort_values(wanted, feeds), strict=True))
        return [found[name] for name in presents], past + ids.shape[1]

    return call


def _empty(value: Any) -> Any:
    import numpy
    import onnxruntime

    _, heads, _, size = value.shape
    return onnxruntime.OrtValue.ortvalue_from_numpy(
        numpy.zeros((1, int(heads), 0, int(size)), numpy.float32)
    )
