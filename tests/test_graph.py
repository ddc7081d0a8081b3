"""The one graph: sizes read from inputs, the model's own parameters, nothing hidden."""

from __future__ import annotations

import itertools
import re

import pytest
import sympy
import torch
from torch import fx, nn
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod

import cachefree
from cachefree.errors import CaptureError
from cachefree.graph import emit
from cachefree.laws.evaluation import apply
from cachefree.sizes import size_symbol
from cachefree.terms import Table

from .assertions import graph_is_plain
from .models.gpt import GPTConfig, NanoGPT
from .small import IDS, Small, rewritten_small, small

aten = torch.ops.aten
B, N, P = (size_symbol(name) for name in ("b", "n", "p"))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small(lambda: NanoGPT(GPTConfig(n_layer=1)))


@pytest.fixture(scope="module")
def rewritten(model: nn.Module) -> cachefree.Rewritten:
    return cachefree.rewrite(model, (IDS[:2, :3],))


def test_the_graph_is_plain(rewritten: cachefree.Rewritten) -> None:
    graph_is_plain(rewritten.graph_module)


def test_no_example_size_is_left_in_the_graph(rewritten: cachefree.Rewritten) -> None:
    """The same graph at sizes that differ from those of the capture in every way."""
    graph = rewritten.graph_module
    for batch, past, query in itertools.product((1, 4), (0, 1, 6), (1, 2)):
        shape = (batch, 2, past, 8)
        logits, key, value = graph(
            torch.zeros(batch, query, dtype=torch.long), torch.zeros(shape), torch.zeros(shape)
        )
        assert logits.shape == (batch, query, 37)
        assert key.shape == value.shape == (batch, 2, past + query, 8)


def test_parameters_are_the_models_own(model: nn.Module, rewritten: cachefree.Rewritten) -> None:
    for module in (rewritten, rewritten.graph_module):
        ours = dict(module.named_parameters(remove_duplicate=False))
        theirs = dict(model.named_parameters(remove_duplicate=False))
        assert ours.keys() == theirs.keys()
        assert all(ours[name] is theirs[name] for name in theirs)
        buffers = dict(model.named_buffers())
        found = {name: tensor for name, tensor in module.named_buffers() if name in buffers}
        assert found.keys() == buffers.keys()
        assert all(found[name] is buffers[name] for name in buffers)


def test_state_dict_is_the_models(model: nn.Module, rewritten: cachefree.Rewritten) -> None:
    ours, theirs = rewritten.state_dict(), model.state_dict()
    assert list(ours) == list(theirs)
    assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in theirs)
    rewritten.load_state_dict(theirs)


def test_tied_weights_stay_tied(model: nn.Module, rewritten: cachefree.Rewritten) -> None:
    assert rewritten.lm_head.weight is rewritten.transformer.wte.weight
    assert rewritten.lm_head.weight is model.lm_head.weight
    assert len(list(rewritten.parameters())) == len(list(model.parameters()))


def test_train_and_eval_of_one_do_not_reach_the_other(
    model: nn.Module, rewritten: cachefree.Rewritten
) -> None:
    rewritten.train()
    assert not model.training
    assert not any(module.training for module in model.modules())
    rewritten.eval()


def test_nodes_carry_the_names_and_lines_of_the_model(rewritten: cachefree.Rewritten) -> None:
    nodes = [n for n in rewritten.graph_module.graph.nodes if n.op == "call_function"]
    named = [node for node in nodes if node.name.startswith("transformer_h_0_attn")]
    assert named
    traced = [node for node in nodes if "stack_trace" in node.meta]
    assert any("gpt.py" in node.meta["stack_trace"] for node in traced)


def test_names_of_all_levels_can_be_read(rewritten: cachefree.Rewritten) -> None:
    """A node is named by the path of its module, however deep, and by its operator."""
    graph = rewritten.graph_module.graph
    names = {node.name for node in graph.nodes if node.op == "call_function"}
    assert names >= {
        "add",
        "lm_head_linear",
        "transformer_wte_embedding",
        "transformer_h_0_add",
        "transformer_h_0_ln_1_layer_norm",
        "transformer_h_0_attn_softmax",
        "transformer_h_0_attn_c_attn_linear",
        "transformer_h_0_mlp_c_fc_linear",
    }
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", name) for name in names)
    parameters = {node.name for node in graph.nodes if node.op == "get_attr"}
    assert {"transformer_wte_weight", "transformer_h_0_mlp_c_fc_bias"} <= parameters


def test_outputs_are_nodes_of_their_own() -> None:
    class HandsOn(Small):
        """Returns its keys twice, and the ids as they came."""

        def forward(self, ids, past=None):
            logits, (k, v) = super().forward(ids, past)
            return logits, (k, v), k, ids

    rewritten = rewritten_small(small(HandsOn))
    (output,) = [n for n in rewritten.graph_module.graph.nodes if n.op == "output"]
    results = output.args[0]
    assert len(results) == len(set(results)) == 5
    assert all(node.op == "call_function" for node in results)


def test_constants_are_registered_and_shared() -> None:
    class Scaled(Small):
        def forward(self, ids, past=None):
            logits, present = super().forward(ids, past)
            return logits * torch.tensor([0.5, 2.0, 3.0, 1.0] * 3), present

    model = small(Scaled)
    rewritten = rewritten_small(model)
    torch.testing.assert_close(rewritten(IDS)[0], model(IDS)[0])
    assert list(rewritten.state_dict()) == list(model.state_dict())


