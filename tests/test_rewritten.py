"""What comes back is a good module: it follows the model, and says no in clear words."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import cachefree
from cachefree import DomainError

from .assertions import same, tensors
from .small import IDS, Small, rewritten_small, small


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small()


@pytest.fixture(scope="module")
def rewritten(model: nn.Module) -> cachefree.Rewritten:
    return rewritten_small(model)


def equal_in_chunks(
    model: nn.Module, rewritten: cachefree.Rewritten, ids: torch.Tensor = IDS
) -> None:
    """First call, several tokens, one token."""
    theirs = mine = None
    for chunk in (ids[:, :2], ids[:, 2:4], ids[:, 4:]):
        theirs = model(chunk) if theirs is None else model(chunk, theirs[1])
        mine = rewritten(chunk) if mine is None else rewritten(chunk, mine[1])
        same(mine, theirs)


def test_every_way_to_say_that_nothing_is_past(
    model: nn.Module, rewritten: cachefree.Rewritten
) -> None:
    expected = model(IDS)
    same(rewritten(IDS), expected)
    same(rewritten(IDS, None), expected)
    same(rewritten(ids=IDS, past=None), expected)
    same(rewritten(IDS, past=()), expected)
    same(rewritten(IDS, (None, None)), expected)
    same(rewritten(IDS, rewritten.empty_cache(3)), expected)


def test_empty_cache_is_the_models_own_structure(rewritten: cachefree.Rewritten) -> None:
    cache = rewritten.empty_cache(4, dtype=torch.float64, device="meta")
    assert type(cache) is tuple
    assert [tensor.shape for tensor in cache] == [(4, 0, 6), (4, 0, 6)]
    assert {tensor.dtype for tensor in cache} == {torch.float64}
    assert {tensor.device.type for tensor in cache} == {"meta"}
    assert rewritten.empty_cache()[0].shape == (1, 0, 6)
    assert rewritten.empty_cache()[0].dtype == torch.float32


def test_flat_calls_are_those_of_the_graph(rewritten: cachefree.Rewritten) -> None:
    _, past = rewritten(IDS[:, :2])
    flat = rewritten.flatten_call(IDS[:, 2:], past)
    assert [spec.name for spec in rewritten.interface.inputs] == ["ids", "past_0", "past_1"]
    assert flat[0] is not None
    assert flat[1] is past[0]
    outputs = rewritten.graph_module(*flat)
    same(rewritten.unflatten_result(outputs, flat), rewritten(IDS[:, 2:], past))
    assert rewritten.sizes_of(flat) == {"batch": 3, "query": 3, "past": 2}
    slots = rewritten.neutral_slots({"batch": 2})
    assert [slot.shape for slot in slots] == [(2, 0, 6), (2, 0, 6)]


def test_gradients_are_those_of_the_model(model: nn.Module, rewritten: cachefree.Rewritten) -> None:
    def gradients(module: nn.Module) -> list[torch.Tensor]:
        logits, past = module(IDS[:, :3])
        later, _ = module(IDS[:, 3:], past)
        loss = logits.square().mean() + later.square().sum()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    for mine, theirs in zip(gradients(rewritten), gradients(model), strict=True):
        assert theirs.abs().sum() > 0
        torch.testing.assert_close(mine, theirs)


def test_gradients_of_a_part_without_gradients() -> None:
    class Frozen(Small):
        def forward(self, ids, past=None):
            logits, present = super().forward(ids, past)
            return logits, tuple(tensor.detach() for tensor in present)

    model = small(Frozen)
    rewritten = rewritten_small(model)
    for module in (model, rewritten):
        _, past = module(IDS[:, :3])
        assert not any(tensor.requires_grad for tensor in past)
        model.zero_grad()
        module(IDS[:, 3:], past)[0].sum().backward()
        assert model.out.weight.grad is not None


def test_training_step_of_the_rewritten_model_trains_the_model() -> None:
    model = small()
    rewritten = rewritten_small(model)
    before = model.out.weight.detach().clone()
    optimizer = torch.optim.SGD(rewritten.parameters(), lr=0.1)
    rewritten(IDS)[0].square().mean().backward()
    optimizer.step()
    assert not torch.equal(model.out.weight, before)
    same(rewritten(IDS), model(IDS))


def test_weights_changed_in_place_are_seen() -> None:
    model = small()
    rewritten = rewritten_small(model)
    with torch.no_grad():
        model.out.weight.mul_(2)
        model.emb.weight.data.add_(1)
    equal_in_chunks(model, rewritten)
    model.load_state_dict(small(Small).state_dict())
    equal_in_chunks(model, rewritten)


def test_a_parameter_that_is_replaced_is_seen() -> None:
    model = small()
    rewritten = rewritten_small(model)
    model.out.weight = nn.Parameter(torch.ones_like(model.out.weight))
    equal_in_chunks(model, rewritten)
    assert rewritten.out.weight is model.out.weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_another_dtype_of_the_model_is_seen(dtype: torch.dtype) -> None:
    model = small()
    rewritten = rewritten_small(model)
    model.to(dtype)
    assert rewritten(IDS)[0].dtype == dtype
    equal_in_chunks(model, rewritten)
    assert rewritten.empty_cache()[0].dtype == dtype


def test_another_dtype_of_the_rewritten_model_is_the_models_too() -> None:
    model = small()
    rewritten = rewritten_small(model)
    rewritten.double()
    assert rewritten(IDS)[0].dtype == torch.float64
    if model.out.weight.dtype == torch.float64:
        equal_in_chunks(model, rewritten)


def test_a_submodule_that_is_replaced_is_seen() -> None:
    class WithAdapter(nn.Module):
        """A low-rank adapter, as people put around a projection."""

        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 12, bias=False)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    model = small()
    rewritten = rewritten_small(model)
    plain = rewritten(IDS)[0]
    model.out = WithAdapter(model.out)
    equal_in_chunks(model, rewritten)
    assert not torch.equal(rewritten(IDS)[0], plain)
    assert "out.down.weight" in rewritten.state_dict()


def test_what_is_not_saved_with_the_model_is_not_saved_with_the_rewritten_one() -> None:
    model = small()
    model.register_buffer("seen", torch.ones(3), persistent=False)
    rewritten = rewritten_small(model)
    for module in (rewritten, rewritten.graph_module, copy.deepcopy(rewritten)):
        assert sorted(module.state_dict()) == sorted(model.state_dict())


def test_a_hook_that_is_added_is_seen() -> None:
    model = small()
    rewritten = rewritten_small(model)
    handle = model.out.register_forward_hook(lambda module, args, output: output * 2)
    equal_in_chunks(model, rewritten)
    handle.remove()
    equal_in_chunks(model, rewritten)


def test_a_number_and_a_method_that_are_replaced_on_the_model_are_seen() -> None:
    class Scaled(Small):
        def __init__(self) -> None:
            super().__init__()
            self.gain = 1.0

        def attend(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return super().attend(q, k) * self.gain

    model = small(Scaled)
    rewritten = rewritten_small(model)
    report = rewritten.report
    equal_in_chunks(model, rewritten)
    assert rewritten.report is report
    model.gain = 3.0
    equal_in_chunks(model, rewritten)
    attend = model.attend
    model.attend = lambda q, k: attend(q, k) * 0.5
    equal_in_chunks(model, rewritten)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_copies_are_whole_and_apart(model: nn.Module, copied: Any) -> None:
    rewritten = rewritten_small(model)
    other = copied(rewritten)
    equal_in_chunks(model, other)
    assert list(other.state_dict()) == list(model.state_dict())
    assert str(other.report) == str(rewritten.report)
    ours = {id(parameter) for parameter in rewritten.parameters()}
    assert not ours & {id(parameter) for parameter in other.parameters()}
    with torch.no_grad():
        other.out.weight.zero_()
    assert not torch.equal(model.out.weight, other.out.weight)
    assert torch.equal(other(IDS)[0], other.out.bias.expand(3, 5, 12))
    equal_in_chunks(model, rewritten)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_a_copy_has_no_model_to_capture_again_in_another_dtype(
    model: nn.Module, copied: Any
) -> None:
    other = copied(rewritten_small(model))
    past = other.double().empty_cache(3)
    for call in (lambda: other(IDS), lambda: other(IDS, past), lambda: copy.copy(other)(IDS)):
        with pytest.raises(DomainError) as caught:
            call()
        assert "emb.weight was torch.float32 of shape (12, 6), and is torch.float64" in str(
            caught.value
        )
    equal_in_chunks(model, other.float())


def test_copies_keep_weights_tied() -> None:
    class Tied(Small):
        def __init__(self) -> None:
            super().__init__()
            self.out.weight = self.emb.weight

    model = small(Tied)
    rewritten = rewritten_small(model)
    for other in (copy.deepcopy(rewritten), pickle.loads(pickle.dumps(rewritten))):
        assert other.out.weight is other.emb.weight
        equal_in_chunks(model, other)


# Modes.


class WithDropout(Small):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def attend(self, q, k):
        return self.dropout(super().attend(q, k))


def test_training_mode_is_refused_where_it_matters() -> None:
    model = small(WithDropout)
    rewritten = rewritten_small(model)
    rewritten.train()
    with pytest.raises(DomainError, match=r"training mode(.|\n)*dropout(.|\n)*rewritten\.eval\(\)"):
        rewritten(IDS)
    rewritten.eval()
    equal_in_chunks(model, rewritten)


class AsksInAMethod(Small):
    """Its mode matters in what forward calls, and in no operator of evaluation mode."""

    def attend(self, q, k):
        return super().attend(q, k) * self.scale()

    def scale(self):
        return 2.0 if self.training else 1.0


class SetsInAMethod(Small):
    def train(self, mode=True):
        self.training = mode
        return self


class AsksForSettings(Small):
    """Scales by what torch is set to."""

    def attend(self, q, k):
        weights = super().attend(q, k)
        if torch.is_inference_mode_enabled():
            weights = weights * 2
        if torch.get_float32_matmul_precision() == "high":
            weights = weights * 3
        if torch.backends.mkldnn.enabled:
            weights = weights * 5
        return weights


def test_settings_of_torch_that_code_asks_for() -> None:
    rewritten = rewritten_small(small(AsksForSettings))
    equal_in_chunks(small(AsksForSettings), rewritten)
    with torch.inference_mode(), pytest.raises(DomainError, match=r"torch\.is_inference_mode_enab"):
        rewritten(IDS)
    with (
        torch.backends.mkldnn.flags(enabled=False),
        pytest.raises(DomainError, match=r"torch\.backends\.mkldnn\.enabled is False"),
    ):
        rewritten(IDS)
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(DomainError, match="matmul_precision is 'high', and was 'highest'"):
            rewritten(IDS)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_flag_of_another_kind_is_no_default() -> None:
    rewritten = rewritten_small(small(Shifted))
    equal_in_chunks(small(Shifted), rewritten)
    for by in (-0.0, 0, False):
        with pytest.raises(DomainError, match="'by' was given, but the graph was captured without"):
            rewritten(IDS, by=by)


class Shifted(Small):
    def forward(self, ids, past=None, by=0.0):
        logits, past = super().forward(ids, past)
        return logits.relu() * by, past


def test_the_mode_is_asked_for_in_a_method() -> None:
    rewritten = rewritten_small(small(AsksInAMethod))
    rewritten.train()
    with pytest.raises(DomainError, match=r"AsksInAMethod\.scale reads self\.training"):
        rewritten(IDS)
    assert rewritten_small(small(SetsInAMethod)).calling.mode_matters == ""


def test_a_model_that_is_captured_in_training_mode() -> None:
    model = small(AsksInAMethod).train()
    rewritten = rewritten_small(model)
    assert rewritten.training
    equal_in_chunks(model, rewritten)
    rewritten.eval()
    with pytest.raises(
        DomainError, match=r"is in evaluation mode(.|\n)*captured in training mode(.|\n)*train\(\)"
    ):
        rewritten(IDS)


def test_a_changed_model_is_not_captured_in_another_mode_unsaid() -> None:
    model = small(AsksInAMethod)
    rewritten = rewritten_small(model)
    model.train()
    model.pos.register_forward_hook(lambda module, args, rows: 2 * rows)
    with pytest.raises(DomainError, match="captured in training mode"):
        rewritten(IDS)
    model.eval()
    model.pos.register_forward_hook(lambda module, args, rows: rows / 3)
    equal_in_chunks(model, rewritten)


def test_a_change_that_cannot_be_taken_is_told() -> None:
    model = small()
    rewritten = rewritten_small(model)
    hook = model.emb.register_forward_hook(lambda module, args, rows: nn.functional.dropout(rows))
    with pytest.raises(cachefree.CaptureError) as caught:
        rewritten(IDS)
    says = str(caught.value)
    assert says.startswith("The model was changed after it was rewritten")
    assert "draws random numbers" in says
    hook.remove()
    equal_in_chunks(model, rewritten)


def test_training_mode_is_taken_where_it_does_not_matter(model: nn.Module) -> None:
    rewritten = rewritten_small(model)
    rewritten.train()
    assert rewritten.training
    equal_in_chunks(model, rewritten)
    assert not model.training


def test_a_model_in_training_mode_with_dropout_is_refused() -> None:
    with pytest.raises(cachefree.CacheFreeError, match="training"):
        rewritten_small(small(WithDropout).train())


# Calls outside the domain.


def past_of(batch: int = 3, length: int = 2, dtype: torch.dtype = torch.float32) -> Any:
    return tuple(torch.ones(batch, length, 6, dtype=dtype) for _ in range(2))


WRONG_CALLS = {
    "rank of the ids": ((IDS[0],), "ids has rank 1 where (batch, query) is expected"),
    "rank of the cache": (
        (IDS, tuple(t[0] for t in past_of())),
        "past[0] has rank 2 where (batch, past, 6) is expected",
    ),
    "dtype of the ids": ((IDS.float(),), "ids is torch.float32 where torch.int64 is expected"),
    "dtype of the cache": (
        (IDS, past_of(dtype=torch.float64)),
        "past[0] is torch.float64 where torch.float32 is expected",
    ),
    "batch": ((IDS, past_of(batch=2)), "past[0] has size 2 on axis 0 where batch = 3 is expected"),
    "width": (
        (IDS, tuple(t[..., :5] for t in past_of())),
        "past[0] has size 5 on axis 2 where 6 is expected",
    ),
    "lengths of the two": (
        (IDS, (past_of()[0], past_of(length=4)[1])),
        "past[1] has size 4 on axis 1 where past = 2 is expected",
    ),
    "one tensor too few": (
        (IDS, past_of()[:1]),
        "past has 1 entries where 2 are expected",
    ),
    "one tensor too many": (
        (IDS, (*past_of(), past_of()[0])),
        "past has 3 entries where 2 are expected",
    ),
    "a tensor as the cache": ((IDS, past_of()[0]), "past is a tensor where"),
    "a part of the cache": ((IDS, (past_of()[0], None)), "past[1] is None where a tensor"),
    "text": (("text",), "ids is str 'text' where a tensor is expected"),
    "nothing": ((), "The argument 'ids' is missing"),
    "device": (
        (IDS, tuple(t.to("meta") for t in past_of())),
        "past[0] is on meta where ids is on cpu",
    ),
    "too many arguments": ((IDS, None, 3), "too many positional arguments"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_a_wrong_call_is_refused_in_clear_words(name: str, rewritten: cachefree.Rewritten) -> None:
    args, says = WRONG_CALLS[name]
    with pytest.raises(DomainError) as caught:
        rewritten(*args)
    assert says in str(caught.value)
    (refusal,) = caught.value.refusals
    assert refusal.why
    assert refusal.remedy
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("shape", "says"),
    [((3, 0), "In all of these, query >= 1."), ((0, 3), "In all of these, batch >= 1.")],
)
def test_a_size_of_zero_is_told(
    shape: tuple[int, int], says: str, rewritten: cachefree.Rewritten
) -> None:
    with pytest.raises(DomainError) as caught:
        rewritten(torch.zeros(shape, dtype=torch.int64))
    assert says in str(caught.value)


def test_an_unknown_keyword_is_refused(rewritten: cachefree.Rewritten) -> None:
    with pytest.raises(DomainError, match="unexpected keyword argument 'idz'"):
        rewritten(IDS, idz=3)


def test_an_argument_given_twice_is_refused(rewritten: cachefree.Rewritten) -> None:
    with pytest.raises(DomainError, match="multiple values for argument 'ids'"):
        rewritten(IDS, ids=IDS)


class WithOptions(Small):
    def forward(self, ids, past=None, scale=None, *, is_loud=False):
        logits, present = super().forward(ids, past)
        if scale is not None:
            logits = logits * scale
        return (logits * 2 if is_loud else logits), present


def test_arguments_that_the_graph_was_captured_without_are_refused() -> None:
    model = small(WithOptions)
    rewritten = rewritten_small(model)
    same(rewritten(IDS, scale=None, is_loud=False), model(IDS))
    for more in ({"scale": torch.ones(12)}, {"is_loud": True}):
        (name,) = more
        with pytest.raises(DomainError, match=rf"'{name}' was given(.|\n)*example_inputs"):
            rewritten(IDS, **more)


def test_arguments_that_the_graph_was_captured_with_are_needed() -> None:
    model = small(WithOptions)
    example = {"ids": IDS[:2, :3], "scale": torch.ones(12), "is_loud": True}
    rewritten = cachefree.rewrite(model, example)
    scale = torch.linspace(0, 1, 12)
    same(rewritten(IDS, scale=scale, is_loud=True), model(IDS, scale=scale, is_loud=True))
    with pytest.raises(DomainError, match="'is_loud' is missing"):
        rewritten(IDS, scale=scale)
    with pytest.raises(DomainError, match="'scale' is missing"):
        rewritten(IDS, is_loud=True)
    with pytest.raises(DomainError, match="is_loud"):
        rewritten(IDS, scale=scale, is_loud=False)


def test_errors_can_be_pickled(rewritten: cachefree.Rewritten) -> None:
    with pytest.raises(DomainError) as caught:
        rewritten(IDS[0])
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is DomainError
    assert str(again) == str(caught.value)
    assert again.refusals == caught.value.refusals


def test_a_call_inside_the_domain_makes_no_copy_of_the_inputs(
    rewritten: cachefree.Rewritten,
) -> None:
    past = past_of()
    flat = rewritten.flatten_call(IDS, past)
    assert [one is other for one, other in zip(flat, (IDS, *past), strict=True)] == [True] * 3
    assert len(tensors(rewritten(IDS, past))) == 3


class Named(Small):
    """Children with the names that the rewritten module has for its own parts."""

    def __init__(self) -> None:
        super().__init__()
        self.report, self.encoder, self.keeper = (nn.Linear(6, 6) for _ in range(3))

    def attend(self, q, k):
        return super().attend(self.keeper(self.encoder(self.report(q))), k)


def test_children_of_a_model_may_have_any_name() -> None:
    model = small(Named)
    rewritten = rewritten_small(model)
    assert rewritten.report.verdict.is_proof
    assert dict(rewritten.named_parameters()).keys() == dict(model.named_parameters()).keys()
    with torch.no_grad():
        torch.testing.assert_close(rewritten(IDS)[0], model(IDS)[0])


class Translates(nn.Module):
    """An encoder inside, under the name that people give it."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.encoder = nn.Embedding(9, 4), nn.GRU(4, 4, batch_first=True)
        self.keys, self.head = nn.Linear(4, 4), nn.Linear(4, 9)

    def forward(self, source_ids, decoder_ids, past=None):
        states, _ = self.encoder(self.tokens(source_ids))
        x = self.tokens(decoder_ids)
        own = x if past is None else torch.cat([past[0], x], dim=1)
        keys = self.keys(states) if past is None else past[1]
        x = own.cumsum(dim=1)[:, -x.shape[1] :]
        return self.head(x + (x @ keys.mT).softmax(-1) @ keys), (own, keys)


def test_an_encoder_called_encoder() -> None:
    torch.manual_seed(0)
    model = Translates().eval()
    source, target = torch.randint(9, (2, 7)), torch.randint(9, (2, 4))
    rewritten = cachefree.rewrite(model, (source, target))
    assert rewritten.encoder is not model.encoder
    assert dict(rewritten.named_parameters()).keys() == dict(model.named_parameters()).keys()
    with torch.no_grad():
        (ours, cache), (theirs, their_cache) = rewritten(source, target), model(source, target)
        torch.testing.assert_close(ours, theirs)
        ours, _ = rewritten(source, target[:, :1], cache)
        theirs, _ = model(source, target[:, :1], their_cache)
        torch.testing.assert_close(ours, theirs)
