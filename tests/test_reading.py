"""Programs that write in place, read as values: each equals what torch leaves in the tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy
import torch
from torch import nn

from cachefree.calls import Call, TensorSpec
from cachefree.capture import capture
from cachefree.errors import CaptureError
from cachefree.graph import emit
from cachefree.reading import Program, read
from cachefree.sizes import size_symbol
from cachefree.structure import flatten
from cachefree.terms import Table, Term, operands, replace_operands, topological

N, P = size_symbol("n"), size_symbol("p")


class Lines(nn.Module):
    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.linspace(-1, 1, 4))
        self.register_buffer("state", torch.zeros(4))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.function.__code__.co_argcount == 3:
            return self.function(self, x, y)
        return self.function(x, y)


def program(model: Lines) -> Program:
    specs = tuple(
        TensorSpec(name, (symbol, 4), torch.float32, torch.device("cpu"))
        for name, symbol in (("x", N), ("y", P))
    )
    _, structure = flatten((specs, {}), lambda value: isinstance(value, TensorSpec))
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    names |= {id(tensor): name for name, tensor in model.named_buffers()}
    return read(capture(model, Call(structure, specs), {"n": 5, "p": 7}), Table(), names)


def slice_assignment(x, y):
    z = torch.zeros(x.shape[0] + y.shape[0], 4)
    z[: x.shape[0]] = x
    z[x.shape[0] :] = y
    return z


def select_assignment(x, y):
    z = x.clone()
    z[:, 1] = 7.0
    z[:, -1] = z[:, 0]
    return z


def number_into_a_slice(x, y):
    z = x.clone()
    z[:, 1:3] = -1
    return z


def masked_fill(x, y):
    z = x * 1
    z.masked_fill_(z > 0, -5.0)
    return z


def add_and_multiply(x, y):
    z = x.clone()
    z.add_(1).mul_(2)
    z += x
    z -= 0.5
    return z


def copy_into_a_view(x, y):
    z = torch.zeros(x.shape[0], 8)
    z.view(x.shape[0], 2, 4)[:, 1].copy_(x)
    return z


def copy_of_another_dtype(x, y):
    z = torch.zeros(x.shape[0], 4, dtype=torch.float64)
    z.copy_(x)
    z[:, :2] = x[0, 0].half()
    return z


def copy_of_a_row(x, y):
    z = x.clone()
    z.copy_(y[0])
    return z


def through_a_transpose(x, y):
    z = x.clone()
    z.t()[1:3] += 10
    return z


def through_a_permutation(x, y):
    z = x.clone().view(-1, 2, 2)
    z.permute(2, 0, 1)[0].fill_(3)
    return z


def through_two_views(x, y):
    z = x.clone()
    first, second = z[:, :3], z[:, 1:]
    first.mul_(2)
    second.add_(100)
    return torch.cat((z, first, second), 1)


def through_chunks(x, y):
    z = x.clone()
    one, other = z.chunk(2, dim=-1)
    one.add_(other)
    return z


def through_unbind(x, y):
    z = x.clone()
    rows = z.unbind(1)
    rows[2].zero_()
    return z


def read_before_and_after(x, y):
    z = x.clone()
    before = z + 0
    view = z[0]
    z.neg_()
    return before, view, z


def index_put(x, y):
    z = x.clone()
    z[:, torch.tensor([0, 2])] = 9.0
    return z


def index_add(x, y):
    z = torch.zeros(4)
    return z.index_add_(0, torch.tensor([0, 0, 3]), x[:1, :3].flatten())


def triangle(x, y):
    return torch.ones(x.shape[0], y.shape[0]).tril_().triu_(-1)


def zeros_and_fill(x, y):
    z = x.clone()
    z[:, :2].zero_()
    z[:, 2:].fill_(5)
    return z


def out_of_a_loop(x, y):
    z = torch.zeros_like(x)
    for i in range(4):
        z[:, i] = x[:, 3 - i] * i
    return z


def squeeze_and_flatten(x, y):
    z = x.clone()
    z.unsqueeze(0).squeeze(0).flatten()[:2] = 0
    return z


def a_copy_and_its_source(x, y):
    z = x.clone()
    w = (z * 2).t().contiguous()
    w.add_(1)
    return z, w


def contiguous_of_a_transpose(x, y):
    z = x.clone()
    w = z.t().contiguous()
    w.add_(1)  # of one row, it is z itself
    return z, w


WRITES = (
    slice_assignment,
    select_assignment,
    number_into_a_slice,
    masked_fill,
    add_and_multiply,
    copy_into_a_view,
    copy_of_another_dtype,
    copy_of_a_row,
    through_a_transpose,
    through_a_permutation,
    through_two_views,
    through_unbind,
    read_before_and_after,
    index_put,
    index_add,
    triangle,
    zeros_and_fill,
    out_of_a_loop,
    squeeze_and_flatten,
    a_copy_and_its_source,
)


@pytest.mark.parametrize("function", WRITES, ids=lambda function: function.__name__)
def test_writes_become_values(function: Callable[..., torch.Tensor]) -> None:
    model = Lines(function)
    found = program(model)
    assert not found.written, "neither input is written to"
    for term in topological(found.outputs):
        schema = getattr(term.op, "_schema", None)
        assert schema is None or not schema.is_mutable, term.text()
    named = [(spec.path, term) for spec, term in zip(found.captured.call.tensors, found.inputs,
                                                     strict=True)]  # fmt: skip
    results = [(f"out{i}", term) for i, term in enumerate(found.outputs)]
    graph = emit(model, named, results)
    for n, p in ((5, 7), (2, 3), (1, 1), (9, 2)):
        x, y = torch.randn(n, 4), torch.randn(p, 4)
        before = x.clone(), y.clone()
        expected, _ = flatten(model(x.clone(), y.clone()))
        for one, other in zip(graph(x, y), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        assert torch.equal(x, before[0])
        assert torch.equal(y, before[1])


def reshape_of_a_transpose(x, y):
    rows = x.transpose(0, 1).reshape(-1)
    rows.add_(1)
    return x * 2, rows


def source_of_a_copy(x, y):
    base = x + 1
    kept = base.transpose(0, 1).contiguous()
    base.mul_(2)
    return kept, base


def copy_of_a_copy(x, y):
    base = x + 1
    last = base.transpose(0, 1).contiguous().transpose(0, 1).reshape(-1)
    last.zero_()
    return base


@pytest.mark.parametrize(
    "forward", [contiguous_of_a_transpose, reshape_of_a_transpose, source_of_a_copy, copy_of_a_copy]
)
def test_a_copy_that_is_a_view_at_size_one(forward) -> None:
    with pytest.raises(CaptureError) as caught:
        program(Lines(forward))
    assert "is a copy at some sizes and not at others" in str(caught.value)
    assert "Write to x.clone()" in str(caught.value)


def written_and_not_read_again(x, y):
    scores = (x + 1).transpose(0, 1).contiguous()
    scores += 1
    scores.mul_(2)
    return scores * 2


def other_parts_of_a_split(x, y):
    q, k = (x + 1).view(-1, 2, 2).transpose(0, 1).chunk(2, -1)
    q = q.contiguous()
    q.mul_(2)
    return q + k


def other_slices(x, y):
    base = (x + 1).t()
    q = base[0:2].contiguous()
    q.mul_(2)
    return q + base[2:4]


def cast_and_written(x, y):
    wide = x.to(torch.float64)
    wide.mul_(2)
    return wide.to(x.dtype) + x


@pytest.mark.parametrize(
    "forward",
    [written_and_not_read_again, other_parts_of_a_split, other_slices, cast_and_written],
)
def test_a_copy_that_is_written_and_its_source_not_read(forward) -> None:
    model = Lines(forward)
    found = program(model)
    named = list(zip(("x", "y"), found.inputs, strict=True))
    graph = emit(model, named, [(f"out{i}", term) for i, term in enumerate(found.outputs)])
    for rows in (1, 3):
        x, y = torch.randn(rows, 4), torch.randn(2, 4)
        expected = model(x, y)
        assert torch.equal(graph(x, y)[0], expected)


def into_an_input(x, y):
    x.add_(1)
    return x * 2


def into_a_view_of_an_input(x, y):
    y[:, 0] = 0
    return y.clone()


def into_a_buffer(self, x, y):
    self.state.add_(1)
    return x + self.state


@pytest.mark.parametrize(
    ("function", "name"),
    [(into_an_input, "x"), (into_a_view_of_an_input, "y"), (into_a_buffer, "state")],
)
def test_writes_to_inputs_and_buffers_are_told(function: Callable[..., object], name: str) -> None:
    model = Lines(function)
    found = program(model)
    assert [term.args[0] for term in found.written] == [name]
    assert torch.equal(model.state, torch.zeros(4)), "the buffer itself is untouched"


def random_numbers(x, y):
    return x + torch.randn_like(x)


def dropout(x, y):
    return nn.functional.dropout(x, 0.5, training=True)


def bernoulli_in_place(x, y):
    return x.clone().bernoulli_(0.5)


def number_of_a_tensor(x, y):
    return x * x.sum().item()


def branch_on_a_value(x, y):
    return x if bool((x > 0).any()) else y


REFUSED = [
    (through_chunks, "through the view", "one.add_(other)"),
    (random_numbers, "random", "torch.randn_like(x)"),
    (dropout, "random", "nn.functional.dropout"),
    (bernoulli_in_place, "random", "bernoulli_"),
    (number_of_a_tensor, "values of a tensor", ".item()"),
    (branch_on_a_value, "values of a tensor", "any()"),
]


@pytest.mark.parametrize(("function", "what", "line"), REFUSED)
def test_what_has_no_value_is_refused_with_its_line(
    function: Callable[..., object], what: str, line: str
) -> None:
    with pytest.raises(CaptureError) as caught:
        program(Lines(function))
    assert what in str(caught.value)
    assert line in str(caught.value)
    assert __file__ in str(caught.value)


def test_dropout_in_eval_mode_is_no_chance() -> None:
    found = program(Lines(lambda x, y: nn.functional.dropout(x, 0.5, training=False)))
    assert found.outputs


def test_parameters_and_buffers_are_read_by_their_names() -> None:
    found = program(Lines(lambda self, x, y: x * self.weight + self.state))
    attributes = {t.args[0]: t.payload for t in topological(found.outputs) if t.op == "attribute"}
    assert attributes.keys() == {"weight", "state"}


def test_what_is_computed_without_gradients_is_detached() -> None:
    def frozen(x, y):
        with torch.no_grad():
            z = x * 2
        return z + x

    model = Lines(frozen)
    found = program(model)
    graph = emit(model, [("x", found.inputs[0]), ("y", found.inputs[1])], [("z", found.outputs[0])])
    x, y = torch.ones(2, 4, requires_grad=True), torch.ones(1, 4)
    graph(x, y)[0].sum().backward()
    assert torch.equal(x.grad, torch.ones(2, 4))


# Terms and their table.


def test_equal_terms_are_one_object() -> None:
    table = Table()
    x = table.input("x", (N, 4), torch.float32, torch.device("cpu"))
    assert table.input("x", (N, 4), torch.float32, torch.device("cpu")) is x
    one = table.like(x, "reshape", (x, (4, N)), (4, N))
    assert table.like(x, "reshape", (x, (4, N)), (4, N)) is one
    assert table.like(x, "reshape", (x, (N, 4)), (N, 4)) is not one
    assert len(table) == 3


def test_numbers_that_are_equal_in_python_are_told_apart() -> None:
    table = Table()

    def full(number: object, dtype: torch.dtype = torch.float32) -> Term:
        return table.make("full", ((2,), number, dtype), (2,), dtype, torch.device("cpu"))

    assert full(0.0) is not full(-0.0)
    assert full(1) is not full(1.0)
    assert full(1) is not full(True)
    assert full(float("nan")) is full(float("nan"))
    assert full(sympy.Integer(1)) is full(1)


def test_constants_are_compared_by_their_bits() -> None:
    table = Table()
    assert table.constant(torch.tensor([1.0, 2.0])) is table.constant(torch.tensor([1.0, 2.0]))
    assert table.constant(torch.tensor([0.0])) is not table.constant(torch.tensor([-0.0]))
    assert table.constant(torch.tensor([1.0])) is not table.constant(torch.tensor([[1.0]]))
    assert table.constant(torch.tensor([1])) is not table.constant(torch.tensor([1.0]).double())


def test_deep_programs_need_no_recursion() -> None:
    table = Table()
    x = table.input("x", (2,), torch.float32, torch.device("cpu"))
    for _ in range(20_000):
        x = table.like(x, torch.ops.aten.neg.default, (x,))
    order = topological([x])
    assert len(order) == 20_001
    assert order[-1] is x
    assert list(operands(x)) == [order[-2]]
    replaced = replace_operands(x.args, lambda arg: order[0] if isinstance(arg, Term) else arg)
    assert replaced == (order[0],)
