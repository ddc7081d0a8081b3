"""The one graph in stages, each in a process of its own with its own weights and cache slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from cachefree.errors import CacheFreeError, Refusal, StageError
from cachefree.onnx.domain import concrete
from cachefree.scale.agreement import same_in_all
from cachefree.scale.decoder import JointDecoder, last_token
from cachefree.scale.links import Failure, Links
from cachefree.scale.loading import load
from cachefree.scale.parts import Part, parted
from cachefree.spec import Interface

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

    def made() -> PipelinedDecoder:
        rewritten.refresh()
        interface: Interface = rewritten.interface
        wanted = _checked(stages, links.count)
        part = parted(rewritten.graph_module, interface, wanted, links.number, where)
        slots = [interface.cache[slot] for slot in part.slots]
        neutral = load(part, rewritten, slots, weights, where)
        return PipelinedDecoder(part, links, rewritten, neutral, where)

    return same_in_all(links, made, rewritten, stages, are_own=weights is None)


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


class PipelinedDecoder(JointDecoder):
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
        whole: Interface = rewritten.interface
        slots = tuple(whole.cache[slot] for slot in part.slots)
        own = {slot.past.name for slot in slots}
        interface = replace(
            whole,
            inputs=tuple(s for s in whole.inputs if not s.is_cache or s.name in own),
            outputs=tuple(
                spec
                for place, spec in enumerate(whole.outputs)
                if not spec.is_cache or place in part.outputs
            ),
            cache=slots,
        )
        super().__init__(rewritten, interface, links, neutral, device)
        self.stage, self.stages = links.number, links.count
        self.graph_module = part.graph_module
        self._part = part

    def __repr__(self) -> str:
        size = sum(parameter.numel() for parameter in self.graph_module.parameters())
        return (
            f"PipelinedDecoder(stage {self.stage + 1} of {self.stages}; {size} parameters; "
            f"{len(self.interface.cache)} cache tensors; {self.device})"
        )

    def _run(
        self, given: Mapping[str, torch.Tensor], sizes: Mapping[str, int], last_of: str | None
    ) -> dict[str, torch.Tensor]:
        return self._handed_out(self._computed(given, sizes), last_of)

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
            except Exception as error:  # noqa: BLE001 - told to all, and raised in all
                failure = Failure(self.stage, f"{type(error).__name__}: {error}")
        for links in (self._part.given, self._part.sent_back):
            for stage, names in links.items():
                self._links.send(stage, failure or [values[name] for name in names])
        for stage, names in self._part.got_back.items():
            failure = self._received(stage, names, values) or failure
        return failure or values

    def _received(self, stage: int, names: Sequence[str], values: dict[str, Any]) -> Failure | None:
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
                own = [last_token(own[0], spec.shape)]
            outputs[spec.name] = self._links.share(self._part.makers[place], own, self.device)[0]
        return outputs
