"""One graph in several files that run one after the other, each with its own weights and cache.

A decoder that one machine cannot hold is cut between two of its layers. A cut is made where few
values cross it and the weights before it come to about their share: what crosses are the hidden
states, and what every layer reads (masks, tables of positions).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cachefree.cutting import crossings, cut_places
from cachefree.errors import CacheFreeError, Refusal

__all__ = ["STAGE", "is_stage", "split", "stage_files", "stage_path", "stage_targets"]

STAGE = "cachefree.stage"  # in a file's metadata
_STAGE = re.compile(r"-stage(\d+)of(\d+)$")


def stage_path(path: Path, number: int, count: int) -> Path:
    """The file of a stage: ``model-stage1of4.onnx`` of ``model.onnx``."""
    return path.with_name(f"{path.stem}-stage{number}of{count}{path.suffix}")


def is_stage(path: Path) -> bool:
    """Whether a file is one of several stages, by its name."""
    return _STAGE.search(path.stem) is not None


def stage_files(path: Path) -> list[Path]:
    """The files of all stages of ``path``, in order; none where it was not written in stages.

    Args:
        path: The path that was given to `to_onnx`, or one of its stages.

    Raises:
        CacheFreeError: some stages are missing, or stages of two exports lie there.
    """
    stem = _STAGE.sub("", path.stem)
    found: dict[int, set[int]] = {}
    for file in path.parent.glob(f"{stem}-stage*of*{path.suffix}"):
        match = _STAGE.search(file.stem)
        if match and file.stem[: match.start()] == stem:
            found.setdefault(int(match[2]), set()).add(int(match[1]))
    if not found:
        return []
    whole = path.with_name(stem + path.suffix)
    if len(found) > 1:
        raise CacheFreeError(
            Refusal(
                f"There are stages of several exports of {whole}.",
                why=", ".join(f"{len(numbers)} of {count}" for count, numbers in found.items()),
                remedy="Remove those of the older export.",
            )
        )
    ((count, numbers),) = found.items()
    missing = [number for number in range(1, count + 1) if number not in numbers]
    if missing:
        names = ", ".join(stage_path(whole, number, count).name for number in missing)
        raise CacheFreeError(
            Refusal(
                f"Stages of {whole} are missing: {names}.", remedy="Put them beside the others."
            )
        )
    return [stage_path(whole, number, count) for number in range(1, count + 1)]


def stage_targets(path: Path, count: int, loop: Any, certificate: Any, folder: bool) -> list[Path]:
    """The files to write ``path`` to in stages.

    Raises:
        CacheFreeError: there cannot be so many, or stages of another number lie there.
    """
    if count < 1:
        raise CacheFreeError(Refusal(f"stages={count} is no number of files.", remedy="Give 2."))
    for what, given in (("loop=", loop), ("certificate=", certificate), ("folder=", folder)):
        if given:
            raise CacheFreeError(
                Refusal(
                    f"stages= and {what} cannot be given together.",
                    why="A loop, a certificate and a folder for other programs are of one file.",
                    remedy=f"Leave out {what} or stages=.",
                )
            )
    older = [file for file in stage_files(path) if not file.stem.endswith(f"of{count}")]
    if older:
        raise CacheFreeError(
            Refusal(
                f"{len(older)} stages of an earlier export of {path} are there.",
                why=f"Beside {count} new ones they would be taken for one export with them.",
                remedy=f"Remove {older[0].name} and the others, or choose another path.",
            )
        )
    return [stage_path(path, number, count) for number in range(1, count + 1)]


def split(model: Any, count: int) -> list[Any]:
    """Cuts a model into stages.

    Args:
        model: An ``onnx_ir.Model``; its nodes are moved into the stages.
        count: How many stages.

    Returns:
        One ``onnx_ir.Model`` a stage. The inputs of one are inputs of the whole, or outputs of
        earlier stages; each initializer is in the stages that read it.

    Raises:
        CacheFreeError: there are fewer places to cut.
    """
    if count == 1:
        return [model]
    nodes = list(model.graph)
    if count > len(nodes):
        raise CacheFreeError(
            Refusal(
                f"The graph cannot be cut into {count} stages.",
                why=f"It has {len(nodes)} operators.",
                remedy="Give stages= at most the number of layers.",
            )
        )
    cuts = [0, *_cuts(model, nodes, count), len(nodes)]
    stage_of = {
        id(inner): number
        for number in range(count)
        for node in nodes[cuts[number] : cuts[number + 1]]
        for inner in _with_bodies(node)
    }
    return _Splitter(model, nodes, stage_of, count).run()


def _cuts(model: Any, nodes: Sequence[Any], count: int) -> list[int]:
    """The numbers of the nodes before which to cut."""
    initializers = set(map(id, model.graph.initializers.values()))
    last_use: dict[int, int] = {}
    weight, read, total = [0], set(), 0
    for place, node in enumerate(nodes):
        for value in _read_by(node):
            if id(value) in initializers and id(value) not in read:
                read.add(id(value))
                total += _bytes_of(value)
            last_use[id(value)] = place
        weight.append(total)
    lives = (
        (place, last_use.get(id(value), place), 1)
        for place, node in enumerate(nodes)
        for value in node.outputs
    )
    return cut_places(weight, crossings(len(nodes), lives), count)


def _with_bodies(node: Any) -> Iterator[Any]:
    """A node, and those of the graphs inside it: the body of a loop."""
    import onnx_ir

    yield node
    for attribute in node.attributes.values():
        if attribute.type == onnx_ir.AttributeType.GRAPH:
            yield from attribute.as_graph().all_nodes()


def _read_by(node: Any) -> Iterator[Any]:
    """The values that a node takes, those that a body takes from outside among them."""
    import onnx_ir

    made: set[int] = set()
    for inner in _with_bodies(node):
        if inner is not node:
            made.update(map(id, inner.outputs))
    for attribute in node.attributes.values():
        if attribute.type == onnx_ir.AttributeType.GRAPH:
            body = attribute.as_graph()
            made.update(map(id, (*body.inputs, *body.initializers.values())))
    for inner in _with_bodies(node):
        for value in inner.inputs:
            if value is not None and id(value) not in made:
                yield value


def _bytes_of(value: Any) -> int:
    return int(math.prod(map(int, value.shape or ())) * value.dtype.itemsize)


class _Splitter:
    def __init__(
        self, model: Any, nodes: Sequence[Any], stage_of: Mapping[int, int], count: int
    ) -> None:
        self.model = model
        self.nodes = nodes
        self.stage_of = stage_of
        self.count = count
        self.initializers = dict(model.graph.initializers)
        self.inputs = list(model.graph.inputs)
        self.outputs = list(model.graph.outputs)

    def run(self) -> list[Any]:
        plans = [self._plan(number) for number in range(self.count)]
        self.model.graph.outputs.clear()
        self.model.graph.remove(self.nodes)
        return [self._stage(number, *plan) for number, plan in enumerate(plans)]

    def _plan(self, number: int) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
        """A stage's nodes, inputs, outputs and initializers, by the values of the whole graph."""
        nodes = [node for node in self.nodes if self.stage_of[id(node)] == number]
        weights = set(map(id, self.initializers.values()))
        read: dict[int, Any] = {id(value): value for node in nodes for value in _read_by(node)}
        made = {id(value) for node in nodes for value in node.outputs}
        wanted = set(map(id, self.outputs))
        taken = [value for key, value in read.items() if key not in made and key not in weights]
        if number == 0:  # an input that is handed on as it is
            taken += [v for v in self.outputs if v.producer() is None and id(v) not in read]
        given = [
            value
            for node in nodes
            for value in node.outputs
            if id(value) in wanted
            or any(self.stage_of.get(id(use.node), number) != number for use in value.uses())
        ]
        if number == 0:
            given += [v for v in self.outputs if v.producer() is None]
        order = {id(value): place for place, value in enumerate(self.inputs)}
        taken.sort(key=lambda value: order.get(id(value), len(order)))
        return nodes, taken, given, [read[key] for key in read if key in weights]

    def _stage(
        self, number: int, nodes: list[Any], taken: list[Any], given: list[Any], weights: list[Any]
    ) -> Any:
        import onnx_ir

        own: dict[int, Any] = {}
        for value in [*taken, *weights]:
            own[id(value)] = onnx_ir.Value(
                name=value.name,
                shape=value.shape,
                type=value.type,
                const_value=value.const_value,
            )
        for node in itertools.chain.from_iterable(map(_with_bodies, nodes)):
            for place, value in enumerate(node.inputs):
                if value is not None and id(value) in own:
                    node.replace_input_with(place, own[id(value)])
        graph = onnx_ir.Graph(
            [own[id(value)] for value in taken],
            [own.get(id(value), value) for value in given],
            nodes=nodes,
            initializers=[own[id(value)] for value in weights],
            opset_imports=dict(self.model.graph.opset_imports),
            name=f"{self.model.graph.name}_stage{number + 1}",
        )
        return onnx_ir.Model(
            graph,
            ir_version=self.model.ir_version,
            producer_name=self.model.producer_name,
            functions=list(self.model.functions.values()),
            metadata_props={**self.model.metadata_props, STAGE: f"{number + 1} of {self.count}"},
        )
