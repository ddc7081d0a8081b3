"""The one graph as an ONNX file: exported, named, described, checked, and put in place whole."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cachefree.errors import CacheFreeError, Refusal
from cachefree.explaining import foreseen
from cachefree.graph import bodies
from cachefree.onnx.attention.choosing import opset_of, with_kind
from cachefree.onnx.attention.kinds import KV, KvGraph
from cachefree.onnx.attention.shared import LENGTH
from cachefree.onnx.client_settings import Shown
from cachefree.onnx.exporting import (
    export,
    give_length,
    name_values,
    order_by_layer,
    refuse_control_flow,
    save,
    save_graph,
)
from cachefree.onnx.folder import GENAI_FILE, JS_DATA_SUFFIX, write_folder
from cachefree.onnx.loops.choices import Beam, Greedy
from cachefree.onnx.loops.composing import compose, plan_of
from cachefree.onnx.masks import repeat_masks
from cachefree.onnx.metadata import describe, describe_cache, describe_loop, neutral_elements
from cachefree.onnx.names import Names, Style, name_interface
from cachefree.onnx.pairs import refuse_complex
from cachefree.onnx.placing import place
from cachefree.onnx.program import exported_program
from cachefree.onnx.rotary import repeat_angles
from cachefree.onnx.stages import split, stage_targets
from cachefree.onnx.storage import data_file, files_beside, new_folder, replace_files
from cachefree.onnx.weights import Matched, matched_weights
from cachefree.preconditions import refuse_no_path, refuse_not_rewritten
from cachefree.vocabulary import vocabulary_sizes

if TYPE_CHECKING:
    from cachefree.spec import Interface

__all__ = ["DECODER_FILE", "ENCODER_FILE", "MODEL_FILE", "to_onnx"]

log = logging.getLogger(__name__)
MODEL_FILE = "model.onnx"
DECODER_FILE = "decoder_model_merged.onnx"
ENCODER_FILE = "encoder_model.onnx"


@foreseen("The ONNX file could not be written")
def to_onnx(
    rewritten: Any,
    path: str | os.PathLike[str],
    *,
    names: Style = "optimum",
    kv: KV = "concat",
    loop: Greedy | None = None,
    stages: int | None = None,
    folder: bool = False,
    tokenizer: Any = None,
    opset: int | None = None,
    weights: Any = None,
    resume: bool = False,
    progress: Callable[[str], None] | None = None,
    certificate: bool = False,
) -> Path:
    """Writes the one graph as an ONNX file that serves the first call and every later one.

    The weights stand in ``<path>.data`` beside it, each once (tensors under 256 bytes stand in the
    file). The file says its verdict, its domain and what a neutral cache is, so that `load_onnx`
    needs nothing else. Files that were there before are replaced when the new ones are complete.

    A float64 model comes out within about 1e-7: torch.onnx writes the scale of attention, and ONNX
    Runtime computes ``Attention``, in float32.

    Args:
        rewritten: What ``cachefree.rewrite`` gave.
        path: Where to, usually ``model.onnx``; or a folder (a path without ``.onnx``), in which the
            file is ``model.onnx``, or ``decoder_model_merged.onnx`` where the model has an encoder.
            The encoder is written beside it, as ``encoder_model.onnx``.
        names: ``"optimum"`` (``past_key_values.0.key`` → ``present.0.key``), ``"genai"``
            (onnxruntime-genai's), or ``"model"`` (the arguments' own paths).
        kv: How the cache grows. ``"concat"``: by a join, which copies it at each step; every
            runtime takes that. ``"attention"``: the join and the attention that reads it are one
            ``Attention`` with a past and a present. ``"shared"``: past and present are one buffer
            of a fixed capacity, and nothing is copied (``GroupQueryAttention``, or
            ``TensorScatter`` with ``Attention``); `load_onnx` drives it and lets it grow. A slot
            whose attention is not shown to be such an operator is joined, and the file says why:
            `OnnxDecoder.kv`.
        loop: `cachefree.Greedy` or `cachefree.Beam`: the file then holds a whole generation, a
            ``Loop`` whose body is the one graph, weights once: ``input_ids``, ``attention_mask``
            and ``max_new_tokens`` in, ``sequences`` out.
        stages: In how many files to write the graph, cut between layers: ``decoder-stage1of4.onnx``
            and so on, each with its own weights and its own slots of the cache. `load_onnx` runs
            them one after the other from one call.
        folder: Whether to write beside it what other programs look for: ``config.json``,
            ``generation_config.json``, ``genai_config.json`` (where the cache is a key and a value
            a layer), a ``README.md`` with the call for each, and the tokenizer's files.
        tokenizer: With ``folder``: a folder whose tokenizer files are copied, or what has
            ``save_pretrained``.
        opset: The ONNX opset. None: 23, or the newest that this torch writes.
        weights: Where the weights are, of a model without values (on ``meta``) or in place of its
            own: a safetensors file, an index of shards, a torch checkpoint, a folder with one of
            these, a ``state_dict``, a list of these, or a `Weights`. The ONNX file points into
            safetensors files where their layout fits, through hard links where they are in another
            folder; what does not fit is written, one tensor at a time.
        resume: With ``weights``: keep what was written when writing is interrupted, and go on from
            there.
        progress: Called with a few words before each step.
        certificate: Whether to write the proof beside it, with the digests of these files:
            ``decoder.certificate.json`` beside ``decoder.onnx``, for
            ``cachefree.check_certificate``.

    Returns:
        The path of the one graph; with ``stages``, of the first one.

    Raises:
        CacheFreeError: the weights are on the meta device and ``weights`` is not given, or some are
            missing there, of another shape or dtype, or not the model's (all are listed, and
            nothing is written); the exporter cannot write an operator; or the path cannot be
            written.
    """
    refuse_not_rewritten(rewritten, "to_onnx")
    refuse_no_path(path, "to_onnx")
    rewritten.refresh()
    say = progress or (lambda step: None)
    matched = None if weights is None else matched_weights(weights, rewritten)
    beside_it: Interface | None = rewritten.encoder_interface
    for part in (rewritten.interface, beside_it):
        if part is not None:
            refuse_complex(part)
    target = _target(Path(path), has_encoder=beside_it is not None)
    interface: Interface = rewritten.interface
    vocabulary = _looked_up(rewritten.graph_module, interface)
    one = _Graph(rewritten.graph_module, interface, names, _neutral(rewritten, matched), vocabulary)
    verdict = _verdict(rewritten)
    source = None if matched is None else _Source(matched, target.parent, resume)
    proof = rewritten.certificate if certificate else None
    if loop is not None:
        _check_loop(beside_it, kv)
        one.loop = loop
    changed = with_kind(one.module, one.interface, kv, opset)
    version = opset_of(changed) if opset is None else opset
    stored = target.name + JS_DATA_SUFFIX if folder else None
    with contextlib.ExitStack() as files:
        if target != Path(path):
            files.enter_context(new_folder(target.parent))
        if folder:
            staged = files.enter_context(files_beside(target.parent, [GENAI_FILE]))
        proved = files.enter_context(replace_files(_certificate_file(target))) if proof else None
        if beside_it is not None:
            encoder = _Graph(
                rewritten.encoder, beside_it, names, [], _looked_up(rewritten.encoder, beside_it)
            )
            name = ENCODER_FILE + JS_DATA_SUFFIX if folder else None
            beside = files.enter_context(replace_files(target.with_name(ENCODER_FILE), name))
            _write(encoder, [beside], verdict, version, say, source, name)
        one.kv = changed
        targets = [target] if stages is None else stage_targets(target, stages, loop, proof, folder)
        written = [files.enter_context(replace_files(part, stored)) for part in targets]
        _write(one, written, verdict, version, say, source, stored)
        if proof is not None and proved is not None:
            say("writing the certificate")
            proof.for_onnx(written[0]).save(proved)
        if folder:
            shown = Shown(
                interface,
                one.names,
                encoder.names if beside_it is not None else None,
                next(iter(vocabulary.values()), None),
            )
            data = [file for part in written for file in part.parent.iterdir()]
            data += beside.parent.iterdir() if beside_it is not None else []
            model = _model_of(rewritten)
            path_there = staged / target.name
            write_folder(path_there, shown, data, model=model, tokenizer=tokenizer, kind=kv)
    return targets[0]


def _looked_up(module: Any, interface: Interface) -> dict[str, int]:
    """Input name → rows of the table that its ids are looked up in."""
    rows = zip(interface.inputs, vocabulary_sizes(module), strict=True)
    return {spec.name: size for spec, size in rows if size is not None}


def _certificate_file(target: Path) -> Path:
    return target.with_suffix(".certificate.json")


def _model_of(rewritten: Any) -> Any:
    """The user's own model; None for a rewritten one that was copied."""
    return getattr(rewritten.__dict__.get("_origin"), "model", None)


