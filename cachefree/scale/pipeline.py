"""The one graph in stages, each in a process of its own with its own weights and cache slots."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from cachefree.calls import TensorSpec
from cachefree.errors import CacheFreeError, DomainError, Refusal, StageError
from cachefree.onnx.calling import bind_arguments
from cachefree.onnx.domain import check_domain, concrete, read_sizes
from cachefree.onnx.generation import Options, generate
from cachefree.onnx.metadata import FileDescription
from cachefree.onnx.names import name_interface
from cachefree.onnx.stepping import take_rows
from cachefree.scale.agreement import Said, agreed
from cachefree.scale.links import Failure, Links
from cachefree.scale.loading import load
from cachefree.scale.parts import Part, parted
from cachefree.spec import Interface
from cachefree.vocabulary import vocabulary_sizes

__all__ = ["PipelinedDecoder", "pipeline"]


def pipeline(
    rewritten: Any,
    *,
    stages: int | Sequence[str] | None = None,
    weights: Any = None,
    device: torch.device | str | None = None,
    timeout: float = 60.0,
    group: Any = None,
) -> PipelinedDecoder:
    """One stage of the one graph in each process of a group, weights and cache slots with it.

    Every process calls this with the same rewritten model, and then makes the same calls. The model
    may be on the ``meta`` device; then no process ever holds more weights than its stage's.

    Args:
        rewritten: What ``cachefree.rewrite`` gave.
        stages: How many stages, which is how many processes there are (None: that many, with about
            equal shares of the weights); or the modules with which the later ones begin, such as
            ``["model.layers.8", "model.layers.16"]`` for three.
        weights: A safetensors file, an index of shards, a folder, a checkpoint, a ``state_dict``,
            or `cachefree.Weights`. Each process reads the weights of its stage. None: the model's.
        device: Where this process computes. None: the CPU.
        timeout: In seconds: how long to wait for another stage before a call fails.
        group: The processes, a ``torch.distributed.ProcessGroup``. None: all.

    Raises:
        CacheFreeError: in every process, whichever it was that met it: there is no process group,
            the graph cannot be cut so, a weight is missing, or a shard is missing or cut off.
        StageError: a process is gone or does not answer.
    """
    links = Links(group, timeout)
    where = torch.device(device if device is not None else "cpu")
    made: PipelinedDecoder | None = None
    said, graph = "", ""
    try:
        rewritten.refresh()
        interface: Interface = rewritten.interface
        part = parted(
            rewritten.graph_module, interface, _checked(stages, links.count), links.number, where
        )
        slots = [interface.cache[slot] for slot in part.slots]
        neutral = load(part, rewritten, slots, weights, where)
        made = PipelinedDecoder(part, links, rewritten, neutral, where)
        graph = hashlib.sha256(f"{rewritten.graph_module.graph}{stages}".encode()).hexdigest()
    except Exception as error:
        said = str(error) if isinstance(error, CacheFreeError) else f"{type(error).__name__}: {error}"
    told = links.all_told((said, graph))
    failed = [(stage, text) for stage, (text, _) in enumerate(told) if text]
    if failed:
        raise CacheFreeError(
            *(f"Stage {stage + 1} of {links.count} was not made: {text}" for stage, text in failed)
        )
    if len({graph for _, graph in told}) > 1:
        raise CacheFreeError(
            Refusal(
                "The processes rewrote different models, or cut them differently.",
                why="The stages of one pipeline are parts of one graph.",
                remedy="Run the same script with the same model in each process.",
            )
        )
    assert made is not None
    return made


def _checked(stages: int | Sequence[str] | None, count: int) -> int | Sequence[str]:
    wanted = count if stages is None else stages if isinstance(stages, int) else len(stages) + 1
    if wanted != count:
        raise CacheFreeError(
            Refusal(
                f"stages={stages!r} makes {wanted} stages, and there are {count} processes.",
                why="Each process runs one stage.",
                remedy=f"Start {wanted} processes: torchrun --nproc-per-node {wanted}.",
            )
        )
    return count if stages is None else stages


class PipelinedDecoder:
    """One process's stage of the one graph; a call of it is a call of all stages.

    Every process calls it with the same inputs, and gets the same outputs; the cache is each
    stage's own. Whatever is refused or fails in one process is an error in all of them.

    Attributes:
        stage: Which stage this is, from 0.
        stages: How many there are.
        graph_module: What this stage computes; its parameters are the stage's, under the model's
            names.
        interface: The inputs, outputs and cache slots that this stage has.
    """

    def __init__(
        self,
        part: Part,
        links: Links,
        rewritten: Any,
        neutral: Mapping[str, torch.Tensor],
        device: torch.device,
    ) -> None:
        self.stage, self.stages = links.number, links.count
        self.graph_module = part.graph_module
        self.device = device
        self._part, self._links, self._neutral = part, links, neutral
        self._whole: Interface = rewritten.interface
        self._calling = copy.copy(rewritten.calling)  # which does not hold on to the model
        slots = tuple(self._whole.cache[slot] for slot in part.slots)
        own = {slot.past.name for slot in slots}
        self.interface = replace(
            self._whole,
            inputs=tuple(s for s in self._whole.inputs if not s.is_cache or s.name in own),
            outputs=tuple(
                spec
                for place, spec in enumerate(self._whole.outputs)
                if not spec.is_cache or place in part.outputs
            ),
            cache=slots,
        )
        self._description = _description(rewritten, self.interface)

    def __repr__(self) -> str:
        size = sum(parameter.numel() for parameter in self.graph_module.parameters())
        return (
            f"PipelinedDecoder(stage {self.stage + 1} of {self.stages}; {size} parameters; "
            f"{len(self.interface.cache)} cache tensors; {self.device})"
        )

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Runs all stages once.

        Args:
            args: The model's arguments by position, in plain tuples, lists and dicts.
            kwargs: The same by name, or tensors by their names in ``interface``. A cache is this
                stage's: what `next_cache` gave. Left out (or None), it is the neutral one.

        Returns:
            Output name → tensor: the outputs beside the cache, and this stage's part of the cache.

        Raises:
            DomainError: in every process: an input is missing, of another dtype or size than the
                graph takes, or not the same in all of them.
            StageError: a stage is gone, does not answer, or could not compute its part.
        """
        return self._call(args, kwargs, None)

    def next_cache(self, outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This stage's cache for the next call, by input name, from the outputs of one."""
        return {slot.past.name: outputs[slot.present.name] for slot in self.interface.cache}

    def generate(
        self,
        input_ids: torch.Tensor,
        max_new_tokens: int = 20,
        *,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        num_beams: int = 1,
        seed: int | None = None,
        prefill_chunk: int | None = None,
        streamer: Any = None,
        progress: Callable[[int, int], None] | None = None,
        **inputs: Any,
    ) -> torch.Tensor:
        """Continues token ids, with the cache; the arguments are those of `OnnxDecoder.generate`.

        Every process gives the same arguments and gets the same ids. Without a ``seed`` the first
        stage draws one for all.

        Raises:
            DomainError: the graph takes no token ids or gives no scores, a call is outside the
                domain, or the options contradict one another.
            StageError: a stage is gone, does not answer, or could not compute its part.
        """
        ends = () if eos_token_id is None else eos_token_id
        if do_sample and seed is None:
            seed = self._links.all_told(torch.Generator().seed() >> 1)[0]
        options = Options(
            max_new_tokens,
            (ends,) if isinstance(ends, int) else tuple(ends),
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            num_beams=num_beams,
            seed=seed,
            prefill_chunk=prefill_chunk,
            streamer=streamer,
            progress=progress,
        )
        return generate(_LastScores(self), self._description, input_ids, inputs, options)

    def reordered(
        self, cache: Mapping[str, torch.Tensor], rows: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Rows of the batch of this stage's cache, some perhaps twice."""
        batch = read_sizes(self.interface, cache).get("batch", 1) if cache else 1
        return {
            slot.past.name: take_rows(cache[slot.past.name], slot.past, rows, batch)
            for slot in self.interface.cache
        }

    # One call.

    def _call(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], last_of: str | None
    ) -> dict[str, torch.Tensor]:
        given: dict[str, torch.Tensor] = {}
        said = Said()
        try:
            given = bind_arguments(self.interface, args, kwargs)
            said = Said.of_call(self.interface, given)
        except DomainError as error:
            said = Said(refusals=error.refusals)
        sizes, is_first = agreed(self._links.all_told(said), self._whole)
        check_domain(self._whole, sizes, is_first=is_first)
        with torch.no_grad():
            values = self._computed(given, sizes)
            return self._handed_out(values, last_of)

    def _computed(
        self, given: Mapping[str, torch.Tensor], sizes: Mapping[str, int]
    ) -> dict[str, Any] | Failure:
        """What this stage takes and makes, by the names of the whole graph's values."""
        values: dict[str, Any] = {}
        failure: Failure | None = None
        for stage, names in self._part.taken.items():
            failure = self._received(stage, names, values) or failure
        if failure is None:
            try:
                values |= self._own(given, sizes, values)
            except Exception as error:
                failure = Failure(self.stage, f"{type(error).__name__}: {error}")
        for links in (self._part.given, self._part.sent_back):
            for stage, names in links.items():
                self._links.send(stage, failure or [values[name] for name in names])
        for stage, names in self._part.got_back.items():
            failure = self._received(stage, names, values) or failure
        return failure or values

    def _received(
        self, stage: int, names: Sequence[str], values: dict[str, Any]
    ) -> Failure | None:
        found = self._links.receive(stage, self.device)
        if isinstance(found, Failure):
            return found
        values.update(zip(names, found, strict=True))
        return None

    def _own(
        self, given: Mapping[str, torch.Tensor], sizes: Mapping[str, int], taken: dict[str, Any]
    ) -> dict[str, Any]:
        part = self._part
        values = dict(taken)
        for name, spec in part.of_call.items():
            if name not in values:
                values[name] = self._input(spec, given, sizes)
        shapes = {spec.name: spec.shape for spec in self._whole.inputs}
        for name, (spec, axis) in part.sizes.items():
            values[name] = concrete((shapes[spec][axis],), sizes)[0]
        results = self.graph_module(*(values[name] for name in part.inputs))
        return {**values, **dict(zip(part.results, results, strict=True))}

    def _input(
        self, name: str, given: Mapping[str, torch.Tensor], sizes: Mapping[str, int]
    ) -> torch.Tensor:
        if name in given:
            return given[name].to(self.device)
        path = next(spec.path for spec in self._whole.inputs if spec.name == name)
        spec = next(
            leaf
            for place in self._calling.caches
            for leaf in place.leaves
            if isinstance(leaf, TensorSpec) and leaf.path == path
        )
        known = {**dict.fromkeys(self._whole.symbols, 0), **sizes}
        return self._calling.neutral(
            spec, known, self.device, attribute=self._neutral.__getitem__
        )

    def _handed_out(
        self, values: dict[str, Any] | Failure, last_of: str | None
    ) -> dict[str, torch.Tensor]:
        told = self._links.all_told(values if isinstance(values, Failure) else None)
        failures = [failure for failure in told if failure is not None]
        if isinstance(values, Failure) or failures:
            first = min(failures, key=lambda failure: failure.stage)
            raise StageError(
                Refusal(
                    f"Stage {first.stage + 1} of {self.stages} could not compute its part.",
                    why=first.reason,
                    remedy="Look at that process; calls with other inputs can be made.",
                )
            )
        outputs: dict[str, torch.Tensor] = {}
        for place, spec in enumerate(self._whole.outputs):
            name = self._part.outputs.get(place)
            if spec.is_cache:
                if name is not None:
                    outputs[spec.name] = values[name]
                continue
            own = [] if name is None else [values[name]]
            if own and spec.name == last_of:
                own = [_last(own[0], spec.shape)]
            outputs[spec.name] = self._links.share(self._part.makers[place], own, self.device)[0]
        return outputs


class _LastScores:
    """A decoder whose scores are those of the last token: no more of them are sent around."""

    def __init__(self, decoder: PipelinedDecoder) -> None:
        self.decoder = decoder
        self.next_cache, self.reordered = decoder.next_cache, decoder.reordered

    def __call__(self, **inputs: Any) -> dict[str, torch.Tensor]:
        return self.decoder._call((), inputs, self.decoder._description.logits)


def _last(scores: torch.Tensor, shape: Sequence[Any]) -> torch.Tensor:
    axis = next((axis for axis, size in enumerate(shape) if str(size) == "query"), None)
    return scores if axis is None else scores.narrow(axis, -1, 1)


def _description(rewritten: Any, interface: Interface) -> FileDescription:
    """Which input takes the tokens, and which output scores them."""
    whole: Interface = rewritten.interface
    rows = zip(whole.inputs, vocabulary_sizes(rewritten.graph_module), strict=True)
    vocabulary = {spec.name: size for spec, size in rows if size is not None}
    names = name_interface(whole, "model", vocabulary)
    inputs = dict(zip(names.inputs, whole.inputs, strict=True))
    outputs = dict(zip(names.outputs, whole.outputs, strict=True))
    return FileDescription(
        interface,
        (),
        str(rewritten.report.verdict),
        None if names.tokens is None else inputs[names.tokens].name,
        None if names.logits is None else outputs[names.logits].name,
    )
