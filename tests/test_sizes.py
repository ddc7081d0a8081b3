"""Every question that Python asks about a size is heard, with the line that asks it."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import sympy
import torch
from torch import nn
from torch.utils._sympy.functions import FloatPow

from cachefree.calls import Call, TensorSpec
from cachefree.capture import Captured, capture
from cachefree.sizes import expression, is_users, preimage, size_symbol, substitute
from cachefree.structure import flatten

N, P = size_symbol("n"), size_symbol("p")


class Lines(nn.Module):
    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.function(x, y)


def captured(function: Callable[..., torch.Tensor], **asked: int) -> Captured:
    specs = tuple(
        TensorSpec(name, (symbol, 4), torch.float32, torch.device("cpu"))
        for name, symbol in (("x", N), ("y", P))
    )
    _, structure = flatten((specs, {}), lambda value: isinstance(value, TensorSpec))
    return capture(Lines(function), Call(structure, specs), {"n": 5, "p": 7}, asked or None)


def one_token(x, y):
    if x.shape[0] == 1:
        return x
    return x + 1


def empty_past(x, y):
    if y.size(0) == 0:
        return x
    return x + 1


def threshold(x, y):
    return x * 2 if y.shape[0] > 16 else x


def truth(x, y):
    return x * 2 if y.shape[0] else x


def elements(x, y):
    return x * 2 if y.numel() > 8 else x


def length(x, y):
    return x * 2 if len(y) > 3 else x


def sums(x, y):
    total = x.shape[0] + y.shape[0]
    return x * 2 if total <= 64 else x


def inside_an_assertion(x, y):
    assert x.shape[0] < 100
    return x


def two_questions(x, y):
    return x * 2 if 1 < x.shape[0] < y.shape[0] else x


QUESTIONS = [
    (one_token, [sympy.Ne(N, 1)]),
    (empty_past, [sympy.Ne(P, 0)]),
    (threshold, [sympy.Le(P, 16)]),
    (elements, [sympy.Gt(4 * P, 8)]),
    (length, [sympy.Gt(P, 3)]),
    (sums, [sympy.Le(N + P, 64)]),
    (inside_an_assertion, [sympy.Lt(N, 100)]),
    (two_questions, [sympy.Gt(N, 1), sympy.Lt(N, P)]),
]


@pytest.mark.parametrize(("function", "facts"), QUESTIONS, ids=lambda v: getattr(v, "__name__", ""))
def test_a_question_is_recorded_with_its_line(
    function: Callable[..., torch.Tensor], facts: list[sympy.Basic]
) -> None:
    questions = captured(function).questions
    assert len(questions) == len(facts)
    for question, fact in zip(questions, facts, strict=True):
        for n in range(20):  # the same fact, however it is written
            for p in range(20):
                values = {N: n, P: p}
                assert question.fact.subs(values) == fact.subs(values), question
        assert question.where is not None
        assert question.where.file == __file__
        lines, start = inspect.getsourcelines(function)
        assert start < question.where.line < start + len(lines)
        assert question.where.function == function.__name__
        assert "shape" in question.where.text or "size" in question.where.text or "len" in (
            question.where.text
        ) or "numel" in question.where.text or "total" in question.where.text  # fmt: skip
        assert not question.froze


def test_the_truth_of_a_size_is_a_question() -> None:
    (question,) = captured(truth).questions
    assert question.where is not None
    assert question.where.function == "truth"
    assert question.fact.subs({P: 7}) == sympy.true
    assert question.fact.subs({P: 0}) == sympy.false


def shortest(x, y):
    return x[: min(x.shape[0], y.shape[0], 3)]


def longest(x, y):
    return torch.zeros(max(x.shape[0], y.shape[0]))


def longest_of_a_list(x, y):
    return torch.zeros(max([x.shape[0], y.shape[0] + 1]))


def rows(x, y):
    return torch.zeros(len(x) + len(y))


def into_an_int(x, y):
    return torch.zeros(int(y.shape[0]) + int("1"))


@pytest.mark.parametrize("function", [into_an_int, shortest, longest, longest_of_a_list, rows])
def test_min_max_and_len_stay_symbolic_and_ask_nothing(
    function: Callable[..., torch.Tensor],
) -> None:
    path = captured(function)
    assert path.questions == ()
    (leaf,) = path.output_leaves
    for n in range(1, 9):
        for p in range(9):
            expected = function(torch.zeros(n, 4), torch.zeros(p, 4)).shape
            found = tuple(int(sympy.sympify(size).subs({N: n, P: p})) for size in leaf.shape)
            assert found == expected, (n, p)


def over_a_range(x, y):
    for _ in range(0, y.shape[0], 2):
        x = x + 1
    return x


def as_an_index(x, y):
    return x * [1, 2, 3, 4, 5, 6, 7, 8, 9][y.shape[0]]


@pytest.mark.parametrize("function", [over_a_range, as_an_index])
def test_a_size_that_becomes_a_number_is_frozen_and_recorded(
    function: Callable[..., torch.Tensor],
) -> None:
    frozen = [question for question in captured(function).questions if question.froze]
    assert frozen
    for question in frozen:
        assert question.fact.subs({P: 7}) == sympy.true
        assert question.fact.subs({P: 6}) == sympy.false
        assert question.where is not None
        assert question.where.function == function.__name__


def no_question(x, y):
    return torch.cat((x, y)) @ torch.cat((y, x)).mT.softmax(-1)


def test_code_that_asks_nothing_has_no_question() -> None:
    assert captured(no_question).questions == ()


def broadcast(x, y):
    return x + torch.ones(1, 4)


def test_what_operators_ask_is_kept_apart() -> None:
    path = captured(lambda x, y: x[:, None] * y.unsqueeze(0))
    assert path.questions == ()
    assert path.operator_questions


def test_questions_are_answered_for_other_sizes_where_told() -> None:
    path = captured(one_token, n=1)
    (question,) = path.questions
    assert question.fact == sympy.Eq(N, 1)
    assert path.output_leaves[0].shape == (N, 4)
    assert not [node for node in path.graph.nodes if "add" in str(node.target)]


def test_expressions_and_substitution() -> None:
    assert expression(sympy.Integer(3)) == 3
    assert isinstance(expression(sympy.Integer(3)), int)
    assert expression("text") == "text"
    assert substitute(N + P, {P: sympy.Integer(0)}) == N
    assert substitute(N + P, {N: 2, P: 3}) == 5
    assert isinstance(substitute(N + P, {N: 2, P: 3}), int)
    assert substitute(7, {N: 2}) == 7
    assert size_symbol("n") == size_symbol("n")
    assert size_symbol("n").is_nonnegative


def test_what_torch_computes_sizes_with_is_not_the_users_code() -> None:
    assert not any(is_users(module.__file__) for module in (torch, sympy, inspect))
    assert is_users(__file__)


def test_the_smallest_number_with_as_many_rows() -> None:
    frames = size_symbol("encoder")
    rows = sympy.floor((frames - 1) / 4) + 1
    for count in (1, 2, 20):
        found = preimage(rows, frames, {}, count)
        assert found == 4 * (count - 1) + 1
    assert preimage(sympy.Min(frames, 6), frames, {}, 6) is None
    assert preimage(2 * frames, frames, {}, 7) is None
    assert preimage(rows * size_symbol("batch"), frames, {"batch": 3}, 6) == 5


def test_a_power_that_is_not_due_is_equal_to_itself_alone() -> None:
    """``(n / 4 - 1) ** 1.3`` is complex below 4: in no region that asks for ``n > 8`` is it due."""
    n = size_symbol("n")
    power = FloatPow(n / 4.0 - 1.0, sympy.Float(1.3))
    one, two = substitute(power, {n: 1}), substitute(power, {n: 2})
    assert one != two
    assert one == substitute(power, {n: 1})
    assert float(substitute(power, {n: 12})) == pytest.approx(2**1.3)
