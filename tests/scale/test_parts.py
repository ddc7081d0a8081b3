"""The parts of one graph, each run where its weights and slots are, are the graph bit for bit."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import cachefree
from cachefree.errors import CacheFreeError, DomainError, StageError
from cachefree.scale.parts import parted
from tests.models.case import seeded
from tests.scale.in_threads import decoders, together

CPU = torch.device("cpu")
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


class Stacked(nn.Module):
    """One cache tensor for both layers, a state that starts from a parameter, parts of a split."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.table, self.start = nn.Embedding(12, size), nn.Parameter(torch.ones(size))
        self.layers = nn.ModuleList(nn.Linear(size, 2 * size) for _ in range(2))
        self.scores = nn.Linear(size, 12)

    def forward(self, ids: torch.Tensor, past: Any = None) -> Any:
        x = self.table(ids)
        state = self.start.expand(len(ids), -1) if past is None else past[1]
        rows = []
        for place, layer in enumerate(self.layers):
            key, value = layer(x).chunk(2, dim=-1)
            rows.append(key if past is None else torch.cat([past[0][place], key], dim=1))
            x = x + value * rows[-1].mean(1, keepdim=True) + state[:, None]
        return self.scores(x), (torch.stack(rows), state + x.sum(1))


@pytest.fixture(scope="module")
def stacked() -> cachefree.Rewritten:
    return cachefree.rewrite(seeded(Stacked)().eval(), (IDS[:, :3],))


def calls_agree(rewritten: Any, stages: Any) -> list[Any]:
    """Calls of all stages against calls of the whole graph; the decoders."""
    running = decoders(rewritten, stages)
    caches: list[dict[str, torch.Tensor]] = [{} for _ in running]
    given: dict[str, torch.Tensor] = {}
    interface = rewritten.interface
    for ids in (IDS[:, :3], IDS[:, 3:4], IDS[:, 3:], IDS[:, :1]):
        flat = rewritten.flatten_call(ids)
        for place, spec in enumerate(interface.inputs):
            flat[place] = given.get(spec.name, flat[place])
        expected = dict(
            zip((s.name for s in interface.outputs), rewritten.graph_module(*flat), strict=True)
        )
        calls = [partial(d, ids, **own) for d, own in zip(running, caches, strict=True)]
        for place, found in enumerate(together(calls)):
            for name, tensor in found.items():
                assert torch.equal(tensor, expected[name])
            caches[place] = running[place].next_cache(found)
        assert sum(map(len, caches)) == len(interface.cache)
        given = {slot.past.name: expected[slot.present.name] for slot in interface.cache}
    return running


@pytest.mark.parametrize("stages", [1, 2, 3, 5, ["layers.1", "scores"]])
def test_parts_are_the_whole(stages: Any, stacked: Any) -> None:
    with torch.no_grad():
        running = calls_agree(stacked, stages)
    assert sum(len(decoder.interface.cache) for decoder in running) == 2


def test_a_slot_that_two_stages_need_stays_with_the_first(stacked: Any) -> None:
    parts = [parted(stacked.graph_module, stacked.interface, 5, n, CPU) for n in range(5)]
    back = [(n, to, names) for n, part in enumerate(parts) for to, names in part.sent_back.items()]
    assert back
    for later, first, names in back:
        assert first < later
        assert parts[first].got_back[later] == names
        assert set(names) <= set(parts[first].outputs.values())
    assert sorted(slot for part in parts for slot in part.slots) == [0, 1]


def test_cuts_avoid_what_would_travel(stacked: Any) -> None:
    first, second = (
        parted(stacked.graph_module, stacked.interface, ["layers.1"], n, CPU) for n in range(2)
    )
    assert second.slots == (0, 1)  # both layers' rows are one tensor
    assert not second.sent_back
    assert "layers.0.weight" in first.weights
    assert "layers.1.weight" in second.weights
    assert not set(first.weights) & set(second.weights)


def test_what_fails_or_differs_in_one_stage_is_an_error_in_all(stacked: Any) -> None:
    running = decoders(stacked, 2)

    def failing(ids: torch.Tensor) -> list[Any]:
        def call(decoder: Any, ids: torch.Tensor) -> Any:
            with pytest.raises(CacheFreeError) as error:
                decoder(ids)
            return error.value

        return together([partial(call, d, ids) for d in running])

    for error in failing(IDS + 90):
        assert isinstance(error, StageError)
        assert "Stage 1 of 2 could not compute its part" in str(error)
        assert "IndexError: index out of range" in str(error)
    for error in failing(IDS[0]):
        assert isinstance(error, DomainError)
        assert "2 are expected" in str(error)
    first, second = together([partial(decoder, IDS) for decoder in running])
    (scores,) = first.keys() & second.keys()
    assert torch.equal(first[scores], second[scores])


def test_cuts_that_cannot_be(stacked: Any) -> None:
    for stages, said in (
        (99, "cannot be cut into 99 stages"),
        (0, "cannot be cut into 0 stages"),
        (["layers.1", "layers.0"], "It runs first, or before the modules"),
        (["blocks.1"], "The graph reads no weight of it"),
    ):
        with pytest.raises(CacheFreeError, match=said):
            parted(stacked.graph_module, stacked.interface, stages, 0, CPU)


def test_without_a_process_group_the_way_to_one_is_told(stacked: Any) -> None:
    with pytest.raises(CacheFreeError, match=r"(?s)No process group was made.*torchrun"):
        cachefree.pipeline(stacked)
