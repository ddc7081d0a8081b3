"""What a file says of itself is read as it was written, and nothing in it is run."""

from __future__ import annotations

import json

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod

from cachefree.errors import CacheFreeError, DomainError
from cachefree.onnx.expressions import parse_expression
from cachefree.onnx.metadata import Neutral, describe, neutral_elements, read_description
from cachefree.onnx.names import name_interface
from cachefree.sizes import size_symbol
from cachefree.spec import CacheSlot, Condition, Domain, InputSpec, Interface, OutputSpec, Region

B, S, P = map(size_symbol, ("batch", "query", "past"))


def interface() -> Interface:
    ids = InputSpec("ids", "ids", (B, S), torch.int64)
    past = InputSpec("past", "past", (B, P, 4), torch.float16, True)
    logits = OutputSpec("out", "[0]", (B, S, 5), torch.float16)
    present = OutputSpec("present", "[1]", (B, P + S, 4), torch.float16, True)
    domain = Domain(
        (Region("first call", (Condition(sympy.Eq(P, 0)),)), Region("later calls")), ("eval",)
    )
    slot = CacheSlot(past, present, (1,), "zero length on axis 1")
    return Interface((ids, past), (logits, present), (slot,), domain)


def written(neutral: Neutral | None = None) -> dict[str, str]:
    spec = interface()
    names = name_interface(spec, "optimum", {"ids": 5})
    return describe(spec, names, [neutral or Neutral()], "PROVED_EXACT", {"ids": 5})


def test_description_is_read_as_it_was_written() -> None:
    description = read_description(written(), "model.onnx")
    found, spec = description.interface, interface()
    assert [i.name for i in found.inputs] == ["input_ids", "past"]
    assert [i.shape for i in found.inputs] == [i.shape for i in spec.inputs]
    assert [o.shape for o in found.outputs] == [o.shape for o in spec.outputs]
    assert [i.dtype for i in found.inputs] == [torch.int64, torch.float16]
    assert found.domain == spec.domain
    assert found.cache[0].growing_axes == (1,)
    assert (description.tokens, description.logits, description.vocabulary) == (
        "input_ids",
        "logits",
        5,
    )
    assert description.verdict == "PROVED_EXACT"


@pytest.mark.parametrize(
    "neutral",
    [Neutral(), Neutral(-1e38), Neutral(float("-inf")), Neutral(True), Neutral(3)],
)
def test_neutral_fill(neutral: Neutral) -> None:
    found = read_description(written(neutral), "model.onnx").neutral[0]
    assert found.tensor((2, 3), torch.float32, torch.device("cpu")).eq(neutral.fill).all()


def test_neutral_values_are_repeated_along_the_batch() -> None:
    row = torch.arange(4, dtype=torch.float16).reshape(1, 1, 4)
    found = read_description(written(Neutral(values=row)), "model.onnx").neutral[0]
    assert torch.equal(
        found.tensor((3, 1, 4), torch.float16, torch.device("cpu")), row.expand(3, 1, 4)
    )


def test_neutral_elements_are_read_off_the_cache() -> None:
    row = torch.arange(3.0).reshape(1, 3)
    one = [torch.zeros(1, 0, 3), torch.full((1, 3), -5.0), row]
    two = [torch.zeros(2, 0, 3), torch.full((2, 3), -5.0), row.expand(2, 3)]
    empty, full, values = neutral_elements(one, two, ["a", "b", "c"])
    assert (empty.fill, full.fill) == (0, -5.0)
    assert values.values is not None
    with pytest.raises(DomainError, match=r"The neutral value of c is not the same for each row"):
        neutral_elements([row], [row * torch.ones(2, 1) + torch.eye(2, 3)], ["c"])


def test_file_of_others_is_refused() -> None:
    with pytest.raises(CacheFreeError, match=r"x.onnx was not written by cachefree.to_onnx"):
        read_description({"producer": "someone"}, "x.onnx")


def test_other_format_is_refused() -> None:
    with pytest.raises(CacheFreeError, match=r"format '99'; this version of cachefree reads '1'"):
        read_description({**written(), "cachefree.format": "99"}, "x.onnx")


@pytest.mark.parametrize("damage", ["", "{}", "[1, 2]", '{"inputs": 3}'])
def test_damaged_description_is_refused(damage: str) -> None:
    with pytest.raises(CacheFreeError, match=r"The description in x.onnx cannot be read"):
        read_description({**written(), "cachefree.interface": damage}, "x.onnx")


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "(lambda: 0)()",
        "[].__class__",
        "batch.subs",
        "open('x')",
        "f(batch)",
        "batch if past else query",
        "'past'",
        "1j",
        "Max(batch, key=2)",
    ],
)
def test_nothing_in_a_file_is_run(text: str) -> None:
    with pytest.raises((ValueError, SyntaxError)):
        parse_expression(text)
    domain = {"regions": [{"name": "all", "conditions": [text], "implied": []}], "fixed": []}
    with pytest.raises(CacheFreeError, match="cannot be read"):
        read_description({**written(), "cachefree.domain": json.dumps(domain)}, "x.onnx")


sizes = st.sampled_from([B, S, P])
numbers = st.integers(1, 9).map(sympy.Integer)
expressions = st.recursive(
    sizes | numbers,
    lambda parts: st.one_of(
        st.builds(lambda a, b: a + b, parts, parts),
        st.builds(lambda a, b: a - b, parts, parts),
        st.builds(lambda a, b: a * b, parts, numbers),
        st.builds(Max, parts, parts),
        st.builds(Min, parts, parts),
        st.builds(FloorDiv, sizes, numbers),
        st.builds(Mod, sizes, numbers),
    ),
    max_leaves=5,
)
facts = st.builds(
    lambda relation, a, b: relation(a, b),
    st.sampled_from([sympy.Eq, sympy.Ne, sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge]),
    expressions,
    expressions,
)
joined = st.one_of(facts, st.builds(sympy.And, facts, facts), st.builds(sympy.Or, facts, facts))


@given(expressions | joined)
def test_expressions_are_read_as_they_were_written(expression: sympy.Basic) -> None:
    assert str(parse_expression(str(expression))) == str(expression)


@given(joined, st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_facts_mean_what_they_meant(fact: sympy.Basic, batch: int, query: int, past: int) -> None:
    values = {"batch": batch, "query": query, "past": past}
    assert Condition(parse_expression(str(fact))).holds(values) == Condition(fact).holds(values)
