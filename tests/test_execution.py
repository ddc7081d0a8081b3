"""The graph module runs with its parameters at hand, and sees what happens to them."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn

import cachefree

from .small import IDS, Small, small


@pytest.fixture
def pair() -> tuple[nn.Module, cachefree.Rewritten]:
    model = small(Small)
    return model, cachefree.rewrite(model, (IDS[:2, :3],))


def logits(graph: nn.Module, rewritten: cachefree.Rewritten) -> torch.Tensor:
    found: torch.Tensor = graph(*rewritten.flatten_call(IDS[:2, :3]))[0]
    return found.detach()


def test_a_parameter_that_is_replaced_is_seen(pair: tuple[nn.Module, cachefree.Rewritten]) -> None:
    model, rewritten = pair
    graph, before = rewritten.graph_module, logits(rewritten.graph_module, rewritten)
    linear = next(module for module in model.modules() if isinstance(module, nn.Linear))
    linear.weight = nn.Parameter(linear.weight.detach() * 2)
    after = logits(graph, rewritten)
    assert not torch.equal(after, before)
    assert torch.equal(after, model(IDS[:2, :3])[0].detach())


def test_a_parameter_that_becomes_a_buffer(pair: tuple[nn.Module, cachefree.Rewritten]) -> None:
    model, rewritten = pair
    graph, before = rewritten.graph_module, logits(rewritten.graph_module, rewritten)
    linear = next(module for module in model.modules() if isinstance(module, nn.Linear))
    weight = linear.weight.detach().clone()
    del linear.weight
    linear.register_buffer("weight", weight)
    assert torch.equal(logits(graph, rewritten), before)


def test_parameters_for_one_call(pair: tuple[nn.Module, cachefree.Rewritten]) -> None:
    _, rewritten = pair
    graph = rewritten.graph_module
    before = logits(graph, rewritten)
    zeros = {name: torch.zeros_like(p) for name, p in graph.named_parameters()}
    flat = tuple(rewritten.flatten_call(IDS[:2, :3]))
    others = torch.func.functional_call(graph, zeros, flat)
    assert not others[0].any()
    assert torch.equal(logits(graph, rewritten), before)


def test_a_copy_runs_with_its_own_parameters(pair: tuple[nn.Module, cachefree.Rewritten]) -> None:
    _, rewritten = pair
    graph = rewritten.graph_module
    before = logits(graph, rewritten)
    copied = copy.deepcopy(graph)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert not logits(copied, rewritten).any()
    assert torch.equal(logits(graph, rewritten), before)


def test_a_graph_that_is_edited_runs_as_edited(pair: tuple[nn.Module, cachefree.Rewritten]) -> None:
    _, rewritten = pair
    graph = copy.deepcopy(rewritten.graph_module)
    output = next(node for node in graph.graph.nodes if node.op == "output")
    with graph.graph.inserting_before(output):
        doubled = graph.graph.call_function(torch.ops.aten.mul.Tensor, (output.args[0][0], 2.0))
    output.args = ((doubled, *output.args[0][1:]),)
    graph.recompile()
    assert torch.equal(logits(graph, rewritten), 2 * logits(rewritten.graph_module, rewritten))


def test_an_error_of_an_operator_tells_the_users_line(
    pair: tuple[nn.Module, cachefree.Rewritten],
) -> None:
    _, rewritten = pair
    with pytest.raises(IndexError) as caught:
        rewritten(torch.full((2, 3), 10**6))
    (note,) = caught.value.__notes__
    lines, start = inspect.getsourcelines(Small.forward)
    where = start + next(k for k, line in enumerate(lines) if "self.emb(ids)" in line)
    assert note == (
        f'raised in the model\'s code:\n  File "{__file__.replace("test_execution", "small")}", '
        f"line {where}, in forward"
    )
