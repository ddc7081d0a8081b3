"""Nested values taken apart and put together again, whatever their classes."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, defaultdict, namedtuple
from typing import Any

import pytest
import torch
from torch import nn

from cachefree.structure import MismatchError, flatten, leaf_paths

from .models.flags import CausalLMOutput, Prediction

Pair = namedtuple("Pair", ["key", "value"])


@dataclasses.dataclass
class Layer:
    key: torch.Tensor
    value: torch.Tensor | None = None
    name: str = "layer"


@dataclasses.dataclass(frozen=True)
class FrozenLayer:
    key: torch.Tensor
    count: int = 3


class Slotted:
    __slots__ = ("key", "value")

    def __init__(self, key: torch.Tensor, value: Any) -> None:
        self.key, self.value = key, value


class Held:
    """A plain object with a list inside, and a method that uses it."""

    def __init__(self, keys: list[torch.Tensor]) -> None:
        self.keys = keys
        self.seen = 7

    def length(self) -> int:
        return self.keys[0].shape[0]


def t(number: int) -> torch.Tensor:
    return torch.full((2,), float(number))


VALUES = {
    "a tensor": (lambda: t(0), [""]),
    "a tuple": (lambda: (t(0), t(1)), ["[0]", "[1]"]),
    "a list with None": (lambda: [t(0), None, t(1)], ["[0]", "[2]"]),
    "a dict": (lambda: {"k": t(0), 3: t(1)}, ["['k']", "[3]"]),
    "an OrderedDict": (lambda: OrderedDict(b=t(0), a=t(1)), ["['b']", "['a']"]),
    "a defaultdict": (lambda: _filled(), ["['x'][0]"]),
    "a named tuple": (lambda: Pair(t(0), (t(1),)), [".key", ".value[0]"]),
    "a dataclass": (lambda: Layer(t(0)), [".key"]),
    "a frozen dataclass": (lambda: FrozenLayer(t(0)), [".key"]),
    "a class with slots": (lambda: Slotted(t(0), [t(1)]), [".key", ".value[0]"]),
    "a plain object": (lambda: Held([t(0), t(1)]), [".keys[0]", ".keys[1]"]),
    "an output class": (
        lambda: CausalLMOutput(None, t(0), ((t(1), t(2)),)),
        ["['logits']", "['past_key_values'][0][0]", "['past_key_values'][0][1]"],
    ),
    "an object with None": (lambda: Prediction(t(0), t(1)), [".logits", ".hidden"]),
    "nested": (
        lambda: ({"layers": [Layer(t(0), t(1)), Pair(t(2), None)]}, Held([t(3)]), 5, "text"),
        [
            "[0]['layers'][0].key",
            "[0]['layers'][0].value",
            "[0]['layers'][1].key",
            "[1].keys[0]",
        ],
    ),
}


def _filled() -> defaultdict[str, list[torch.Tensor]]:
    found: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
    found["x"].append(t(0))
    return found


def shown(value: Any) -> Any:
    """A value as plain Python, with its classes."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return type(value).__name__, [(key, shown(part)) for key, part in value.items()]
    if isinstance(value, (tuple, list)):
        return type(value).__name__, [shown(part) for part in value]
    names = list(getattr(value, "__dict__", {})) or list(getattr(type(value), "__slots__", ()))
    if names and not callable(value):
        return type(value).__name__, [(name, shown(getattr(value, name))) for name in names]
    return value


@pytest.mark.parametrize("name", VALUES)
def test_rebuilt_value_is_the_value(name: str) -> None:
    make, paths = VALUES[name]
    value = make()
    leaves, structure = flatten(value)
    assert structure.leaf_count == len(leaves)
    assert leaf_paths(structure) == paths
    again = structure.rebuild(leaves)
    assert type(again) is type(value)
    assert shown(again) == shown(value)


@pytest.mark.parametrize("name", VALUES)
def test_rebuilding_with_other_leaves_leaves_the_value_alone(name: str) -> None:
    value = VALUES[name][0]()
    before = shown(value)
    leaves, structure = flatten(value)
    other = structure.rebuild([leaf + 10 for leaf in leaves])
    assert shown(value) == before
    found, _ = flatten(other)
    assert [leaf.tolist() for leaf in found] == [(leaf + 10).tolist() for leaf in leaves]
    assert other is not value


@pytest.mark.parametrize("name", VALUES)
def test_leaves_are_taken_from_a_value_made_alike(name: str) -> None:
    value = VALUES[name][0]()
    leaves, structure = flatten(value)
    other = structure.rebuild([leaf + 10 for leaf in leaves])
    taken = structure.take(other)
    assert [leaf.tolist() for leaf in taken] == [(leaf + 10).tolist() for leaf in leaves]


def test_objects_keep_what_is_no_tensor_and_can_do_what_they_can() -> None:
    leaves, structure = flatten(Held([t(0)]))
    again = structure.rebuild([torch.zeros(9)])
    assert again.seen == 7
    assert again.length() == 9
    assert leaves[0].shape == (2,)


