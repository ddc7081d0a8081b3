"""Random generations find what is wrong, tell the smallest, and pass what is right."""

from __future__ import annotations

import builtins
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sympy
import torch
from torch import nn

from cachefree.errors import CacheFreeError, EquivalenceError
from cachefree.sizes import size_symbol
from cachefree.spec import CacheSlot, Condition, Domain, InputSpec, Interface, OutputSpec, Region
from cachefree.verification import Plan, replay, verify
from cachefree.verification.plan import draw_plan, next_sizes
from cachefree.verification.rounding import RandomRounding, Rounding
from cachefree.verification.runners import OwnCall, Runner, double_copy
from cachefree.verification.tolerance import compare
from cachefree.verification.values import InputValues

from .test_onnx import build, inputs

B, S, P = map(size_symbol, ("batch", "query", "past"))
EAGER = ("eager",)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build()


@pytest.fixture(scope="module")
def rewritten(model: nn.Module) -> Any:
    from cachefree.rewrite import rewrite

    return rewrite(model, inputs(2, 0, 3))


class Corrupted(nn.Module):
    """A rewritten module whose flat inputs and outputs are tampered with."""

    def __init__(
        self,
        rewritten: Any,
        before: Callable[[list[torch.Tensor]], None] = lambda flat: None,
        after: Callable[[list[torch.Tensor], list[torch.Tensor]], None] = lambda flat, out: None,
    ) -> None:
        super().__init__()
        self.__dict__["right"] = rewritten
        self.before, self.after = before, after
        names = ("calling", "interface", "graph_module", "report", "neutral_slots", "keeper")
        for name in (*names, "encoder_call"):
            self.__dict__[name] = getattr(rewritten, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        flat = self.right.flatten_call(*args, **kwargs)
        self.before(flat)
        outputs = list(self.right.graph_module(*flat))
        self.after(flat, outputs)
        return self.right.unflatten_result(outputs, flat)


def caught(model: nn.Module, wrong: Any, **options: Any) -> str:
    with pytest.raises(EquivalenceError) as found:
        verify(model, wrong, backends=EAGER, **options)
    return str(found.value)


def test_what_is_right_passes_on_both_backends(model: nn.Module, rewritten: Any) -> None:
    state = torch.get_rng_state()
    found = verify(model, rewritten, dtypes=(), max_examples=15, seed=0)
    assert found.backends == ("eager", "onnxruntime")
    assert found.generations >= 15
    assert found.calls > found.generations
    assert found.invariant > 0
    assert found.differences["onnxruntime"] < 1e-4
    assert re.match(
        r"tested on \d+ generations, \d+ calls: no difference from the model\n"
        r"  eager        (all bits equal|\d+\.\d% of outputs bit for bit, the others within .*)\n"
        r"  onnxruntime  (all bits equal|\d+\.\d% of outputs bit for bit, the others within .*)\n"
        r"  chunks       as one long call in \d+ of \d+ generations of the model$",
        repr(found),
    )
    assert torch.equal(torch.get_rng_state(), state)


def test_wrong_logits_are_found_and_replayed(model: nn.Module, rewritten: Any) -> None:
    def after(flat: list[torch.Tensor], out: list[torch.Tensor]) -> None:
        if flat[0].shape[0] == 3 and flat[3].shape[2] > 2:
            out[0] = out[0] + 1e-2

    wrong = Corrupted(rewritten, after=after)
    text = caught(model, wrong, seed=1)
    assert "eager is not the model: the output [0], call 2 of 2." in text
    assert "batch = 3; new tokens a call: 3, 1; padding: none; seed: 0" in text
    assert (
        "inputs: ids (3, 1), attention_mask (3, 4), position_ids (3, 1), past[0][0] (3, 2, 3, 4)"
        in text
    )
    _, snippet = text.split("  do:    Replay it with:\n\n")
    with pytest.raises(EquivalenceError, match=r"call 2 of 2"):
        exec(snippet, {"model": model, "rewritten": wrong})  # as it is pasted
    plan = eval(re.search(r"Plan\(.*?seed=\d+\)", snippet)[0], {"Plan": Plan})
    assert replay(model, rewritten, plan, backends=EAGER).generations == 1


def swapped(flat: list[torch.Tensor], out: list[torch.Tensor]) -> None:
    out[1], out[2] = out[2], out[1]


def lost(flat: list[torch.Tensor], out: list[torch.Tensor]) -> None:
    out[1] = out[1][:, :, 1:]


def unmasked(flat: list[torch.Tensor]) -> None:
    flat[1] = torch.ones_like(flat[1])


def shifted(flat: list[torch.Tensor]) -> None:
    if flat[3].shape[2] == 1:
        flat[2] = flat[2] + 1


def forgotten(flat: list[torch.Tensor]) -> None:
    flat[4] = torch.zeros_like(flat[4])


@pytest.mark.parametrize(
    ("hooks", "says"),
    [
        ({"after": swapped}, "the output [1][0][0], call 1"),
        (
            {"after": lost},
            "(1, 2, 0, 4) torch.float32, and (1, 2, 1, 4) torch.float32 in the original",
        ),
        ({"before": unmasked}, "padding: left"),
        ({"before": shifted}, "call 2 of"),
        ({"before": forgotten}, "call 2 of"),
    ],
    ids=["swapped", "lost", "unmasked", "shifted", "forgotten"],
)
def test_mutants_are_found(
    model: nn.Module, rewritten: Any, hooks: dict[str, Any], says: str
) -> None:
    assert says in caught(model, Corrupted(rewritten, **hooks), seed=0)


def test_an_exception_is_a_difference(model: nn.Module, rewritten: Any) -> None:
    def before(flat: list[torch.Tensor]) -> None:
        raise RuntimeError("no kernel")

    text = caught(model, Corrupted(rewritten, before=before), max_examples=1)
    assert "it raises RuntimeError: no kernel" in text


def test_another_structure_is_a_difference(model: nn.Module, rewritten: Any) -> None:
    class Renamed(Corrupted):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            logits, past = super().forward(*args, **kwargs)
            return {"logits": logits, "past": past}

    assert "the result is a dict of 2 where" in caught(model, Renamed(rewritten), max_examples=1)


def test_a_model_that_does_not_run(rewritten: Any) -> None:
    class Broken(nn.Linear):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            raise ValueError("not today")

    with pytest.raises(CacheFreeError, match=r"ran on none of the generations(.|\n)*not today"):
        verify(Broken(1, 1).eval(), rewritten, backends=EAGER, dtypes=(), max_examples=3)


def test_a_model_that_draws_random_numbers(rewritten: Any) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build()
            self.calls = 0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            logits, past = self.inner(*args, **kwargs)
            return logits + (1.0 if self.calls == 90 else 0.0), past

    with pytest.raises(CacheFreeError, match="differed once and agreed once"):
        verify(Noisy().eval(), rewritten, backends=EAGER, dtypes=(), max_examples=60, seed=0)


def test_refusals(model: nn.Module, rewritten: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CacheFreeError, match=r"Unknown backends: tpu(.|\n)*eager, onnxruntime"):
        verify(model, rewritten, backends=("tpu",))
    with pytest.raises(CacheFreeError, match="weights are on the meta device"):
        verify(build().to("meta"), rewritten)
    missing = builtins.__import__

    def without_hypothesis(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "hypothesis":
            raise ImportError(name)
        return missing(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_hypothesis)
    with pytest.raises(CacheFreeError, match=r"pip install hypothesis"):
        verify(model, rewritten)


# Tolerance.


def test_bits_pass_and_nan_is_nan() -> None:
    one = torch.tensor([1.0, float("inf"), float("nan")])
    assert compare(one.clone(), one, None) == compare(one, one, None)
    assert compare(one[:2], one[:2], None).has_same_bits
    assert compare(one, one, None).is_same
    assert not compare(torch.tensor([1.0, 2.0, 3.0]), one, None).is_same
    assert compare(torch.tensor([1.0, float("inf"), 3.0]), one, None, skip_nan=True).is_same


def test_integers_must_be_equal() -> None:
    found = compare(torch.tensor([1, 2]), torch.tensor([1, 3]), None)
    assert (found.is_same, found.why) == (False, "1 of 2 values differ")


def test_error_is_measured_against_float64() -> None:
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    original = (exact + 1e-4).float()
    assert compare((exact - 2e-4).float(), original, exact).is_same
    worse = compare((exact + 1e-3).float(), original, exact)
    assert not worse.is_same
    assert "it is 0.001 from the float64 result, the original 0.0001" in worse.why
    assert not compare((exact - 2e-4).float(), original, None).is_same


def test_an_error_that_rounding_makes_too_is_no_difference() -> None:
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    original, actual = (exact + 1e-4).float(), (exact + 1e-3).float()
    assert compare(actual, original, exact, spread=lambda: 5e-4).is_same
    worse = compare(actual, original, exact, spread=lambda: 2e-4)
    assert not worse.is_same
    assert "the original 0.0001; rounding makes 0.0002" in worse.why
    # where there is no exact result, from the original
    assert compare(actual, original, None, spread=lambda: 3e-4).is_same
    assert not compare(actual, original, None, spread=lambda: 1e-4).is_same


def test_how_much_rounding_makes(model: nn.Module, rewritten: Any) -> None:
    exact, own_call = double_copy(model), OwnCall(rewritten)
    assert exact is not None
    runner = Runner("float64", exact, own_call, torch.float64)
    original = Runner("original", model, own_call)
    rounding = Rounding(own_call.interface, torch.float32)
    rows = tuple({"ids": 13, "position_ids": 32}.get(s.path) for s in own_call.interface.inputs)
    plan = Plan((2, 1), {"batch": 2})
    values = InputValues(own_call.interface, rows, plan, torch.device("cpu"))
    for start, query in ((0, 2), (2, 1)):
        sizes = {"batch": 2, "query": query, "past": start}
        tensors = values.of_call(start, sizes)
        rounding.add(tensors, sizes)
        for one in (runner, original):
            outputs, cache = one.call(tensors, sizes), one.cache
            spreads = [rounding.spread(index, one, outputs) for index in range(len(outputs))]
            assert all(1e-9 < spread < 1e-5 for spread in spreads)
            assert one.cache is cache
    assert Rounding(own_call.interface, None).spread(0, runner, outputs) == 0


def test_rounding_moves_no_position() -> None:
    weight = torch.rand(3, 4)
    with RandomRounding(torch.float16, 0, [weight]):
        positions = torch.arange(64).float().mul(0.5).log().mul(2)
        buckets = positions[2:].long()
        view, product = weight[1:], weight @ weight.T
        written = torch.zeros(3, 4).add_(weight)
    assert torch.equal(positions, torch.arange(64).float().mul(0.5).log().mul(2))
    assert torch.equal(buckets, positions[2:].long())
    assert view.data_ptr() == weight[1:].data_ptr()
    assert torch.equal(written, weight)
    error = (product - weight @ weight.T).abs().max()
    assert 0 < error <= 2 * torch.finfo(torch.float16).eps * product.max()


def test_float64_that_computes_something_else_excuses_nothing() -> None:
    original = torch.tensor([1.0, 2.0])
    assert not compare(original + 0.1, original, original.double() + 1).is_same


def test_float32_out_of_a_float16_computation_is_rounded_as_float16() -> None:
    original, exact = torch.tensor([1.001, 2.0]), torch.tensor([1.0, 2.0], dtype=torch.float64)
    actual = torch.tensor([0.999, 2.0])
    assert not compare(actual, original, exact).is_same
    assert compare(actual, original, exact, computed_in=torch.float16).is_same


def test_shapes_and_dtypes_must_be_equal() -> None:
    assert "(2,) torch.float32, and (3,)" in compare(torch.ones(2), torch.ones(3), None).why
    assert not compare(torch.ones(2).double(), torch.ones(2), None).is_same


# Plans and values.


def one_token_later(window: int | None = None) -> Interface:
    ids = InputSpec("ids", "ids", (B, S), torch.int64)
    mask = InputSpec("mask", "key_padding_mask", (B, P + S), torch.bool)
    past = InputSpec("past", "past", (B, P, 4), torch.float32, True)
    grown = P + S if window is None else sympy.Min(window, P + S)
    present = OutputSpec("present", "[1]", (B, grown, 4), torch.float32, True)
    first = Region("first call", (Condition(sympy.Eq(P, 0)),))
    later = Region("later calls", (Condition(sympy.Eq(S, 1)),))
    slot = CacheSlot(past, present, (1,), "zero length on axis 1")
    return Interface((ids, mask, past), (present,), (slot,), Domain((first, later)))


def test_plans_stay_in_the_domain() -> None:
    generator = torch.Generator().manual_seed(0)

    def choose(options: list[Any]) -> Any:
        return options[int(torch.randint(len(options), (), generator=generator))]

    plans = [draw_plan(choose, one_token_later(), True, 0) for _ in range(50)]
    assert all(plan is not None and set(plan.queries[1:]) <= {1} for plan in plans)
    assert {plan.queries[0] for plan in plans if plan} == set(range(1, 8))
    simplest = draw_plan(lambda options: options[0], one_token_later(), True, 0)
    assert simplest == Plan((1,), {"batch": 1}, "none", 0)


def test_the_past_is_what_came_out() -> None:
    sizes = {"batch": 2, "query": 3, "past": 4}
    assert next_sizes(one_token_later(), sizes)["past"] == 7
    assert next_sizes(one_token_later(window=5), sizes)["past"] == 5


def test_chunks_are_cut_out_of_one_sequence() -> None:
    spec = one_token_later()
    plan = Plan((3, 2), {"batch": 2}, "holes", 7)
    values = InputValues(spec, (9, None, None), plan, torch.device("cpu"))
    whole = values.of_call(0, {"batch": 2, "past": 0, "query": 5})
    first = values.of_call(0, {"batch": 2, "past": 0, "query": 3})
    later = values.of_call(3, {"batch": 2, "past": 3, "query": 2})
    assert torch.equal(torch.cat([first["ids"], later["ids"]], 1), whole["ids"])
    assert torch.equal(later["mask"], whole["mask"])
    assert torch.equal(first["mask"], whole["mask"][:, :3])
    assert not whole["mask"][:, 0].any(), "a padding mask marks what is dropped"
    assert whole["ids"].max() < 9


def test_a_window_sees_the_end_of_the_mask() -> None:
    plan = Plan((3, 2), {"batch": 2}, "left", 3)
    values = InputValues(one_token_later(4), (9, None, None), plan, torch.device("cpu"))
    whole = values.of_call(0, {"batch": 2, "past": 0, "query": 5})["mask"]
    cut = values.of_call(3, {"batch": 2, "past": 1, "query": 2})["mask"]
    assert torch.equal(cut, whole[:, 2:])
