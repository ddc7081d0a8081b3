"""One file that generates: the decoder and the choice of tokens in the body of one ``Loop``.

The weights stay where they are, in the graph around the loop, each once. The cache, the tokens and
the mask are carried from one turn to the next; the first turn runs the whole prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import nn
from torch.export import Dim

from cachefree.errors import CacheFreeError, Refusal
from cachefree.onnx.loops.choices import Beam, Greedy
from cachefree.onnx.loops.steps import BeamFinish, BeamStart, BeamStep, GreedyStep, Start
from cachefree.onnx.metadata import Neutral
from cachefree.onnx.names import Names
from cachefree.onnx.roles import is_mask, is_position
from cachefree.sizes import size_symbol
from cachefree.spec import Interface

__all__ = ["compose", "plan_of"]

_BATCH, _QUERY = size_symbol("batch"), size_symbol("query")
Export = Callable[[torch.export.ExportedProgram], Any]


@dataclass(frozen=True)
class Plan:
    """Which of a decoder's inputs and outputs is what.

    Attributes:
        tokens: Place of the input of token ids.
        masks: Places of masks over past and new tokens.
        positions: Places of positions.
        pasts: Place of a past → place of its present among the outputs.
        logits: Place of the output of scores.
        vocabulary: V.
        slots: What `Start` takes, in the order of ``pasts``.
        dtypes: Of the inputs.
    """

    tokens: int
    masks: tuple[int, ...]
    positions: tuple[int, ...]
    pasts: dict[int, int]
    logits: int
    vocabulary: int
    slots: tuple[tuple[Sequence[int | None], Any, torch.dtype], ...]
    dtypes: tuple[torch.dtype, ...]


def plan_of(interface: Interface, names: Names, neutral: Sequence[Neutral], beams: int) -> Plan:
    """Finds what a loop needs.

    Raises:
        CacheFreeError: the graph has no tokens, no scores, an input that a loop cannot continue,
            or a cache that no number of rows begins.
    """
    inputs = list(interface.inputs)
    if names.tokens is None or names.logits is None:
        raise _refusal("It has no input of token ids, or no output with a score for each token.")
    tokens, logits = names.inputs.index(names.tokens), names.outputs.index(names.logits)
    if tuple(inputs[tokens].shape) != (_BATCH, _QUERY):
        raise _refusal("Its token ids are not (batch, tokens).")
    scores = interface.outputs[logits].shape
    if len(scores) != 3 or scores[0] != _BATCH or not sympy.sympify(scores[2]).is_Integer:
        raise _refusal("Its scores are not (batch, tokens, vocabulary).")
    masks, positions = [], []
    for place, spec in enumerate(inputs):
        if spec.is_cache or place == tokens:
            continue
        if is_mask(spec) and spec.shape[0] == _BATCH:
            masks.append(place)
        elif is_position(spec) and tuple(spec.shape) == (_BATCH, _QUERY):
            positions.append(place)
        else:
            raise _refusal(f"What {names.inputs[place]} is for the next token is not known.")
    by_input = {spec.name: place for place, spec in enumerate(inputs)}
    by_output = {spec.name: place for place, spec in enumerate(interface.outputs)}
    pasts = {by_input[s.past.name]: by_output[s.present.name] for s in interface.cache}
    slots = tuple(
        _slot(spec, element, interface.past_symbols, beams)
        for spec, element in zip((s.past for s in interface.cache), neutral, strict=True)
    )
    return Plan(
        tokens, tuple(masks), tuple(positions), pasts, logits, int(scores[2]), slots,
        tuple(spec.dtype for spec in inputs),
    )  # fmt: skip


def _slot(spec: Any, neutral: Neutral, pasts: Sequence[str], beams: int) -> Any:
    sizes: list[int | None] = []
    for size in map(sympy.sympify, spec.shape):
        left = size.subs({size_symbol(name): 0 for name in pasts})
        if left == _BATCH:
            sizes.append(None)
        elif left.is_Integer:
            sizes.append(int(left))
        else:
            raise _refusal(f"The size {size} of {spec.path} is not known before the first call.")
    if beams > 1 and sizes.count(None) != 1:
        raise _refusal(f"{spec.path} has no axis of the batch alone, by which beams are taken.")
    return sizes, neutral.fill if neutral.values is None else neutral.values, spec.dtype


def _refusal(why: str) -> CacheFreeError:
    return CacheFreeError(
        Refusal(
            "This model cannot generate in one file.",
            why=why,
            remedy="Leave loop= out, and call the decoder step by step.",
        )
    )


def compose(decoder: Any, plan: Plan, names: Names, choice: Greedy, export: Export) -> Any:
    """Puts a decoder into a loop.

    Args:
        decoder: The ``onnx_ir.Model`` of the one graph, named; it is taken apart.
        plan: What its inputs and outputs are.
        names: Their names.
        choice: How tokens are chosen.
        export: Makes an ``onnx_ir.Model`` of a program.

    Returns:
        The ``onnx_ir.Model``: ``input_ids``, ``attention_mask`` and ``max_new_tokens`` in,
        ``sequences`` out.
    """
    return _Composer(decoder, plan, names, choice, export).run()


class _Part:
    """The nodes of an exported module, taken out of its graph."""

    def __init__(self, model: Any, prefix: str) -> None:
        import onnx_ir

        graph = model.graph
        if model.functions:
            onnx_ir.passes.common.InlinePass()(model)
            graph = model.graph
        self.inputs, self.outputs = list(graph.inputs), list(graph.outputs)
        self.initializers = list(graph.initializers.values())
        self.nodes = list(graph)
        graph.outputs.clear()
        graph.inputs.clear()
        graph.initializers.clear()
        graph.remove(self.nodes)
        for value in [*self.inputs, *self.initializers]:
            value.name = f"{prefix}{value.name}"
        for node in self.nodes:
            node.name = f"{prefix}{node.name}"
            for value in node.outputs:
                value.name = f"{prefix}{value.name}"

    def given(self, values: Sequence[Any]) -> None:
        """Puts values in the places of the inputs."""
        import onnx_ir

        for mine, value in zip(self.inputs, values, strict=True):
            onnx_ir.convenience.replace_all_uses_with(mine, value)
            self.outputs = [value if output is mine else output for output in self.outputs]


class _Composer:
    def __init__(
        self, decoder: Any, plan: Plan, names: Names, choice: Greedy, export: Export
    ) -> None:
        self.model = decoder
        self.plan = plan
        self.names = names
        self.choice = choice
        self.export = export
        self.is_beam = isinstance(choice, Beam)
        self.beams = choice.num_beams if isinstance(choice, Beam) else 1
        self.number = 0

    def run(self) -> Any:
        import onnx_ir

        versions = dict(self.model.opset_imports)
        metadata = dict(self.model.metadata_props)
        decoder = _Part(self.model, "decoder.")
        integer = onnx_ir.TensorType(onnx_ir.DataType.INT64)
        ids, mask = (
            onnx_ir.Value(name=name, type=integer, shape=onnx_ir.Shape(["batch_size", "length"]))
            for name in ("input_ids", "attention_mask")
        )
        count = onnx_ir.Value(name="max_new_tokens", type=integer, shape=onnx_ir.Shape([]))
        outer, states, parts = self._started(ids, mask)
        body = self._body(decoder, states, ids, count)
        parts += body.parts
        go = self._constant(outer, True)
        loop = onnx_ir.node(
            "Loop",
            [count, go, *states],
            attributes={"body": body.graph},
            num_outputs=len(states),
        )
        outer.append(loop)
        result = self._finished(outer, loop.outputs, ids, parts)
        named = onnx_ir.node("Identity", [result])
        outer.append(named)
        sequences = named.outputs[0]
        sequences.name, sequences.type = "sequences", integer
        sequences.shape = onnx_ir.Shape(["batch_size", "total_length"])
        weights = [value for part in (decoder, *parts) for value in part.initializers]
        graph = onnx_ir.Graph(
            [ids, mask, count], [sequences], nodes=outer, initializers=weights,
            opset_imports=versions, name="generation",
        )  # fmt: skip
        return onnx_ir.Model(
            graph, ir_version=self.model.ir_version, producer_name="cachefree",
            metadata_props=metadata,
        )  # fmt: skip

    def _started(self, ids: Any, mask: Any) -> tuple[list[Any], list[Any], list[_Part]]:
        """The nodes before the loop and the values that it starts from."""
        batch, length = Dim("batch"), Dim("length")
        example = torch.zeros(2, 3, dtype=torch.int64)
        axes = {0: batch, 1: length}
        start = self._part(
            Start(self.plan.slots, self.beams), (example, example + 1), (axes, axes), "start."
        )
        start.given([ids, mask])
        parts, outer = [start], list(start.nodes)
        tokens, masks, finished, *cache = start.outputs
        if not self.is_beam:
            return outer, [tokens, masks, *cache, tokens, finished], parts
        assert isinstance(self.choice, Beam)
        beams = self._part(BeamStart(self.choice), (example,), (axes,), "beams.")
        beams.given([ids])
        parts.append(beams)
        return [*outer, *beams.nodes], [tokens, masks, *cache, *beams.outputs], parts

    def _finished(
        self, outer: list[Any], found: Sequence[Any], ids: Any, parts: list[_Part]
    ) -> Any:
        slots = len(self.plan.pasts)
        if not self.is_beam:
            return found[2 + slots]
        sequences, lengths = found[4 + slots], found[5 + slots]
        batch, length, prompt = Dim("batch"), Dim("length"), Dim("prompt")
        example = (
            torch.zeros(2, self.beams, 5, dtype=torch.int64),
            torch.zeros(2, self.beams, dtype=torch.int64),
            torch.zeros(2, 3, dtype=torch.int64),
        )
        axes = ({0: batch, 2: length}, {0: batch}, {0: batch, 1: prompt})
        finish = self._part(BeamFinish(), example, axes, "finish.")
        finish.given([sequences, lengths, ids])
        parts.append(finish)
        outer += finish.nodes
        return finish.outputs[0]

    def _body(self, decoder: _Part, states: Sequence[Any], ids: Any, count: Any) -> Any:
        import onnx_ir

        nodes: list[Any] = []
        turn = onnx_ir.Value(
            name="turn", type=onnx_ir.TensorType(onnx_ir.DataType.INT64), shape=onnx_ir.Shape([])
        )
        go = onnx_ir.Value(
            name="go", type=onnx_ir.TensorType(onnx_ir.DataType.BOOL), shape=onnx_ir.Shape([])
        )
        carried = [
            onnx_ir.Value(name=f"carried.{place}", type=state.type)
            for place, state in enumerate(states)
        ]
        slots = len(self.plan.pasts)
        tokens, mask, cache, rest = (
            carried[0], carried[1], carried[2 : 2 + slots], carried[2 + slots :],
        )  # fmt: skip
        given: list[Any] = [None] * len(self.plan.dtypes)
        given[self.plan.tokens] = self._cast(nodes, tokens, self.plan.dtypes[self.plan.tokens])
        for place in self.plan.masks:
            given[place] = self._cast(nodes, mask, self.plan.dtypes[place])
        if self.plan.positions:
            counted = self._positions(nodes, mask, tokens)
            for place in self.plan.positions:
                given[place] = self._cast(nodes, counted, self.plan.dtypes[place])
        for place, value in zip(self.plan.pasts, cache, strict=True):
            given[place] = value
        decoder.given(given)
        nodes += decoder.nodes
        logits = decoder.outputs[self.plan.logits]
        presents = [decoder.outputs[place] for place in self.plan.pasts.values()]
        if self.is_beam:
            step = self._beam_step()
            step.given([logits, mask, *rest, turn, count])
            nodes += step.nodes
            on, rows, new, masks, *later = step.outputs
            presents = [
                self._put(nodes, "Gather", [value, rows], axis=list(slot[0]).index(None))
                for value, slot in zip(presents, self.plan.slots, strict=True)
            ]
        else:
            step = self._greedy_step()
            step.given([logits, mask, *rest])
            nodes += step.nodes
            on, new, masks, *later = step.outputs
        results = [
            self._put(nodes, "Identity", [value]) for value in (on, new, masks, *presents, *later)
        ]
        for result, value in zip(results[1:], carried, strict=True):
            result.type = value.type
        results[0].type = go.type
        graph = onnx_ir.Graph([turn, go, *carried], results, nodes=nodes, name="step")
        return _Body(graph, [step])

    def _greedy_step(self) -> _Part:
        rows, length, query = Dim("rows"), Dim("length"), Dim("query")
        example = (
            torch.zeros(2, 3, self.plan.vocabulary),
            torch.zeros(2, 5, dtype=torch.int64),
            torch.zeros(2, 5, dtype=torch.int64),
            torch.zeros(2, dtype=torch.bool),
        )
        axes = ({0: rows, 1: query}, {0: rows, 1: length}, {0: rows, 1: length}, {0: rows})
        return self._part(GreedyStep(self.choice), example, axes, "step.")

    def _beam_step(self) -> _Part:
        assert isinstance(self.choice, Beam)
        beams, batch, length, query = self.beams, Dim("batch"), Dim("length"), Dim("query")
        rows = beams * batch
        integers: Any = {"dtype": torch.int64}
        floats: Any = {"dtype": torch.float32}
        wide, flat = {0: batch, 2: length}, {0: batch}
        example = (
            torch.zeros(2 * beams, 3, self.plan.vocabulary), torch.zeros(2 * beams, 5, **integers),
            torch.zeros(2, beams, 5, **integers), torch.zeros(2, beams, **floats),
            torch.zeros(2, beams, 5, **integers), torch.zeros(2, beams, **integers),
            torch.zeros(2, beams, **floats), torch.zeros(2, beams, dtype=torch.bool),
            torch.ones(2, 1, dtype=torch.bool), torch.tensor(0), torch.tensor(9),
        )  # fmt: skip
        axes = ({0: rows, 1: query}, {0: rows, 1: length}, wide, flat, wide, flat, flat, flat, flat,
                None, None)  # fmt: skip
        return self._part(BeamStep(self.choice), example, axes, "step.")

    def _part(self, module: nn.Module, example: Any, axes: Any, prefix: str) -> _Part:
        with torch.no_grad():
            program = torch.export.export(module.eval(), example, dynamic_shapes=axes, strict=False)
        return _Part(self.export(program), prefix)

    def _positions(self, nodes: list[Any], mask: Any, tokens: Any) -> Any:
        """How many tokens that count stand before each of the new ones."""
        one, zero, far = (
            self._constant(nodes, value) for value in ([1], [0], [torch.iinfo(torch.int64).max])
        )
        counted = self._put(nodes, "CumSum", [mask, self._constant(nodes, 1)])
        before = self._put(nodes, "Max", [self._put(nodes, "Sub", [counted, one]), zero])
        shape = self._put(nodes, "Shape", [tokens], start=1, end=2)
        first = self._put(nodes, "Neg", [shape])
        return self._put(nodes, "Slice", [before, first, far, one])

    def _cast(self, nodes: list[Any], value: Any, dtype: torch.dtype) -> Any:
        from cachefree.onnx.attention.operators import ELEMENT_TYPES

        if dtype == torch.int64:
            return value
        return self._put(nodes, "Cast", [value], to=ELEMENT_TYPES[dtype])

    def _constant(self, nodes: list[Any], value: Any) -> Any:
        import onnx_ir

        return self._put(nodes, "Constant", [], value=onnx_ir.tensor(torch.tensor(value).numpy()))

    def _put(self, nodes: list[Any], name: str, inputs: Sequence[Any], **attributes: Any) -> Any:
        import onnx_ir

        node = onnx_ir.node(name, inputs, attributes=attributes)
        self.number += 1
        node.outputs[0].name = f"loop.{self.number}"
        nodes.append(node)
        return node.outputs[0]


@dataclass(frozen=True)
class _Body:
    graph: Any
    parts: list[_Part]