def test_attributes_of_an_output_class_follow_its_entries() -> None:
    leaves, structure = flatten(CausalLMOutput(None, t(0), (t(1),)))
    again = structure.rebuild([leaf + 1 for leaf in leaves])
    assert again.logits is again["logits"]
    assert again.past_key_values[0].tolist() == [2.0, 2.0]
    assert again.loss is None


def test_no_leaf_is_left_over_or_missing() -> None:
    _, structure = flatten((t(0), t(1)))
    with pytest.raises(ValueError, match="more leaves"):
        structure.rebuild([t(0), t(1), t(2)])
    with pytest.raises(StopIteration):
        structure.rebuild([t(0)])


def test_modules_parameters_and_functions_are_constants() -> None:
    module, parameter = nn.Linear(2, 2), nn.Parameter(t(0))
    leaves, structure = flatten([module, parameter, len, t(1)])
    assert len(leaves) == 1
    module_again, parameter_again, function, _ = structure.rebuild(leaves)
    assert module_again is module
    assert parameter_again is parameter
    assert function is len


def test_values_that_hold_themselves_come_to_an_end() -> None:
    value: list[Any] = [t(0)]
    value.append(value)
    leaves, structure = flatten(value)
    assert len(leaves) == 1
    assert structure.rebuild(leaves)[1] is value


WRONG = [
    ((t(0), t(1)), (t(0),), "past has 1 entries where 2 are expected"),
    ((t(0), t(1)), None, "past is None where a tuple of 2 is expected"),
    ((t(0), t(1)), t(0), "past is a tensor where a tuple of 2 is expected"),
    ([(t(0), t(1))], [(t(0), None)], "past[0][1] is None where a tensor is expected"),
    ([t(0)], [(t(0), t(1))], "past[0] is a tuple of 2 where a tensor is expected"),
    ({"k": t(0)}, {"v": t(0)}, "past has other keys: missing ['k'], not expected ['v']"),
    ({"k": t(0)}, [t(0)], "past is a list of 1 where a dict of 1 is expected"),
    (Pair(t(0), t(1)), (t(0), t(1)), "past is a tuple of 2 where a Pair of 2 is expected"),
    ((t(0), "left"), (t(0), "right"), "past[1] is str 'right' where str 'left' is expected"),
    ((t(0), 3), (t(0), True), "past[1] is bool True where int 3 is expected"),
    (Layer(t(0), t(1)), Layer(t(0)), "past.value is None where a tensor is expected"),
]


@pytest.mark.parametrize(("expected", "given", "says"), WRONG)
def test_a_value_made_otherwise_is_named_with_its_place(
    expected: Any, given: Any, says: str
) -> None:
    _, structure = flatten(expected)
    with pytest.raises(MismatchError) as caught:
        structure.take(given, "past")
    assert says in str(caught.value)


def test_lists_and_tuples_stand_for_one_another() -> None:
    _, structure = flatten(((t(0),), [t(1)]))
    assert len(structure.take([[t(0)], (t(1),)])) == 2


def test_the_first_difference_of_two_structures_is_told() -> None:
    def structure(value: Any) -> Any:
        return flatten(value)[1]

    one = structure((t(0), {"a": t(1), "b": 3}))
    assert one.difference(structure([t(0), {"a": t(1), "b": 3}])) is None
    assert one.difference(structure((t(0), {"a": t(1), "b": 4})), "result") == (
        "result[1]['b'] is int 4 where int 3 is expected"
    )
    assert "result[1] is a dict of 1" in one.difference(structure((t(0), {"a": t(1)})), "result")
    assert "is None where a tensor" in one.difference(structure((None, {"a": t(1), "b": 3})))


class _Layer:
    def __init__(self, keys: Any = None) -> None:
        self.keys = keys


def test_empty_layers_are_absent_whatever_their_number() -> None:
    _, structure = flatten([_Layer(torch.zeros(2)), _Layer(torch.zeros(2))])
    for number in (0, 1, 2, 3):
        assert structure.is_absent([_Layer() for _ in range(number)])
    assert not structure.is_absent([_Layer(), _Layer(), _Layer(torch.zeros(2))])
    assert not structure.is_absent([_Layer(torch.zeros(1)), 5])


class Unnamed:
    def __repr__(self) -> str:
        return "key"


def test_keys_that_are_written_alike_have_paths_of_their_own() -> None:
    _, structure = flatten({nn.Linear(2, 2): {"k": torch.ones(1)}, nn.Linear(2, 2): torch.ones(1)})
    assert len(set(leaf_paths(structure))) == 2
    _, structure = flatten({Unnamed(): torch.ones(1), Unnamed(): torch.ones(2)})
    assert leaf_paths(structure, "past") == ["past[key]", "past[key]#2"]
