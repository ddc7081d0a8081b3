"""Calls that are copied of earlier ones make the graph that they would have made themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import cachefree
from cachefree import capture as capturing
from cachefree.alike import AlikeCalls
from cachefree.provenance import LINE
from cachefree.sizes import expression

from .models import CASES

SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool)
QUICK = ("nano_gpt", "sliding_window_cache")


def written(traced: Any) -> list[Any]:
    """Every node but those of sizes: what it calls, with what, at which line, and what it gives.

    Memory is told by the order in which it is met, and a size by its expression.
    """
    numbers: dict[fx.Node, str] = {}
    memories: dict[int, int] = {}

    def given(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            place = memories.setdefault(value.untyped_storage()._cdata, len(memories))
            layout = (*value.shape, "|", *value.stride(), "|", value.storage_offset())
            return [*map(expression, layout), value.dtype, place]
        return [given(part) for part in value] if isinstance(value, (list, tuple)) else type(value)

    def named(node: fx.Node) -> Any:
        value = node.meta.get("val")
        return expression(value) if isinstance(value, SIZES) else numbers[node]

    found = []
    for node in traced.module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, SIZES) and node.op != "placeholder":
            continue
        numbers[node] = f"node {len(numbers)}"
        operands = str(fx.node.map_arg((node.args, node.kwargs), named))
        target = node.target
        if node.op == "get_attr":
            attribute = getattr(traced.module, str(node.target))
            target = id(attribute) if isinstance(attribute, nn.Parameter) else "constant"
        result = None if node.op in ("get_attr", "output") else given(value)
        found.append((node.op, target, operands, node.meta.get(LINE), result))
    return found


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The captures of a test, each made a second time without copies; None for one without."""
    found: list[Any] = []
    once = capturing._traced_once

    def twice(*given: Any) -> Any:
        if given[-1] is None:
            found.append(None)
            return once(*given)
        # One line makes both: what the capture itself begins with bears the line that asks for it.
        traced, without = [once(*given[:-1], copies) for copies in (given[-1], None)]
        found.append((given[-1][0], traced, without))
        return traced

    monkeypatch.setattr(capturing, "_traced_once", twice)
    return found


@pytest.mark.parametrize(
    "case",
    [case if case.name in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
    ids=str,
)
def test_copies_make_the_same_graph(case: Any, captures: list[Any]) -> None:
    try:
        cachefree.rewrite(case.build(), case.example_inputs, **case.rewrite_options)
    except cachefree.CacheFreeError:
        if not case.may_refuse:
            raise
    assert captures
    for alike, with_copies, without in filter(None, captures):
        if not alike.is_spoiled:
            assert written(with_copies) == written(without)
            asked, all_asked = with_copies.environment, without.environment
            assert asked.questions.keys() == all_asked.questions.keys()
            assert asked.operator_questions.keys() <= all_asked.operator_questions.keys()


class Block(nn.Module):
    """What a test's function makes of a tensor and of what is past."""

    def __init__(self, compute: Callable[..., torch.Tensor], dim: int = 8) -> None:
        super().__init__()
        self.compute = compute
        self.mix = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, past: torch.Tensor | None, number: int) -> Any:
        x = self.mix(x)
        keys = x if past is None else torch.cat([past, x], dim=1)
        return x + self.compute(self, keys, number)[:, keys.shape[1] - x.shape[1] :], keys


class Stack(nn.Module):
    """Four blocks."""

    def __init__(self, compute: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(Block(compute) for _ in range(4))

    def forward(self, ids: torch.Tensor, past: Any = None) -> Any:
        x, new = self.embed(ids), []
        for number, block in enumerate(self.blocks):
            x, keys = block(x, None if past is None else past[number], number)
            new.append(keys)
        return x, tuple(new)


def decays(block: Block, keys: torch.Tensor, number: int) -> torch.Tensor:
    return keys.cumsum(1) * 0.5


def turns(block: Block, keys: torch.Tensor, number: int) -> torch.Tensor:
    pairs = torch.view_as_complex(keys.unflatten(-1, (4, 2)))
    return torch.view_as_real(pairs * pairs).flatten(-2).cumsum(1)


def writes_to_a_view(block: Block, keys: torch.Tensor, number: int) -> torch.Tensor:
    kept = keys * 2
    kept[:, :, :4].mul_(0.5)
    kept[:, :, :4].add_(number)
    return kept.cumsum(1)


def asks_for_gradients(block: Block, keys: torch.Tensor, number: int) -> torch.Tensor:
    made = keys * 2
    assert made.requires_grad in (True, False)
    return made.cumsum(1)


def asks_for_a_size(block: Block, keys: torch.Tensor, number: int) -> torch.Tensor:
    made = keys * 2
    return made.cumsum(1) * (2 if number == 2 and made.shape[0] > 30 else 1)


def built(compute: Callable[..., torch.Tensor]) -> Stack:
    torch.manual_seed(0)
    return Stack(compute).eval()


def rewritten_equals(model: Stack) -> cachefree.Rewritten:
    rewritten = cachefree.rewrite(model, torch.zeros(2, 5, dtype=torch.long))
    ids = torch.randint(0, 20, (3, 9))
    first, past = model(ids[:, :4])
    again, past_again = rewritten(ids[:, :4])
    torch.testing.assert_close(again, first)
    torch.testing.assert_close(rewritten(ids[:, 4:], past_again)[0], model(ids[:, 4:], past)[0])
    return rewritten


@pytest.mark.parametrize("compute", [decays, turns])
def test_blocks_that_are_alike_are_copied(compute: Any, captures: list[Any]) -> None:
    rewritten_equals(built(compute))
    for alike, with_copies, without in captures:
        assert alike.copied > 12
        assert not alike.is_spoiled
        assert written(with_copies) == written(without)


@pytest.mark.parametrize("compute", [writes_to_a_view, asks_for_gradients])
def test_a_run_in_which_a_copy_would_be_noticed_has_none(compute: Any, captures: list[Any]) -> None:
    rewritten_equals(built(compute))
    assert captures.count(None) == 2


def test_a_block_that_asks_is_heard() -> None:
    assert "batch <= 30" in str(list(rewritten_equals(built(asks_for_a_size)).report.questions))


def test_views_that_are_copied_tell_what_is_written() -> None:
    mode = torch._subclasses.FakeTensorMode()
    weights = cachefree.fakes.WeightsAsFakes(mode, torch.device("cpu"))
    with torch.no_grad(), mode, weights, AlikeCalls(weights) as alike:
        one, other = torch.empty(3, 4), torch.empty(3, 4)
        one.chunk(2, 1)
        view, _ = other.chunk(2, 1)
        assert alike.copied == 2
        other.add_(1)
        assert alike.is_spoiled
        assert view._version == other._version == 1
        view.add_(1)
        assert other._version == 2
