"""Ways that are chosen by sizes, side by side in one graph."""

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


class TwoStates(ParallelThenSteps):
    """Each layer with a state of its own."""

    def forward(self, tokens, past=None):
        one, other, keys = past if past is not None else (None, None, None)
        x = self.embed(tokens)
        mixed, one = self.mix(x, one)
        x = x + mixed
        mixed, other = self.mix(x, other)
        x = x + mixed
        new = self.keys(x)
        keys = new if keys is None else torch.cat([keys, new], 1)
        return x + keys.sum(1, keepdim=True), (one, other, keys)


class ConvolutionThenSteps(nn.Module):
    """A convolution over many tokens, which a call of one token steps; keys beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.keys = nn.Embedding(20, 6), nn.Linear(6, 6)
        self.convolution = nn.Conv1d(6, 6, 3, groups=6)

    def forward(self, tokens, past=None):
        x = self.embed(tokens)
        state, keys = past if past is not None else (x.new_zeros(x.shape[0], 6, 2), None)
        window = torch.cat([state, x.transpose(1, 2)], -1)
        if x.shape[1] == 1:
            y = (window * self.convolution.weight[:, 0]).sum(-1) + self.convolution.bias
            y, state = y[:, None], window[:, :, 1:]
        else:
            y, state = self.convolution(window).transpose(1, 2), window[:, :, -2:]
        new = self.keys(x + y)
        keys = new if keys is None else torch.cat([keys, new], 1)
        return x + y + keys.sum(1, keepdim=True), (state, keys)


class StatesAlone(ParallelThenSteps):
    """Nothing grows, so that sizes do not tell a first call from later ones."""

    def forward(self, tokens, past=None):
        mixed, state = self.mix(self.embed(tokens), past)
        return mixed, state


@pytest.fixture(scope="module")
def rewritten():
    model = TwoStates().eval()
    return model, cachefree.rewrite(model, (torch.zeros(2, 5, dtype=torch.long),))


def test_a_parallel_way_and_its_step_are_one_graph(rewritten) -> None:
    _, graph = rewritten
    assert graph.report.verdict is cachefree.Verdict.PROVED_REAL
    assert all(
        region.holds({"batch": 2, "query": 1, "past": 3, "past_0": 3})
        for region in graph.report.domain.regions
        if region.name == "later calls"
    )
    names = [branch.rule for branch in graph.report.branches]
    assert "two ways side by side" in names


@pytest.mark.parametrize("chunks", [(1, 1, 4), (5, 1, 1, 3, 1), (7,)])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_call_is_the_models_own(rewritten, chunks, batch) -> None:
    model, graph = rewritten
    tokens = torch.randint(0, 20, (batch, sum(chunks)))
    mine = own = None
    done = 0
    with torch.no_grad():
        for size in chunks:
            part, done = tokens[:, done : done + size], done + size
            expected, own = model(part, own)
            found, mine = graph(part, mine)
            torch.testing.assert_close((found, mine), (expected, own))


def test_what_both_ways_have_alike_is_computed_once(rewritten) -> None:
    _, graph = rewritten
    targets = [node.target for node in graph.graph_module.graph.nodes]
    assert targets.count(torch.ops.aten.embedding.default) == 1
    assert targets.count(torch.ops.aten.linear.default) == 1


def test_states_alone_do_not_tell_which_way_to_go() -> None:
    with pytest.raises(cachefree.UnsupportedBranchError):
        cachefree.rewrite(StatesAlone().eval(), (torch.zeros(2, 5, dtype=torch.long),))


def test_the_way_without_rows_runs_on_onnx_runtime(tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = ConvolutionThenSteps().eval()
    graph = cachefree.rewrite(model, (torch.zeros(2, 5, dtype=torch.long),))
    assert "two ways side by side" in [branch.rule for branch in graph.report.branches]
    cachefree.to_onnx(graph, tmp_path / "m.onnx")
    decoder = cachefree.load_onnx(tmp_path / "m.onnx", like=graph)
    tokens = torch.randint(0, 20, (3, 8))
    for chunks in ((1, 1, 6), (5, 1, 2)):
        found = expected = None
        for part in tokens.split(chunks, 1):
            found = decoder(part, None if found is None else found[1])
            expected = model(part, None if expected is None else expected[1])
            torch.testing.assert_close(found, expected)


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


@pytest.mark.slow
def test_a_loop_over_chunks_and_its_step_are_one_graph() -> None:
    model = ChunksThenSteps().eval()
    model.forward = TwoStates.forward.__get__(model)
    graph = cachefree.rewrite(model, (torch.zeros(2, 5, dtype=torch.long),))
    assert graph.report.verdict is cachefree.Verdict.PROVED_EXACT
    tokens = torch.randint(0, 20, (2, 12))
    for chunks in ((1, 1, 3), (8, 1, 1, 2), (2, 1), (12,)):
        mine = own = None
        done = 0
        for size in chunks:
            part, done = tokens[:, done : done + size], done + size
            expected, own = model(part, own)
            found, mine = graph(part, mine)
            torch.testing.assert_close((found, mine), (expected, own))


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