def _check_loop(encoder: Any, kind: str) -> None:
    """Refuses what a loop does not hold."""
    if encoder is None and kind != "shared":
        return
    raise CacheFreeError(
        Refusal(
            "A generation in one file takes no "
            + ("shared buffers." if encoder is None else "encoder."),
            why=(
                "What a loop carries from turn to turn is a value, and no buffer."
                if encoder is None
                else "The encoder is a file of its own."
            ),
            remedy='Use kv="attention" or kv="concat", or leave loop= out.',
        )
    )


def _target(path: Path, *, has_encoder: bool) -> Path:
    if path.suffix == ".onnx":
        return path
    return path / (DECODER_FILE if has_encoder else MODEL_FILE)


@dataclass
class _Graph:
    module: Any
    interface: Interface
    style: Style
    neutral: list[Any]
    vocabulary: dict[str, int]
    kv: KvGraph | None = None
    loop: Greedy | None = None

    @property
    def names(self) -> Names:
        return name_interface(self.interface, self.style, self.vocabulary)


@dataclass
class _Source:
    """Weights that are not in the model, the folder to write to, and whether to go on there."""

    matched: Matched
    home: Path
    is_resumed: bool


def _write(
    graph: _Graph,
    paths: Sequence[Path],
    verdict: str,
    opset: int,
    say: Callable[[str], None],
    source: _Source | None,
    stored: str | None = None,
) -> None:
    chosen = graph.names
    say("writing the graph")
    module, interface, inputs = graph.module, graph.interface, chosen.inputs
    if graph.kv is not None:
        module, interface = graph.kv.module, graph.kv.interface
    if len(interface.inputs) > len(inputs):
        inputs = (*inputs, LENGTH)
    program = exported_program(module, interface, has_values=source is None)
    say("exporting to ONNX")
    model = export(program, opset, None if source is None else source.matched)
    repeat_angles(model)
    repeat_masks(model)
    name_values(model, interface, dataclasses.replace(chosen, inputs=inputs))
    if len(inputs) > len(chosen.inputs):
        give_length(model)
    model.metadata_props.update(
        describe(graph.interface, chosen, graph.neutral, verdict, graph.vocabulary)
    )
    if graph.kv is not None:
        model.metadata_props.update(describe_cache(graph.kv))
    refuse_control_flow(model, has_scans=bool(bodies(module)))
    if graph.loop is not None:
        beams = graph.loop.num_beams if isinstance(graph.loop, Beam) else 1
        plan = plan_of(graph.interface, chosen, graph.neutral, beams)
        say("writing the loop")
        model.metadata_props.update(describe_loop(beams, graph.loop.ends))
        model = compose(model, plan, chosen, graph.loop, lambda part: export(part, opset, None))
    elif len(paths) == 1 and graph.style != "model":
        order_by_layer(model)
    say("saving the weights")
    for part, path in zip(split(model, len(paths)), paths, strict=True):
        name = stored or data_file(path).name
        if source is None:
            save(part, path, name)
        else:
            place(part, source.matched, path, source.home, name, is_resumed=source.is_resumed)
            save_graph(part, path)


def _neutral(rewritten: Any, matched: Matched | None) -> list[Any]:
    interface: Interface = rewritten.interface
    sizes = dict.fromkeys(interface.symbols, 2) | dict.fromkeys(interface.past_symbols, 0)

    def value(name: str) -> torch.Tensor:
        own: torch.Tensor = rewritten.calling.attribute(name)
        return own if matched is None else matched.value(name, own)

    where = {} if matched is None else {"device": torch.device("cpu"), "attribute": value}
    one = rewritten.neutral_slots({**sizes, "batch": 1}, **where)
    return neutral_elements(
        one,
        rewritten.neutral_slots({**sizes, "batch": 2}, **where),
        [slot.past.path for slot in interface.cache],
    )


def _verdict(rewritten: Any) -> str:
    verdict = rewritten.report.verdict
    return str(getattr(verdict, "name", verdict))
