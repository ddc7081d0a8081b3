"""A loop over chunks of tokens and its step, side by side in one graph."""

import pytest
import sympy
import torch
from torch import nn

import cachefree
from cachefree.facts import Facts
from cachefree.padded_sizes import of_whole_blocks
from cachefree.sizes import SizeEnvironment, compiled, expression, size_symbol


class ParallelThenSteps(nn.Module):
    """A decayed sum of all tokens at once, which a later call of one token steps."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.keys = nn.Linear(6, 6)

    def mix(self, x, state):
        if state is not None and x.shape[1] == 1:
            state = 0.5 * state + torch.sin(x[:, 0])
            return state[:, None], state
        places = torch.arange(x.shape[1])
        distance = places[:, None] - places[None]
        decays = 0.5**distance * (distance >= 0)
        mixed = torch.einsum("ts,bsd->btd", decays, torch.sin(x))
        if state is not None:
            mixed = mixed + 0.5 ** (places[None, :, None] + 1) * state[:, None]
        return mixed, mixed[:, -1]

    def forward(self, tokens, past=None):
        state, keys = past if past is not None else (None, None)
        x = self.embed(tokens)
        mixed, state = self.mix(x, state)
        new = self.keys(x + mixed)
        keys = new if keys is None else torch.cat([keys, new], 1)
        return x + mixed + keys.sum(1, keepdim=True), (state, keys)


class ChunksThenSteps(ParallelThenSteps):
    """A loop over chunks of four tokens, which a later call of one token steps."""

    def mix(self, x, state):
        if state is not None and x.shape[1] == 1:
            state = 0.5 * state + torch.sin(x[:, 0])
            return state[:, None], state
        count = x.shape[1]
        missing = (4 - count % 4) % 4
        y = torch.nn.functional.pad(torch.sin(x), (0, 0, 0, missing))
        y = y.reshape(x.shape[0], -1, 4, x.shape[2])
        state = torch.zeros_like(x[:, 0]) if state is None else state
        places = torch.arange(4)
        distance = places[:, None] - places[None]
        decays = 0.5**distance * (distance >= 0)
        mixed = torch.zeros_like(y)
        for chunk in range((count + missing) // 4):
            told = torch.einsum("ts,bsd->btd", decays, y[:, chunk])
            mixed[:, chunk] = told + 0.5 ** (places[None, :, None] + 1) * state[:, None]
            state = mixed[:, chunk, -1]
        mixed = mixed.flatten(1, 2)[:, :count]
        return mixed, state


class StatesAlone(ChunksThenSteps):
    """Nothing grows, so that sizes do not tell a first call from later ones."""

    def forward(self, tokens, past=None):
        mixed, state = self.mix(self.embed(tokens), past)
        return mixed, state


PROMPT = torch.zeros(2, 5, dtype=torch.long)


@pytest.fixture(scope="module")
def rewritten():
    torch.manual_seed(0)
    model = ChunksThenSteps().eval()
    return model, cachefree.rewrite(model, (PROMPT,))


def test_a_loop_over_chunks_and_its_step_are_one_graph(rewritten) -> None:
    _, graph = rewritten
    assert graph.report.verdict is cachefree.Verdict.PROVED_EXACT
    assert [str(region) for region in graph.report.domain.regions] == [
        "first call: every size",
        "later calls: every size",
    ]
    assert "two ways side by side" in [branch.rule for branch in graph.report.branches]


@pytest.mark.parametrize("chunks", [(1, 1, 4), (5, 1, 1, 3, 1), (8, 1, 2), (2, 1), (13,)])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_call_is_the_models_own(rewritten, chunks, batch) -> None:
    model, graph = rewritten
    same_calls(model, graph, torch.randint(0, 20, (batch, sum(chunks))), chunks)


def test_the_way_without_rows_runs_on_onnx_runtime(rewritten, tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    model, graph = rewritten
    cachefree.to_onnx(graph, tmp_path / "m.onnx")
    decoder = cachefree.load_onnx(tmp_path / "m.onnx", like=graph)
    tokens = torch.randint(0, 20, (3, 11))
    for chunks in ((1, 1, 9), (5, 1, 5), (4, 1, 1, 5)):
        same_calls(model, decoder, tokens, chunks)


def same_calls(model, other, tokens, chunks) -> None:
    found = expected = None
    with torch.no_grad():
        for part in tokens.split(chunks, 1):
            expected = model(part, None if expected is None else expected[1])
            found = other(part, None if found is None else found[1])
            torch.testing.assert_close(found, expected)


def test_what_both_ways_have_alike_is_computed_once(rewritten) -> None:
    _, graph = rewritten
    targets = [node.target for node in graph.graph_module.graph.nodes]
    assert targets.count(torch.ops.aten.embedding.default) == 1
    assert targets.count(torch.ops.aten.linear.default) == 1


@pytest.mark.parametrize("build", [ParallelThenSteps, StatesAlone])
def test_what_is_no_step_of_a_loop_or_has_no_length_is_refused(build) -> None:
    with pytest.raises(cachefree.UnsupportedBranchError):
        cachefree.rewrite(build().eval(), (PROMPT,))


def test_sizes_that_are_filled_up_are_whole_blocks() -> None:
    sizes = SizeEnvironment({"n": 5, "m": 7})
    n, m = sizes.sizes["n"], sizes.sizes["m"]
    plain = size_symbol("n")
    for missing in ((8 - n % 8) % 8, -n % 8):
        whole = n + missing
        assert expression(whole // 8 * 8) == expression(whole)
        assert expression(whole // (whole // 8)) == 8
        for number in range(1, 40):
            assert compiled(expression(whole))({"n": number}) == -(-number // 8) * 8
    other = expression(m + (8 - n % 8) % 8)  # what is missing to another size
    for number in range(1, 20):
        assert compiled(other)({"n": number, "m": 3}) == 3 + (8 - number % 8) % 8
    assert of_whole_blocks(plain + 1) == plain + 1


def test_a_quotient_that_facts_decide_is_a_number() -> None:
    n = size_symbol("n")
    whole = expression(SizeEnvironment({"n": 5}).sizes["n"] // 64)
    blocks = whole.subs(n, n + 63)
    assert Facts((sympy.Ge(n, 1), sympy.Lt(n, 4))).simplified(blocks) == 1
    assert Facts((sympy.Ge(n, 1),)).simplified(blocks) == blocks
