"""The zoo's own consistency, in plain eager torch."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from . import CASES, REFUSALS, ModelCase, RefusalCase

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BATCHES = (1, 2)
QUERIES = (1, 2, 5)
PASTS = range(10)
CHUNKS = {1: (), 3: (2,), 4: (1, 1), 6: (5,), 7: (1, 2, 2), 9: (2, 5, 1)}
"""Past lengths, and the later chunks that reach them from a first call of what is left."""

NOT_RUNNING = ("example_of_a_wrong_width", "example_with_an_unknown_keyword")

on_each_case = pytest.mark.parametrize("case", CASES, ids=str)
on_each_refusal = pytest.mark.parametrize("refusal", REFUSALS, ids=str)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The models are so small that threads cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def map_tensors(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """`value` with each tensor changed, in containers of its own classes."""

    def within(child: Any) -> Any:
        return map_tensors(change, child)

    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(within, value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(within, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return dataclasses.replace(
            value, **{f.name: within(getattr(value, f.name)) for f in fields}
        )
    if isinstance(value, dict):
        return type(value)((key, within(child)) for key, child in value.items())
    if hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)):
        clone = type(value).__new__(type(value))
        clone.__dict__.update({name: within(child) for name, child in vars(value).items()})
        return clone
    return value


def tensors(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    map_tensors(keep, value)
    return found


class Reference:
    """A case's model in eager mode, in its own dtype or in float64."""

    def __init__(self, case: ModelCase | RefusalCase, *, double: bool = False) -> None:
        self.case = case
        self.double = double
        self.model = case.build()
        if double:
            self.model.double()

    def __call__(self, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        if self.double:
            call = map_tensors(lambda t: t.double() if t.is_floating_point() else t, call)
        device = getattr(self.case, "device", "cpu")
        if device != "cpu":
            call = map_tensors(lambda t: t.to(device), call)
        args, kwargs = call
        with torch.no_grad():
            return self.model(*args, **kwargs)

    def first(self, batch: int, query: int) -> Any:
        return self(self.case.prefill(batch, query, generator()))

    def later(self, outputs: Any, batch: int, past: int, query: int) -> Any:
        return self(self.case.step(outputs, batch, past, query, generator()))

    def chunked(self, batch: int, chunks: tuple[int, ...]) -> Any:
        outputs, past = self.first(batch, chunks[0]), chunks[0]
        for query in chunks[1:]:
            outputs, past = self.later(outputs, batch, past, query), past + query
        return outputs


def sizes(case: ModelCase) -> Iterator[tuple[int, int, int]]:
    for batch in BATCHES:
        for past in PASTS:
            for query in QUERIES:
                reachable = past == 0 or case.domain(batch, 0, past)
                if reachable and case.domain(batch, past, query):
                    yield batch, past, query


def assert_same(actual: Any, expected: Any) -> None:
    """Compares outputs; where one covers more positions, its last positions are compared."""
    actual, expected = tensors(actual), tensors(expected)
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected):
        assert one.dim() == other.dim()
        for axis in range(one.dim()):
            size = min(one.size(axis), other.size(axis))
            one = one.narrow(axis, one.size(axis) - size, size)
            other = other.narrow(axis, other.size(axis) - size, size)
        # a model may round to float32 on its way
        torch.testing.assert_close(one, other, rtol=1.3e-6, atol=1e-5, equal_nan=False)


def test_names_are_unique() -> None:
    names = [case.name for case in (*CASES, *REFUSALS)]
    assert len(names) == len(set(names))


def test_zoo_is_large_enough() -> None:
    assert len(CASES) >= 48
    assert len(REFUSALS) >= 22
    assert sum(case.example_inputs is None for case in CASES) >= len(CASES) / 3


@on_each_case
def test_runs_at_every_size(case: ModelCase) -> None:
    reference = Reference(case)
    for batch, past, query in sizes(case):
        if past == 0:
            outputs = reference.first(batch, query)
        else:
            outputs = reference.later(reference.first(batch, past), batch, past, query)
        assert tensors(outputs)
        for tensor in tensors(outputs):
            assert tensor.device.type == case.device
            if tensor.device.type == "cpu":
                assert not tensor.isnan().any(), (batch, past, query)


@on_each_case
def test_example_inputs_run(case: ModelCase) -> None:
    if case.example_inputs is None:
        pytest.skip("inputs are found by probing")
    reference = Reference(case)
    given = case.example_inputs
    reference(((), given) if isinstance(given, dict) else (given, {}))


@on_each_case
def test_chunks_equal_one_long_call(case: ModelCase) -> None:
    if not case.chunk_invariant or case.device != "cpu":
        pytest.skip("chunks are not meant to be equal, or there are no numbers to compare")
    reference = Reference(case, double=True)
    for batch in BATCHES:
        for past, later in CHUNKS.items():
            for query in QUERIES:
                if not case.domain(batch, past, query):
                    continue
                step = reference.later(reference.first(batch, past), batch, past, query)
                assert_same(step, reference.first(batch, past + query))
                chunks = (past - sum(later), *later)
                if all(case.domain(batch, 1, chunk) for chunk in later):
                    outputs = reference.chunked(batch, chunks)
                    assert_same(reference.later(outputs, batch, past, query), step)


@on_each_case
def test_wrong_cache_is_visible(case: ModelCase) -> None:
    if case.device != "cpu":
        pytest.skip("there are no numbers to compare")
    reference = Reference(case)
    query = 2 if case.domain(2, 4, 2) else 1
    outputs = reference.first(2, 4)
    zeros = map_tensors(lambda t: t * 0 if t.is_floating_point() else t, outputs)
    right = reference.later(outputs, 2, 4, query)
    wrong = reference.later(zeros, 2, 4, query)
    # what is handed on as the cache holds the zeros anyway
    handed_on = {id(t) for t in tensors(case.step(right, 2, 4 + query, query, generator()))}
    pairs = list(zip(tensors(right), tensors(wrong), strict=True))
    beside = [pair for pair in pairs if id(pair[0]) not in handed_on] or pairs
    assert max((one - other).abs().max().item() for one, other in beside) > 1e-2


@on_each_case
def test_build_is_reproducible(case: ModelCase) -> None:
    state = torch.random.get_rng_state()
    first, again = case.build(), case.build()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not first.training
    if case.device == "cpu":
        for one, other in zip(first.parameters(), again.parameters()):
            assert torch.equal(one, other)


@on_each_refusal
def test_refused_model_runs(refusal: RefusalCase) -> None:
    given = refusal.example_inputs
    if refusal.name in NOT_RUNNING:
        model = refusal.build()
        with pytest.raises((RuntimeError, TypeError)):
            model(**given) if isinstance(given, dict) else model(*given)
        return
    reference = Reference(refusal)
    if given is not None:
        reference((given, {}))
    if refusal.prefill is None:
        return
    for batch in BATCHES:
        for past in PASTS:
            for query in QUERIES:
                reference.later(reference.first(batch, past + 1), batch, past + 1, query)


different = [
    case for case in REFUSALS if case.error == "UnsupportedBranchError" and case.prefill is not None
]


@pytest.mark.parametrize("refusal", [case for case in different if not case.or_correct], ids=str)
def test_refused_paths_do_differ(refusal: RefusalCase) -> None:
    reference = Reference(refusal, double=True)
    step = reference.later(reference.first(2, 6), 2, 6, 2)
    long = reference.first(2, 8)
    with pytest.raises(AssertionError):
        assert_same(step, long)