# Single terms, written as graphs.


def table_and_input() -> tuple[Table, object]:
    table = Table()
    return table, table.input("x", (B, N, 4), torch.float32, torch.device("cpu"))


CANONICAL = {
    "reshape": lambda x: ((x, (N, B, 4)), (N, B, 4)),
    "permute": lambda x: ((x, (1, 2, 0)), (N, 4, B)),
    "expand": lambda x: ((x, (3, B, N, 4)), (3, B, N, 4)),
    "slice": lambda x: ((x, 2, 1, 3, 1), (B, N, 2)),
    "cat": lambda x: (((x, x), 1), (B, 2 * N, 4)),
    "full": lambda x: (((N, B), 2.5, torch.float32, torch.device("cpu")), (N, B)),
}


@pytest.mark.parametrize("op", CANONICAL)
def test_canonical_terms_are_written_as_what_they_mean(op: str) -> None:
    table, x = table_and_input()
    args, shape = CANONICAL[op](x)
    term = table.like(x, op, args, shape)
    graph = emit(nn.Module(), [("x", x)], [("y", term)])
    for b, n in itertools.product((0, 1, 3), (0, 1, 2)):
        tensor = torch.randn(b, n, 4)

        def given(arg, values={B: b, N: n}, tensor=tensor):  # noqa: B006 - bound here
            if isinstance(arg, tuple):
                return tuple(given(part) for part in arg)
            if isinstance(arg, sympy.Basic):
                return int(arg.subs(values))
            return tensor if arg is x else arg

        expected = apply(term, given(args), given(shape))
        assert torch.equal(graph(tensor)[0], expected), (b, n)


def test_ranges_and_casts() -> None:
    table, x = table_and_input()
    cpu = torch.device("cpu")
    count = table.make("arange", (P, N, 2, torch.int64, cpu), (N,), torch.int64, cpu)
    cast = table.make("cast", (count, torch.float16, cpu), (N,), torch.float16, cpu)
    past = table.input("past", (P,), torch.float32, cpu)
    graph = emit(nn.Module(), [("x", x), ("past", past)], [("y", cast)])
    found = graph(torch.zeros(1, 3, 4), torch.zeros(5))[0]
    assert found.dtype == torch.float16
    assert found.tolist() == [5.0, 7.0, 9.0]


SIZES = [
    N + P - 3,
    2 * N * P,
    N**2 - P,
    Max(N, P),
    Max(N - 4, 0),
    Min(N, P, 5),
    FloorDiv(N + P, 2),
    Mod(N, 3),
    P - N + 20,
]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_are_computed_from_the_inputs(size: sympy.Basic) -> None:
    table = Table()
    cpu = torch.device("cpu")
    x = table.input("x", (N,), torch.float32, cpu)
    y = table.input("y", (P,), torch.float32, cpu)
    term = table.make("full", ((size,), 1.0, torch.float32, cpu), (size,), torch.float32, cpu)
    graph = emit(nn.Module(), [("x", x), ("y", y)], [("z", term)])
    for n, p in itertools.product(range(4, 9), range(5)):
        expected = max(int(size.subs({N: n, P: p})), 0)
        if int(size.subs({N: n, P: p})) >= 0:
            assert graph(torch.zeros(n), torch.zeros(p))[0].shape == (expected,), (n, p)


def test_a_size_inside_a_sum_is_solved_for() -> None:
    table = Table()
    cpu = torch.device("cpu")
    x = table.input("x", (N,), torch.float32, cpu)
    mask = table.input("mask", (N + P,), torch.float32, cpu)
    term = table.make("full", ((P,), 1.0, torch.float32, cpu), (P,), torch.float32, cpu)
    graph = emit(nn.Module(), [("x", x), ("mask", mask)], [("z", term)])
    assert graph(torch.zeros(3), torch.zeros(10))[0].shape == (7,)
    assert graph(torch.zeros(3), torch.zeros(3))[0].shape == (0,)


def test_a_size_that_no_input_has_is_refused() -> None:
    table, x = table_and_input()
    cpu = torch.device("cpu")
    term = table.make("full", ((P,), 1.0, torch.float32, cpu), (P,), torch.float32, cpu)
    with pytest.raises(CaptureError, match="size p cannot be read"):
        emit(nn.Module(), [("x", x)], [("z", term)])
    odd = sympy.sin(N)
    term = table.make("full", ((odd,), 1.0, torch.float32, cpu), (odd,), torch.float32, cpu)
    with pytest.raises(CaptureError, match="sin"):
        emit(nn.Module(), [("x", x)], [("z", term)])


def test_a_slice_is_written_as_people_write_it() -> None:
    table, x = table_and_input()
    start = Max(N - 3, 0)
    term = table.like(x, aten.slice.Tensor, (x, 1, start, N, 1), (B, N - start, 4))
    graph = emit(nn.Module(), [("x", x)], [("y", term)])
    (node,) = [n for n in graph.graph.nodes if n.target is aten.slice.Tensor]
    assert node.args[2] == -3
    for n in range(6):
        tensor = torch.randn(2, n, 4)
        assert torch.equal(graph(tensor)[0], tensor[:, -3:])
    assert isinstance(graph, fx.GraphModule)
