"""Which argument carries the cache, what feeds it, and which sizes vary: found by behaviour."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import nn

from cachefree import CacheNotFoundError, CaptureError
from cachefree.calls import Call, TensorSpec
from cachefree.dimensions import find_dimensions, resized
from cachefree.discover import Discovery, discover
from cachefree.inputs import call_of, find_first_call
from cachefree.structure import flatten

from .assertions import Unchanged, says_what_to_do
from .small import IDS, Small, small

Pair = namedtuple("Pair", ["key", "value"])
IDS_ALONE = (IDS[:2, :3],)


@dataclasses.dataclass
class Memory:
    key: torch.Tensor
    value: torch.Tensor


def found(build: Any, example: Any = IDS_ALONE, **options: Any) -> Discovery:
    model = small(build)
    unchanged = Unchanged(model)
    try:
        return discover(model, example, **options)
    finally:
        unchanged.check()


def cache_of(discovery: Discovery) -> list[tuple[str, tuple[str, ...]]]:
    tensors = discovery.later.tensors
    return [
        (tensors[place].path, tuple(map(str, tensors[place].shape)))
        for place in discovery.cache_leaves
    ]


SHAPE = ("batch", "past", "6")


class InATuple(Small):
    pass


class InAList(Small):
    def forward(self, ids, mems=None):
        logits, kv = super().forward(ids, None if mems is None else tuple(mems))
        return logits, list(kv)


class InANamedTuple(Small):
    def forward(self, ids, state=None):
        logits, kv = super().forward(ids, state)
        return Pair(*kv), logits


class InADataclass(Small):
    def forward(self, ids, memory=None):
        logits, kv = super().forward(ids, None if memory is None else (memory.key, memory.value))
        return {"out": logits, "memory": Memory(*kv)}


class InTheDictOfInputs(Small):
    def forward(self, batch):
        logits, kv = super().forward(batch["ids"], batch.get("past"))
        return {"logits": logits, "past": kv}


class Variadic(Small):
    def forward(self, ids, *mems):
        logits, kv = super().forward(ids, mems or None)
        return (logits, *kv)


class InTwoArguments(Small):
    def forward(self, ids, past_key=None, past_value=None):
        past = None if past_key is None else (past_key, past_value)
        logits, (k, v) = super().forward(ids, past)
        return logits, k, v


class StackedInOne(Small):
    def forward(self, ids, past=None):
        logits, kv = super().forward(ids, None if past is None else past.unbind(0))
        return torch.stack(kv), logits


class WithAnEmptyTensor(Small):
    def forward(self, ids, past=torch.zeros(0)):  # noqa: B008
        logits, kv = super().forward(ids, past.unbind(0) if past.numel() else None)
        return logits, torch.stack(kv)


class OnDemand(Small):
    def forward(self, ids, past=None, use_cache=False):
        logits, kv = super().forward(ids, past)
        return (logits, kv) if use_cache else logits


class Nested(Small):
    def forward(self, ids, past=None):
        layer = None if past is None else past["layers"][0]["attention"]
        logits, kv = super().forward(ids, layer)
        return logits, {"layers": [{"attention": kv}], "version": 2}


CONTAINERS = {
    InATuple: [("past[0]", SHAPE), ("past[1]", SHAPE)],
    InAList: [("mems[0]", SHAPE), ("mems[1]", SHAPE)],
    InANamedTuple: [("state.key", SHAPE), ("state.value", SHAPE)],
    InADataclass: [("memory.key", SHAPE), ("memory.value", SHAPE)],
    Variadic: [("mems[0]", SHAPE), ("mems[1]", SHAPE)],
    InTwoArguments: [("past_key", SHAPE), ("past_value", SHAPE)],
    StackedInOne: [("past", ("2", *SHAPE))],
    WithAnEmptyTensor: [("past", ("2", *SHAPE))],
    OnDemand: [("past[0]", SHAPE), ("past[1]", SHAPE)],
    Nested: [
        ("past['layers'][0]['attention'][0]", SHAPE),
        ("past['layers'][0]['attention'][1]", SHAPE),
    ],
}


@pytest.mark.parametrize("build", CONTAINERS, ids=lambda build: build.__name__)
def test_the_cache_is_found_in_any_container(build: Any) -> None:
    discovery = found(build)
    assert cache_of(discovery) == CONTAINERS[build]
    assert discovery.later.tensors[0].shape[1].name == "query"
    assert len(discovery.carried) == len(discovery.cache_leaves)


def test_the_cache_is_found_inside_a_dict_argument() -> None:
    discovery = found(InTheDictOfInputs, ({"ids": IDS[:2, :3]},))
    assert cache_of(discovery) == [("batch['past'][0]", SHAPE), ("batch['past'][1]", SHAPE)]


def test_outputs_feed_the_places_in_their_order() -> None:
    class Swapped(Small):
        def forward(self, ids, past=None):
            logits, (k, v) = super().forward(ids, past)
            return v * 2, k, logits, (k, v)

    discovery = found(Swapped)
    paths = [leaf.path for leaf in discovery.first_path.output_leaves]
    assert [paths[place] for place in discovery.carried] == ["[3][0]", "[3][1]"]


def test_a_flag_that_is_needed_is_set_and_said() -> None:
    discovery = found(OnDemand)
    assert any("use_cache=True" in note for note in discovery.notes)
    assert not found(InATuple).notes


def test_axes_of_any_order() -> None:
    class TimeFirst(Small):
        """Keys transposed, and values with time in front."""

        def forward(self, ids, past=None):
            if past is not None:
                past = past[0].transpose(1, 2), past[1].transpose(0, 1)
            logits, (k, v) = super().forward(ids, past)
            return logits, (k.transpose(1, 2), v.transpose(0, 1))

    discovery = found(TimeFirst)
    assert [shape for _, shape in cache_of(discovery)] == [
        ("batch", "6", "past"),
        ("past", "batch", "6"),
    ]


def test_masks_of_past_and_new_tokens() -> None:
    class Masked(Small):
        def forward(self, ids, attention_mask, past=None):
            logits, kv = super().forward(ids, past)
            assert attention_mask.shape[1] == kv[0].shape[1]
            return logits * attention_mask.float().mean(1)[:, None, None], kv

    discovery = found(Masked, (IDS[:2, :3], torch.ones(2, 3).long()))
    later = {spec.path: tuple(map(str, spec.shape)) for spec in discovery.later.tensors}
    assert later["attention_mask"] == ("batch", "past + query")
    assert later["ids"] == ("batch", "query")


def test_sizes_of_their_own() -> None:
    class CrossAttention(Small):
        def forward(self, ids, encoder_states, past=None):
            logits, kv = super().forward(ids, past)
            return logits + encoder_states.mean(1, keepdim=True), kv

    discovery = found(CrossAttention, (IDS[:2, :3], torch.zeros(2, 5, 12)))
    later = {spec.path: tuple(map(str, spec.shape)) for spec in discovery.later.tensors}
    assert later["encoder_states"] == ("batch", "encoder", "12")
    assert len(set(discovery.hints.values())) == len(discovery.hints), "no two sizes are equal"


def test_one_token_at_a_time() -> None:
    class OneByOne(Small):
        def forward(self, ids, past=None):
            assert past is None or ids.shape[1] == 1
            return super().forward(ids, past)

    assert found(OneByOne).asked == {"query": 1}
    assert found(Small).asked == {}


class TwoPasts(Small):
    def forward(self, ids, first=None, second=None):
        for past in (first, second):
            if past is not None:
                logits, kv = super().forward(ids, past)
                return logits, kv
        return super().forward(ids)


def test_several_candidates_are_told_and_one_can_be_named() -> None:
    with pytest.raises(CacheNotFoundError) as caught:
        found(TwoPasts)
    says_what_to_do(caught.value)
    for word in ("first", "second", "cache="):
        assert word in str(caught.value)
    named = found(TwoPasts, cache="second")
    assert [path for path, _ in cache_of(named)] == ["second[0]", "second[1]"]


class NoCache(Small):
    def forward(self, ids, scale=None):
        return super().forward(ids)[0]


def test_no_candidate_is_told() -> None:
    with pytest.raises(CacheNotFoundError) as caught:
        found(NoCache)
    says_what_to_do(caught.value)
    for word in ("NoCache", "ids", "scale", "cache=", "carry="):
        assert word in str(caught.value)


def test_a_wrong_name_is_told() -> None:
    with pytest.raises(CacheNotFoundError, match=r"no argument 'pasts'(.|\n)*ids, past"):
        found(Small, cache="pasts")
    with pytest.raises(CacheNotFoundError, match="scale does not take"):
        found(NoCache, cache="scale")


def test_carry_says_how_outputs_feed_the_next_call() -> None:
    class ByHand(Small):
        """Gives its cache in another form than it takes it."""

        def forward(self, ids, past=None):
            logits, (k, v) = super().forward(ids, past)
            return logits, {"values": v, "keys": k}

    def carry(outputs: Any, inputs: Any) -> dict[str, Any]:
        return {"past": (outputs[1]["keys"], outputs[1]["values"])}

    discovery = found(ByHand, carry=carry)
    assert [path for path, _ in cache_of(discovery)] == ["past[0]", "past[1]"]
    paths = [leaf.path for leaf in discovery.first_path.output_leaves]
    assert [paths[place] for place in discovery.carried] == ["[1]['keys']", "[1]['values']"]


def test_a_carry_that_joins_by_itself_is_refused() -> None:
    class NewRowsAlone(Small):
        """Returns the new rows; its caller keeps the others."""

        def forward(self, ids, past=None):
            logits, (k, v) = super().forward(ids, past)
            return logits, (k[:, -ids.shape[1] :], v[:, -ids.shape[1] :])

    def carry(outputs: Any, inputs: Any) -> dict[str, Any]:
        if inputs.get("past") is None:
            return {"past": outputs[1]}
        pairs = zip(inputs["past"], outputs[1], strict=True)
        return {"past": tuple(torch.cat(pair, 1) for pair in pairs)}

    with pytest.raises(CacheNotFoundError, match="carry= computes past") as caught:
        found(NewRowsAlone, {"ids": IDS_ALONE[0]}, carry=carry)
    says_what_to_do(caught.value)


# The first call.


def test_inputs_are_probed_where_none_are_given() -> None:
    first = find_first_call(small())
    assert first.kwargs["ids"].dtype == torch.int64
    assert first.kwargs["ids"].dim() == 2
    assert not first.is_given
    assert first.assumed


def test_inputs_that_the_model_offers_are_taken() -> None:
    class Offering(Small):
        @property
        def dummy_inputs(self):
            return {"ids": IDS[:2, :4]}

    first = find_first_call(small(Offering))
    assert first.kwargs["ids"].shape == (2, 4)
    assert "dummy_inputs" in first.assumed[0]


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 5, 7))

    def forward(self, thing):
        return thing.nothing_that_a_tensor_has()


def test_inputs_that_do_not_run_are_told() -> None:
    with pytest.raises(CaptureError, match=r"No example inputs(.|\n)*Odd\.forward\(thing\)"):
        find_first_call(Odd())
    with pytest.raises(CaptureError, match=r"does not run with the example inputs") as caught:
        find_first_call(small(), (torch.zeros(2, 3),))
    assert "small.py" in str(caught.value)
    with pytest.raises(CaptureError):
        find_first_call(small(), {"idx": IDS})


# Dimensions.


def call(*shapes: tuple[int, ...]) -> Call:
    tensors = tuple(torch.zeros(shape) for shape in shapes)
    return call_of(torch.nn.Module(), tensors, {}, {0: "x", 1: "y"})


class Works(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return self.function(*args)


DIMENSIONS = [
    ("all alone", lambda x: x + 1, [(2, 3)], [{(0, 0)}, {(0, 1)}]),
    ("a width", lambda x: x @ torch.zeros(4, 2), [(3, 4)], [{(0, 0)}]),
    ("two that belong together", lambda x, y: x + y, [(3, 4), (3, 4)],
     [{(0, 0), (1, 0)}, {(0, 1), (1, 1)}]),
    ("a product", lambda x, y: x @ y, [(2, 5), (5, 3)], [{(0, 0)}, {(0, 1), (1, 0)}, {(1, 1)}]),
    ("a square", lambda x: x @ x, [(4, 4)], [{(0, 0), (0, 1)}]),
    ("a one that may grow", lambda x: x * 2, [(1, 3)], [{(0, 0)}, {(0, 1)}]),
    ("a one that may not", lambda x: x.squeeze(0).view(3) + 1, [(1, 3)], []),
    ("equal by accident", lambda x, y: (x.sum(), y.sum()), [(3,), (3,)], [{(0, 0)}, {(1, 0)}]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "function", "shapes", "groups"), DIMENSIONS)
def test_dimensions_that_vary_and_those_that_vary_together(
    name: str, function: Any, shapes: list[tuple[int, ...]], groups: list[set[tuple[int, int]]]
) -> None:
    _, result = find_dimensions(Works(function), call(*shapes))
    assert sorted(map(sorted, result)) == sorted(map(sorted, groups))


def test_resized_calls() -> None:
    larger = resized(call((2, 3), (4,)), {(0, 1): 9, (1, 0): 7})
    assert [spec.shape for spec in larger.tensors] == [(2, 9), (7,)]
    assert [spec.path for spec in larger.tensors] == ["x", "y"]
    leaves, _ = flatten(((IDS,), {}))
    assert len(leaves) == 1
    assert all(isinstance(spec, TensorSpec) for spec in larger.tensors)


class OpaqueCache:
    """Keeps its tensors where nothing finds them."""

    def __init__(self, held: torch.Tensor) -> None:
        self.read = lambda: held


class ReturnsOpaqueCache(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = torch.nn.Embedding(9, 4)

    def forward(self, ids: torch.Tensor, past_key_values: Any = None) -> Any:
        x = self.emb(ids)
        k = x if past_key_values is None else torch.cat([past_key_values.read(), x], 1)
        return x + k.sum(1, keepdim=True), OpaqueCache(k)


def test_a_class_in_which_no_tensor_is_found_is_named() -> None:
    with pytest.raises(CacheNotFoundError) as refused:
        discover(ReturnsOpaqueCache().eval(), (torch.zeros(2, 3, dtype=torch.long),))
    assert "holds an object of class OpaqueCache, in which no tensor is found" in str(refused.value)
    assert "attributes, tuples, lists or dicts" in str(refused.value)
