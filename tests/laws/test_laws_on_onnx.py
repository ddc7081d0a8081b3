"""The laws on ONNX Runtime: both sides of every step in a few graphs, run at many sizes."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import nn

from cachefree.graph import emit
from cachefree.normal import Step
from cachefree.onnx.exporting import default_opset, export, save
from cachefree.onnx.program import exported_program
from cachefree.spec import Domain, InputSpec, Interface, OutputSpec, Region
from cachefree.terms import Term, topological

from .equations import Instance, drawn, is_exact, same_bits, specs, steps, tame
from .test_laws import TRIED

Pair = tuple[str, Instance, Step]

NOT_EXPORTED = {
    "aten.expand_copy.default", "aten.lift_fresh_copy.default",
}  # fmt: skip
"""Operators that torch.onnx does not write."""
NOT_PASSED = (torch.bfloat16,)
"""Dtypes that have no counterpart in numpy."""


def pairs(law: str) -> Iterator[Pair]:
    """The steps of a law with all sizes symbolic, as far as they can be written."""
    for instance in TRIED[law].applies:
        for step in steps(instance):
            terms = topological([step.before, step.after])
            ops = {str(term.op) for term in terms}
            dtypes = {term.dtype for term in terms if term.shape is not None}
            is_written = not ops & NOT_EXPORTED and not dtypes & set(NOT_PASSED)
            if step.law.name == law and step.before.shape is not None and is_written:
                yield law, instance, step


@functools.cache
def batch(*, from_zero: bool, is_quick: bool) -> tuple[Pair, ...]:
    """The steps of instances that take sizes of zero, or of those that do not; quick: one a law."""
    found = []
    for law in TRIED:
        own = [pair for pair in pairs(law) if (not pair[1].above) is from_zero]
        found += own[:1] if is_quick else own
    return tuple(found)


def graph_of(
    chosen: Sequence[Pair],
) -> tuple[dict[str, tuple[InputSpec, Term]], list[tuple[str, Term]]]:
    """One graph whose outputs are both sides of all steps."""
    inputs: dict[str, tuple[InputSpec, Term]] = {}
    outputs: list[tuple[str, Term]] = []
    for number, (_, instance, step) in enumerate(chosen):
        named = {spec.path: spec for spec in specs(instance.inputs)}
        for term in topological([step.before, step.after]):
            if term.op == "input":
                name = f"i{number}_{term.args[0]}"
                spec = named[term.args[0]]
                inputs[name] = InputSpec(name, name, spec.shape, spec.dtype), term
        outputs += [(f"before_{number}", step.before), (f"after_{number}", step.after)]
    return inputs, outputs


def session_of(chosen: Sequence[Pair], path: Path) -> onnxruntime.InferenceSession:
    inputs, outputs = graph_of(chosen)
    shared: dict[Term, str] = {}
    for name, (_, term) in inputs.items():
        shared.setdefault(term, name)
    kept = {name: inputs[name] for name in shared.values()}
    module = emit(nn.Module(), [(name, term) for name, (_, term) in kept.items()], outputs)
    interface = Interface(
        tuple(spec for spec, _ in kept.values()),
        tuple(OutputSpec(name, name, term.sizes, term.dtype) for name, term in outputs),
        (),
        Domain((Region("first call"),)),
    )
    model = export(exported_program(module, interface), default_opset())
    for value, spec in zip(model.graph.inputs, interface.inputs, strict=True):
        value.name = spec.name
    for value, spec in zip(model.graph.outputs, interface.outputs, strict=True):
        value.name = spec.name
    save(model, path)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])


def run(
    session: onnxruntime.InferenceSession, chosen: Sequence[Pair], sizes: Mapping[str, int]
) -> Iterator[tuple[Pair, torch.Tensor, torch.Tensor]]:
    """Both sides of each step at these sizes."""
    wanted = {value.name for value in session.get_inputs()}
    feeds = {}
    for number, (_, instance, _) in enumerate(chosen):
        known = {
            symbol: max(sizes.get(str(symbol), 3), instance.above.get(str(symbol), 0))
            for symbol in instance.symbols
        }
        values = drawn(instance, known, seed=number)
        values = values if is_exact(instance) else tame(values)
        for path, value in values.items():
            if f"i{number}_{path}" in wanted:
                feeds[f"i{number}_{path}"] = value.numpy()
    found = list(map(torch.from_numpy, session.run(None, feeds)))
    for number, pair in enumerate(chosen):
        yield pair, found[2 * number], found[2 * number + 1]


FROM_ZERO = ({"b": 0, "n": 3, "p": 1, "m": 2}, {"b": 2, "n": 0, "p": 3, "m": 1},
             {"b": 1, "n": 1, "p": 0, "m": 0}, {"b": 3, "n": 4, "p": 2, "m": 5})  # fmt: skip
ABOVE = ({"b": 1, "n": 3, "p": 3}, {"b": 2, "n": 4, "p": 6})


@pytest.mark.parametrize(("from_zero", "at"), [(True, FROM_ZERO), (False, ABOVE)])
@pytest.mark.parametrize("is_quick", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_laws_hold_on_onnx_runtime(
    from_zero: bool, at: Any, is_quick: bool, tmp_path: Path
) -> None:
    chosen = batch(from_zero=from_zero, is_quick=is_quick)
    session = session_of(chosen, tmp_path / "laws.onnx")
    for sizes in at:
        for (law, instance, step), before, after in run(session, chosen, sizes):
            words = f"{law}, {instance}: {step.before.text(3)} = {step.after.text(3)} at {sizes}"
            if law in LOSE_THE_SIGN:
                before, after = (side + 0 if side.dtype.is_floating_point else side
                                 for side in (before, after))  # fmt: skip
            if is_exact(instance):
                assert same_bits(before, after), f"{words}\n{before}\n{after}"
            else:
                torch.testing.assert_close(after, before, equal_nan=True, msg=words)


def test_every_law_is_run_on_onnx_runtime_but_those_named() -> None:
    covered = {law for zero in (True, False) for law, _, _ in batch(from_zero=zero, is_quick=False)}
    assert TRIED.keys() - covered == NOT_RUN.keys(), "say why, or run it"


LOSE_THE_SIGN = {
    "constant": "torch.onnx writes a tensor full of −0.0 as one full of 0.0",
    "where": "ONNX Runtime's Where gives 0.0 for −0.0",
}
"""Where ONNX Runtime gives another zero than torch does: on one side of an exact law only."""
NOT_RUN = {"no-elements": "applies where a size is written as 0: there is nothing to compare"}
